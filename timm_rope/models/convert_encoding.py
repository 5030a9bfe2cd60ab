"""Exact changes of encoding: some encodings are special cases of others, with the same function of every image.

    uniform, axial -> axial_learned -> mixed -> string -> liere,   spiral, golden, nd -> mixed,
    spherical -> spherical_learned

Only the encoding changes, no other weight: channel pairs stay where they are. The one exception is string -> mixed in a
model or its weights, where the basis goes into the projection of queries and keys. Prefix tokens do not turn, so the
origin of the coordinates is part of the function, even where the score of two patches does not see it.
"""
import copy
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn

from ..encodings import RotaryEncoding
from ..encodings._exact import basis_of_pairs, convert_rope
from ..encodings._saved import encoding_prefix, read_encoding
from ..encodings._usage import USAGE
from ..rotations import Rotation

SOURCES = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'tag', 'custom_load')


def convert_encoding(source: Any, name: str, *, num_heads: Optional[int] = None, **options: Any) -> Any:
    """Express a rotary encoding as a more general one with the same function.

    Queries and keys turn by the same angles on every grid, so logits agree to rounding. The frequencies become
    parameters: in the converted model they learn, an optimizer has to be made anew.

    Args:
        source: Model with a rotary encoding, the state dict of a ViT, or an encoding alone (`create_rope`). Not
            changed.
        name: Encoding to change to, a learned one of `list_ropes()`.
        num_heads: Attention heads; only for state dicts, which do not tell them where all heads share frequencies.
        **options: Options of the target, with or without the prefix `rope_`. Default: those of the source where both
            encodings know them, else the target's own.

    Returns:
        What `source` is, with the other encoding: a copy of the model on its device and in its mode, which
        `timm.models.save_for_hf` saves under the name of its new architecture and without the source's weights as its
        origin; a new dict that shares all other tensors; or an encoding. Learned frequencies stay frozen where they
        were; fixed ones become trainable.

    Raises:
        ValueError: The target has no frequencies with this function, says why and which encodings have; a state dict
            without the signature of its encoding; tensors on the meta device; an option out of range.
        TypeError: `source` is something else, as a wrapped, compiled or scripted model, or an option is unknown.
    """
    if isinstance(source, dict):
        return _convert_state_dict(source, name, num_heads, options)
    ropes = [source] if isinstance(source, RotaryEncoding) else _ropes_of(source)
    if num_heads not in (None, ropes[0].num_heads):
        raise ValueError(f'num_heads is {ropes[0].num_heads} in this model, got {num_heads!r}; it need not be given.')
    targets = {id(rope): convert_rope(rope, name, options, rope is not source) for rope in ropes}
    target = targets[id(ropes[0])]
    if ropes[0] is source:
        return target
    bases = {id(targets[id(rope)]): basis_of_pairs(rope, targets[id(rope)]) for rope in ropes}
    with torch.inference_mode(False):
        # the memo puts the targets wherever the copy would refer to an encoding
        model = copy.deepcopy(source, {**targets})
    for module in model.modules():
        if isinstance(dict(module.named_children()).get('rotation'), Rotation) and module not in targets.values():
            module.rotation = target.rotation
    for attention, rope, layer in _attentions(model):
        basis = bases[id(rope)]
        if basis is not None:
            if not isinstance(getattr(attention, 'q_norm', None), (nn.Identity, type(None))):
                raise ValueError(_NORM.format(name))
            fold(attention.qkv.weight, attention.qkv.bias, basis[layer])
    _record(model, target)
    return model


_NORM = 'No exact way to {!r}: the change of basis does not pass the norm of queries and keys (qk_norm).'


def _attentions(model: Any) -> Iterator[Tuple[Any, nn.Module, int]]:
    """Attentions with the encoding that turns them, and which of its layers it is."""
    if not _is_swin(model):
        yield from ((block.attn, model.rope, i) for i, block in enumerate(model.blocks))
        return
    for module in model.modules():
        if isinstance(getattr(module, 'rope', None), RotaryEncoding) and hasattr(module, 'qkv'):
            yield module, module.rope, 0


@torch.no_grad()
def fold(weight: Tensor, bias: Optional[Tensor], basis: Tensor) -> None:
    """Multiply the queries and keys of a packed projection by the transposed basis (H, D, D) of each head, in place."""
    heads, dim = basis.shape[:2]
    for tensor in (weight, bias):
        if tensor is not None:
            rows = tensor[:2 * heads * dim]
            values = rows.double().reshape(2, heads, dim, -1)
            rows.copy_((basis.mT.to(rows.device, torch.float64) @ values).reshape(rows.shape))


def _ropes_of(model: Any) -> List[RotaryEncoding]:
    """The encoding of a ViT, or those of all blocks of a Swin."""
    children = dict(model.named_children()) if isinstance(model, nn.Module) else {}
    modules = model.modules() if _is_swin(model) else [children.get('rope')]
    ropes = [module for module in modules if isinstance(module, RotaryEncoding)]
    if not ropes:
        if isinstance(model, nn.Module) and getattr(model, 'rope', model) is None:
            raise ValueError('The model has no rotary encoding (rope_encoding="none"), so there is none to convert.')
        inner = ' or '.join(f'its .{key}' for key in ('module', '_orig_mod', 'model') if key in children)
        raise TypeError(
            f'source must be a plain model with a rotary encoding, a state dict or a RotaryEncoding, got '
            f'{type(model).__name__}' + (f': pass {inner}.' if inner else '.'))
    if any(hasattr(parameter, 'device_mesh') for parameter in model.parameters()):
        raise TypeError('The parameters of the model are sharded: convert before fully_shard.')
    return ropes


def _is_swin(model: Any) -> bool:
    from .swin import RopeSwinTransformer

    return isinstance(model, RopeSwinTransformer)


# -- models

def _record(model: nn.Module, target: RotaryEncoding) -> None:
    """Make timm save the model as what it is now, and no longer as the weights that were published."""
    cfg: Any = getattr(model, 'pretrained_cfg', None)
    if not cfg:
        return  # made by the constructor: timm cannot save it either
    from . import rope_swin, rope_vit
    from .swin import DEFAULTS

    swin = _is_swin(model)
    models = rope_swin.MODEL_ARGS if swin else rope_vit.MODEL_ARGS
    args = {k: v for k, v in getattr(model, '_model_args', {}).items()
            if not k.startswith('rope_') or k == 'rope_reference_grid'}
    name = _twin(cfg.get('architecture'), target.name, models)
    if name is None:
        name, args['rope_encoding'] = cfg.get('architecture'), target.name
    defaults = {**target.option_defaults(), **(DEFAULTS.get(target.name, {}) if swin else {})}
    preset = {**{f'rope_{k}': v for k, v in defaults.items()}, **models.get(name, {})}
    args.update({f'rope_{k}': v for k, v in target.options.items() if preset[f'rope_{k}'] != v})
    args.update({f'rope_{k}': v for k, v in target.usage.items() if v != USAGE[k]})
    cfg = {**{k: v for k, v in cfg.items() if k not in SOURCES}, 'architecture': name}
    for key, value in dict(pretrained_cfg=cfg, default_cfg=cfg, pretrained_model_args={}, _model_args=args).items():
        setattr(model, key, value)


def _twin(architecture: Any, encoding: str, models: Dict[str, Dict[str, Any]]) -> Optional[str]:
    """The registered model that differs from `architecture` in its encoding alone."""
    def others(args: Dict[str, Any]) -> Dict[str, Any]:
        return {k: v for k, v in args.items() if not k.startswith('rope_')}

    if architecture not in models:
        return None
    wanted = others(models[architecture])
    twins = (n for n, args in models.items() if args['rope_encoding'] == encoding and others(args) == wanted)
    return next(twins, None)


# -- state dicts

def _convert_state_dict(
        state_dict: Dict[str, Any], name: str, num_heads: Optional[int], options: Dict[str, Any]) -> Dict[str, Any]:
    prefix = encoding_prefix(state_dict)
    source = read_encoding(state_dict, prefix, num_heads)
    target = convert_rope(source, name, options, fold=True)
    basis = basis_of_pairs(source, target)
    device = state_dict[f'{prefix}signature'].device
    tensors = {f'{prefix}{k}': v.detach().to(device) for k, v in target.state_dict().items()}
    out = copy.copy(state_dict)  # keeps torch's `_metadata`
    out.clear()
    for key, value in state_dict.items():
        out.update(tensors if key.startswith(prefix) else {key: value})
    for layer, turn in enumerate([] if basis is None else basis):
        attention = f'{prefix.removesuffix("rope.")}blocks.{layer}.attn.'
        if f'{attention}q_norm.weight' in out:
            raise ValueError(_NORM.format(name))
        keys = [key for key in (f'{attention}qkv.weight', f'{attention}qkv.bias') if key in out]
        out.update({key: out[key].clone() for key in keys})
        fold(out[keys[0]], out.get(f'{attention}qkv.bias'), turn)
    return out
