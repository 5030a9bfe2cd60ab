"""`python -m timm_rope convert`: any known checkpoint -> a folder that timm loads and the Hub takes as it is.

The weights are never copied as a whole: the model is built on the meta device, is given the tensors that are mapped
from the checkpoint, and timm writes them from there. What was written is read back and compared before it is put in
its place.
"""
import argparse
import ast
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

import timm
from torch import nn

from ..._checks import check_size
from ...encodings import RotaryEncoding
from ...positions.coordinates import read_grid
from ...weights.fit_swin import fit as fit_swin
from ...weights.fit_vit import fit
from ...weights.layouts import Layout, Weights, find_eva, recognise
from ...weights.origin import HUB, TIMM, Origin, find_origin, training_config
from .architecture import Architecture, known_models, match
from .hub_folder import CheckFailed, check_target, clean_exit, new_folder, verify, write_model
from .model_card import check_license, grouped, write_card
from .originals import compare, find_original
from .weight_shapes import staged
from .weights_cfg import pretrained_cfg, published_model

# whether the averaged tensors were taken -> what to say of a file that holds both
KINDS = {
    True: 'the averaged ones (EMA); the raw ones of the file are left out',
    False: 'the raw ones; the averaged ones (EMA) of the file are left out'}
TOLERANCE = 1e-4  # of logits, relative to the largest one; float32 rounding is near 1e-6


# -- the command

def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('source', metavar='IN', help=f'weight file, folder with one, {HUB}org/name[@revision], or '
                        f'{TIMM}NAME.TAG, weights that timm publishes')
    parser.add_argument('out', metavar='OUT', help='folder to write; must not exist or be empty')
    parser.add_argument('--filename', metavar='NAME', help='weight file in the folder or repository IN')
    parser.add_argument('--model', default='', metavar='NAME',
                        help='model the weights are of, where the file does not tell; a tag of published weights adds '
                             'their licence')
    parser.add_argument('--model-args', nargs='+', default=[], metavar='KEY=VALUE', help='constructor arguments')
    parser.add_argument('--img-size', nargs='+', type=int, metavar='N',
                        help='image size of training, or height and width, where the file does not tell')
    parser.add_argument('--mean', nargs='+', type=float, metavar='X', help='mean of the images (default: ImageNet)')
    parser.add_argument('--std', nargs='+', type=float, metavar='X', help='deviation of the images (default: ImageNet)')
    parser.add_argument('--crop-pct', type=float, metavar='X', help='share of a test image that is used (default: 1.0)')
    parser.add_argument('--interpolation', choices=('bilinear', 'bicubic', 'nearest', 'random'),
                        help='how images are resized (default: bicubic)')
    parser.add_argument('--license', metavar='ID', help='licence of the weights, as the Hub names it')
    parser.add_argument('--check', action='store_true',
                        help='compare logits with those of the original, where timm has an implementation of it')
    parser.add_argument('--force', action='store_true', help='replace OUT if it is the folder of another model')
    parser.epilog = 'Exit status: 0 if the folder was written, 1 if a check failed, 2 if the input cannot be converted.'


def run(args: argparse.Namespace) -> int:
    try:
        with clean_exit():
            convert(
                args.source, args.out, filename=args.filename, model=args.model, model_args=parse(args.model_args),
                img_size=args.img_size, mean=args.mean, std=args.std, crop_pct=args.crop_pct,
                interpolation=args.interpolation, license=args.license, check=args.check, force=args.force, say=print)
    except (ValueError, TypeError, RuntimeError, OSError, CheckFailed) as error:
        print(' '.join(f'convert: {error}'.split()), file=sys.stderr)
        return 1 if isinstance(error, CheckFailed) else 2
    return 0


def parse(pairs: List[str]) -> Dict[str, Any]:
    """KEY=VALUE as timm's --model-kwargs: Python literals, anything else is text."""
    out = {}
    for text in pairs:
        key, equals, value = text.partition('=')
        if not key.isidentifier() or not equals:
            raise ValueError(f'--model-args takes KEY=VALUE, got {text!r}.')
        try:
            out[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            out[key] = value
    return out


# -- the conversion

def convert(
        source: str,
        out: Union[str, Path],
        *,
        filename: Optional[str] = None,
        model: str = '',
        model_args: Optional[Dict[str, Any]] = None,
        img_size: Union[int, List[int], Tuple[int, ...], None] = None,
        mean: Optional[List[float]] = None,
        std: Optional[List[float]] = None,
        crop_pct: Optional[float] = None,
        interpolation: Optional[str] = None,
        license: Optional[str] = None,
        check: bool = False,
        force: bool = False,
        say: Callable[[str], Any] = lambda line: None,
) -> Path:
    """Convert a checkpoint of any known layout to a folder for timm and the Hub.

    Args:
        source: Weight file, folder with one, 'hf-hub:org/name[@revision]', or 'timm:NAME[.TAG]'.
        out: Folder that does not exist or is empty.
        filename: Weight file in the folder or repository.
        model: Name of the model, where the file does not tell; a tag says that these are the published weights.
        model_args: Constructor arguments, which go before all that the file says.
        img_size: Image size of training in pixels, where the file does not tell.
        mean: Of the images, one number for each channel.
        std: Of the images.
        crop_pct: Share of a test image that is used, above 0 and at most 1.
        interpolation: How images are resized.
        license: Identifier of the Hub; none is written if it is not known.
        check: Compare logits with those of the original, where timm has an implementation of it.
        force: Replace `out` if it is the folder of another model.
        say: Called with each line of the report.

    Returns:
        The folder: model.safetensors, config.json, README.md.

    Raises:
        ValueError: The input cannot be converted, or leaves open what only the caller knows.
        RuntimeError: The file is refused, cannot be had, or does not fit the model.
        CheckFailed: What was written is not what was read, or computes something else.
        All of them leave `out` as it was.
    """
    target = check_target(out, force)
    check_license(license)
    size = None if img_size is None else check_size(img_size, 'img_size')
    origin = find_origin(source, filename)
    if origin.file.path.resolve().is_relative_to(target):
        raise ValueError(f'out must not be the folder of the weights, {target} holds {origin.file.path.name}.')
    checkpoint = origin.file.read()
    origin.file.wait()
    model, layout = _named(model, origin, checkpoint)
    weights = recognise(checkpoint, layout)
    config: Dict[str, Any] = dict(input_size=origin.config.data.get('input_size'))
    if origin.config.architecture and weights.timm_model is None:  # else the layout has read what it says
        config.update(origin.config.model_args, architecture=origin.config.architecture)
    model = model or published_model(origin, filename)
    arch = match(weights, model, model_args, size, {k: v for k, v in config.items() if v is not None})
    given = dict(mean=mean, std=std, crop_pct=crop_pct, interpolation=interpolation)
    cfg = pretrained_cfg(arch, origin, {k: v for k, v in given.items() if v is not None}, license or origin.license)
    built = _build(arch, cfg, weights)
    state = built.state_dict()
    left_out = dict(weights.left_out)
    if 'pos_embed' in weights.tensors and 'pos_embed' not in state:
        left_out['pos_embed'] = 'not trained, and not used by the model'
    kind = {} if weights.averaged is None else {'weights': KINDS[weights.averaged]}
    facts = _facts(arch, built, weights)
    for line in (str(origin.file.path), *_report({**facts, **kind}, left_out, arch.assumed)):
        say(line)

    came_from = {'file': origin.name, 'SHA-256': origin.file.sha256(), **kind}
    with new_folder(target, force) as folder:
        write_model(built, folder, _labels(origin, built))
        card = write_card(
            target.name, cfg.get('license'), built.num_classes > 0, came_from, facts, arch.assumed, left_out)
        (folder / 'README.md').write_text(card, encoding='utf-8')
        verify(folder, state)
        say(_line('verified', f'{len(state)} tensors, read back and equal; config.json builds their model'))
        if check:
            _check_logits(folder, weights, built, say)
    say(f'{target} holds the converted model.')
    return target


def _named(model: str, origin: Origin, checkpoint: Dict[str, Any]) -> Tuple[str, Optional[Layout]]:
    """Our model if it is named, and the layout of the one of timm that the user or the file names."""
    if not origin.config.architecture:
        origin.config = training_config(checkpoint)
    theirs = model.partition('.')[0]
    if theirs and theirs not in known_models() and find_eva(theirs, {}):
        origin.config.architecture, model = theirs, ''
    return model, find_eva(origin.config.architecture, origin.config.model_args)


def _build(arch: Architecture, cfg: Dict[str, Any], weights: Weights) -> Any:
    """The model with the tensors of the checkpoint in it, not copies of them."""
    name = arch.model.partition('.')[0]
    model: Any = timm.create_model(name, device='meta', pretrained_cfg=cfg, **arch.args)
    for module in model.modules():
        if isinstance(module, RotaryEncoding):  # its signature comes from the model, never from a file
            module.to_empty(device='cpu').reset_parameters()
    tensors = (fit_swin if staged(weights) else fit)(weights, model)
    tensors = {key: value.detach().contiguous() for key, value in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    missing = [key for key, value in model.state_dict().items() if value.is_meta]
    if missing:
        raise RuntimeError(f'The weights have no {", ".join(missing[:6])}.')
    return model


def _report(facts: Dict[str, str], left_out: Dict[str, str], assumed: Dict[str, str]) -> Iterator[str]:
    """Lines that say what was recognised, left out and assumed."""
    for key, value in facts.items():
        yield _line(key, value)
    for title, pairs in (('left out', grouped(left_out)), ('assumed', assumed)):
        for key, value in pairs.items():
            yield _line(title, f'{key}: {value}')


def _line(key: str, value: str) -> str:
    return f'  {key:<18} {value}'


def _facts(arch: Architecture, model: Any, weights: Weights) -> Dict[str, str]:
    state = model.state_dict()
    rope = getattr(model, 'rope', None)
    preset = ('in_chans', 'num_classes', 'img_size')
    args = ', '.join(f'{key}={value!r}' for key, value in arch.args.items() if key not in preset)
    stem = state['patch_embed.proj.weight']
    height, width = check_size(arch.args['img_size'], 'img_size')
    dtypes = sorted({str(value.dtype).removeprefix('torch.') for value in state.values() if value.is_floating_point()})
    return {
        'layout': weights.layout,
        'encoding': 'none' if rope is None else rope.signature_of(rope.options),
        'position embedding': 'learned' if 'pos_embed' in state else 'none',
        'architecture': arch.model + (f' with {args}' if args else ''),
        'size': f'{stem.shape[0]} wide, {_depth(model)} blocks, {arch.heads} heads',
        'image': f'{height} x {width}, {arch.args["in_chans"]} channels, patches of '
                 f'{" x ".join(map(str, stem.shape[2:]))}',
        **({} if rope is None else {
            'reference grid': ' x '.join(map(str, read_grid(rope.reference_grid, 'reference_grid'))) + ' patches'}),
        'classes': f'{arch.args["num_classes"]:,}',
        'parameters': f'{sum(p.numel() for p in model.parameters()):,} ({", ".join(dtypes)})',
    }


def _depth(model: Any) -> int:
    return len(model.blocks) if hasattr(model, 'blocks') else sum(len(stage.blocks) for stage in model.layers)


def _labels(origin: Origin, model: Any) -> Dict[str, Any]:
    """Names of the classes, if the config has one for each."""
    labels = origin.config.labels
    return labels if len(labels.get('label_names', ())) == model.num_classes else {}


def _check_logits(folder: Path, weights: Weights, built: nn.Module, say: Callable[[str], Any]) -> None:
    original = find_original(weights, built)
    if original is None:
        say(_line('checked', f'only that what was written is what was read: no other implementation of '
                             f'{weights.layout} is at hand'))
        return
    model: Any = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    try:
        results = compare(original, model, tuple(model.patch_embed.img_size))
    except RuntimeError as e:
        raise CheckFailed(f'{original.name} does not take the weights: {e}') from e
    for (height, width), difference in results.items():
        say(_line('checked', f'{height} x {width}: logits differ from {original.name} by {difference:.1e} of the '
                             f'largest one'))
    if not original.independent:
        say(_line('', '(our model is a subclass of that class, so much of the code is the same)'))
    if max(results.values()) > TOLERANCE:
        raise CheckFailed(f'logits differ from {original.name} by {max(results.values()):.1e} of the largest one, more '
                          f'than {TOLERANCE:.0e}: nothing was written.')
