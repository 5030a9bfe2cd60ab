"""Attention maps of any block, exact whatever kernel computes the attention, and what papers measure on them.

The queries and keys are taken where the attention itself takes them, after norms, rotation and scaling; nothing is
computed a second time by another formula. Works for every model of timm whose blocks are `blocks.N.attn`.
"""
import re
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ATTENTION = re.compile(r'(?:^|\.)blocks\.\d+\.attn$')


@dataclass
class AttentionMap:
    """What the queries of one block attend to.

    Attributes:
        name: Of the block, 'blocks.3' or 'layers.0.blocks.1'.
        weights: (B, H, N, N) after the softmax, queries first; B is images * windows in a Swin. float32 or float64.
        values: (B, H, N, D), what the weights are multiplied by.
        prefix: Tokens in front of the patches (class, registers).
        grid: (rows, columns) of the patches, or of the window.
        patch: (height, width) of a patch in pixels.
    """
    name: str
    weights: Tensor
    values: Tensor
    prefix: int
    grid: Tuple[int, int]
    patch: Tuple[int, int]


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor, layers: Optional[Sequence[int]] = None) -> List[AttentionMap]:
    """Run a model in evaluation mode and keep the attention of its blocks.

    Args:
        model: Any model of timm with self-attention in `blocks`; its mode and weights stay as they are.
        images: (B, C, H, W).
        layers: Which blocks, counted from 0 over all stages, negative from the end; all by default.

    Raises:
        ValueError: The model has no such blocks, or one of them computes its attention in another way.
    """
    model = getattr(model, '_orig_mod', model)  # a compiled model: its graph cannot be looked into
    blocks = [(name[:-len('.attn')], part) for name, part in model.named_modules() if ATTENTION.search(name)]
    if not blocks:
        raise ValueError(f'{type(model).__name__} has no attention in `blocks`, so there are no attention maps.')
    wanted = range(len(blocks)) if layers is None else layers
    for layer in wanted:
        if not isinstance(layer, int) or not -len(blocks) <= layer < len(blocks):
            raise ValueError(f'layers must be from {-len(blocks)} to {len(blocks) - 1}, got {layer!r}.')
    chosen = [blocks[layer] for layer in wanted]
    modes = {part: part.training for part in model.modules()}
    recorder = _Recorder()
    hooks: List[Any] = []
    for name, part in chosen:
        hooks.append(part.register_forward_pre_hook(lambda *_, name=name: recorder.begin(name)))
        hooks.append(part.register_forward_hook(lambda *_: recorder.end()))
    try:
        model.eval()
        with recorder:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
        for part, training in modes.items():
            part.training = training
    return [_described(model, part, name, recorder.found, images) for name, part in chosen]


class _Recorder(TorchFunctionMode):
    """Sees the attention of a block as it is computed: the fused function, or a softmax and the product after it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = ''  # whose attention runs now
        self.found: Dict[str, Tuple[Tensor, Tensor]] = {}
        self.weights: Optional[Tensor] = None  # after a softmax, until they are multiplied by the values

    def begin(self, name: str) -> None:
        self.block = name

    def end(self) -> None:
        self.block, self.weights = '', None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, '__name__', '')
        if self.block and self.block not in self.found:
            if name == 'scaled_dot_product_attention':
                self.found[self.block] = _weights(*args, **kwargs), args[2] if len(args) > 2 else kwargs['value']
            elif name == 'softmax':
                self.weights = out
            elif name in ('matmul', '__matmul__') and self.weights is not None:
                self.found[self.block], self.weights = (self.weights, args[1]), None
        return out


def _weights(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Optional[Tensor] = None,
        dropout_p: float = 0.,
        is_causal: bool = False,
        scale: Optional[float] = None,
        enable_gqa: bool = False,
) -> Tensor:
    """The weights inside scaled_dot_product_attention, by its definition, in float32 at least."""
    query, key = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key)]
    if key.shape[-3] != query.shape[-3]:  # grouped queries share their keys
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float('-inf'))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(dim=-1)


def _described(model: nn.Module, attn: nn.Module, name: str, found: Dict[str, Any], images: Tensor) -> AttentionMap:
    if name not in found:
        raise ValueError(f'{name}.attn ({type(attn).__name__}) has no softmax over its tokens, so no attention map.')
    weights, values = found[name]
    size = getattr(getattr(model, 'patch_embed', None), 'patch_size', 1)
    patch = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    stage = re.match(r'layers\.(\d+)\.', name)
    if stage is not None:  # a Swin: patches are merged from stage to stage
        patch = (patch[0] << int(stage[1]), patch[1] << int(stage[1]))
    tokens, window = weights.shape[-1], getattr(attn, 'window_size', None)
    prefix = 0 if window is not None else int(getattr(model, 'num_prefix_tokens', 0))
    rows, columns = [-(-side // each) for side, each in zip(images.shape[-2:], patch)] if window is None else window
    if rows * columns + prefix != tokens:
        raise ValueError(
            f'{name} attends to {tokens} tokens, which are not {prefix} and a grid of {rows} x {columns} patches.')
    return AttentionMap(name, weights, values, prefix, (int(rows), int(columns)), patch)


def mean_distance(each: AttentionMap) -> Tensor:
    """Mean attention distance of the heads in pixels: mean_i sum_j a_ij |p_i - p_j| (arXiv 2010.11929, appendix D.7).

    Patches alone: the weights of prefix tokens are left out and the others scaled to a sum of 1.

    Returns:
        (H,), averaged over images and windows.
    """
    weights = each.weights[..., each.prefix:, each.prefix:].double()
    weights = weights / weights.sum(-1, keepdim=True)
    places = torch.cartesian_prod(*(
        torch.arange(n, dtype=torch.float64, device=weights.device) * p for n, p in zip(each.grid, each.patch)))
    return (weights * torch.cdist(places, places, compute_mode='donot_use_mm_for_euclid_dist')).sum(-1).mean((0, 2))


def mean_entropy(each: AttentionMap) -> Tensor:
    """Mean attention entropy of the heads in nats: mean_i -sum_j a_ij ln a_ij; at most ln N.

    Queries are the patches, keys all tokens, those of the prefix too.

    Returns:
        (H,), averaged over images and windows.
    """
    weights = each.weights[..., each.prefix:, :].double()
    return -torch.special.xlogy(weights, weights).sum(-1).mean((0, 2))


def cls_map(each: AttentionMap) -> Tensor:
    """What the class token attends to among the patches, mean of the heads.

    Returns:
        (B, rows, columns).

    Raises:
        ValueError: The block has no token in front of the patches.
    """
    if each.prefix < 1:
        raise ValueError(f'{each.name} has no class token: ask for the map of a patch by query_map().')
    return each.weights[:, :, 0, each.prefix:].mean(1).unflatten(-1, each.grid)


def query_map(each: AttentionMap, row: int, column: int) -> Tensor:
    """What one patch attends to among the patches, mean of the heads.

    Returns:
        (B, rows, columns).

    Raises:
        ValueError: There is no such patch.
    """
    if not 0 <= row < each.grid[0] or not 0 <= column < each.grid[1]:
        raise ValueError(f'row and column must be in a grid of {each.grid}, got {row} and {column}.')
    query = each.prefix + row * each.grid[1] + column
    return each.weights[:, :, query, each.prefix:].mean(1).unflatten(-1, each.grid)
