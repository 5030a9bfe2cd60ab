"""What the shapes of weights tell about the model they belong to.

In come recognised weights, out come constructor arguments: width, depth, patch, classes, and the image size, where a
position embedding or a reference grid tells it.
"""
from typing import Any, Dict, Optional, Tuple

from torch import Tensor

from ...encodings._signature import parse_signature, read_signature
from ...positions.coordinates import Grid, read_grid, square_grid
from ...weights.layouts import NaverVit, TimmEva, Weights, is_trained
from ...weights.layouts.base import count_blocks


def read_sizes(weights: Weights) -> Dict[str, Any]:
    """Constructor arguments that show in keys and shapes."""
    tensors = weights.tensors
    stem, head = tensors['patch_embed.proj.weight'], tensors.get('head.weight', tensors.get('head.fc.weight'))
    if stem.ndim != 4:
        raise ValueError(f'patch_embed.proj.weight must be of a convolution (4 axes), got {tuple(stem.shape)}.')
    patch = tuple(stem.shape[2:])
    args: Dict[str, Any] = dict(
        embed_dim=stem.shape[0], in_chans=stem.shape[1], patch_size=patch[0] if patch[0] == patch[1] else patch,
        num_classes=0 if head is None else head.shape[0])
    if staged(weights):
        stages = [count_blocks(tensors, f'layers.{i}.blocks.') for i in range(count_blocks(tensors, 'layers.'))]
        heads = tuple(filter(None, (_heads_of(tensors, f'layers.{i}.blocks.0.attn.') for i in range(len(stages)))))
        bias = any(key.endswith('relative_position_bias_table') for key in tensors)
        return {**args, **(dict(num_heads=heads) if len(heads) == len(stages) else {}), 'depths': tuple(stages),
                **(dict(rel_pos_bias=True) if bias else {})}
    args.update(
        depth=count_blocks(tensors, 'blocks.'), class_token='cls_token' in tensors,
        qkv_bias='blocks.0.attn.qkv.bias' in tensors, qk_norm='blocks.0.attn.q_norm.weight' in tensors,
        pre_norm='norm_pre.weight' in tensors)
    if 'blocks.0.mlp.fc1.weight' in tensors:
        args['mlp_ratio'] = tensors['blocks.0.mlp.fc1.weight'].shape[0] / stem.shape[0]
    if 'reg_token' in tensors:
        args['reg_tokens'] = tensors['reg_token'].shape[1]
    if 'blocks.0.ls1.gamma' not in tensors:
        args['init_values'] = 0
    if 'fc_norm.weight' in tensors:
        args['global_pool'] = 'avg'
    return args


def _heads_of(tensors: Dict[str, Tensor], attention: str) -> int:
    """Heads of one attention of a Swin as its encoding tells them, 0 if it does not."""
    _, options = parse_signature(read_signature(tensors.get(f'{attention}rope.signature')) or '') or ('', {})
    head_dim = options.get('head_dim', '')
    if head_dim.isdigit():
        return tensors[f'{attention}qkv.weight'].shape[0] // (3 * int(head_dim))
    freqs = tensors.get(f'{attention}rope.freqs')  # older weights; (2, 1, heads, ...)
    return 0 if freqs is None else freqs.shape[2]


def staged(weights: Weights) -> bool:
    """Whether the model has stages, as Swin."""
    return any(key.startswith('layers.0.blocks.0.') for key in weights.tensors)


def has_ape(weights: Weights) -> bool:
    """Whether there is a position embedding that was trained."""
    pos_embed = weights.tensors.get('pos_embed')
    if pos_embed is None:
        return False
    # some of NAVER's files carry an embedding that their model never used
    return weights.layout not in (NaverVit.name, TimmEva.name) or is_trained(pos_embed)


def positions(
        weights: Weights,
        known: Dict[str, Any],
        img_size: Optional[Tuple[int, int]],
        config_size: Any,
        assumed: Dict[str, str],
) -> Dict[str, Any]:
    """Image size, and whether the position embedding starts with the prefix tokens.

    Args:
        weights: What the checkpoint is.
        known: All other constructor arguments.
        img_size: What the user says.
        config_size: `input_size` of a config.json.
        assumed: Takes what no source says.

    Returns:
        `img_size`, `no_embed_class`, of a Swin `window_size`.

    Raises:
        ValueError: The position embedding is of another size than the user says, or of no known one.
    """
    stem = weights.tensors['patch_embed.proj.weight']
    patch = stem.shape[2], stem.shape[3]
    out: Dict[str, Any] = {}
    window = _saved_grid(weights, 'layers.0.blocks.0.attn.rope.reference_grid')
    if window is not None and not {'window_size', 'window_ratio'} & set(known):
        out['window_size'] = window[0] if window[0] == window[1] else window
    grid = _saved_grid(weights, 'rope.reference_grid')
    if known.get('pos_embed') == 'learn' and 'pos_embed' in weights.tensors:
        tokens = weights.tensors['pos_embed'].shape[1]
        prefix = int(known.get('class_token', True)) + known.get('reg_tokens', 0)
        asked, configured = (
            (size[-2] // patch[0], size[-1] // patch[1]) if size else None for size in (img_size, config_size))
        saved = _saved_grid(weights, 'pos_embed_grid')
        found = next((
            (each, each[0] * each[1] != tokens)
            for each in (saved, asked, grid, configured, square_grid(tokens), square_grid(tokens - prefix))
            if each is not None and tokens in (each[0] * each[1], each[0] * each[1] + prefix)), None)
        if found is None or (asked is not None and asked != found[0]):
            is_of = f'{found[0][0]} x {found[0][1]} patches' if found else f'{tokens} tokens, no square'
            raise ValueError(
                f'img_size must be that of the position embedding, which is of {is_of} of {patch[0]} x {patch[1]} '
                f'pixels, got {img_size}.')
        grid, img_size = found[0], (found[0][0] * patch[0], found[0][1] * patch[1])
        if 'no_embed_class' not in known:
            out['no_embed_class'] = not found[1]
    if img_size is None and known.get('img_size') is None:
        if grid is not None:
            img_size = grid[0] * patch[0], grid[1] * patch[1]
        elif config_size is not None:
            img_size = tuple(config_size[-2:])  # type: ignore[assignment]
        elif window is not None:
            img_size = 32 * window[0], 32 * window[1]
            assumed['image size'] = f'{img_size[0]} x {img_size[1]}, 32 times the window as in the models here'
        else:
            img_size = (224, 224)
            assumed['image size'] = '224 x 224'
    if img_size is not None:
        out['img_size'] = img_size[0] if img_size[0] == img_size[1] else img_size
    return out


def _saved_grid(weights: Weights, key: str) -> Optional[Grid]:
    grid = weights.tensors.get(key)
    return None if grid is None else read_grid(grid, key)
