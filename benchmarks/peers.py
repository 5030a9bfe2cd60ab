"""Models by name, for the benchmarks, and the peer that rotates as the papers' published implementations do.

A model is written `NAME[,ARGUMENT=VALUE ...]`. `naive:NAME` is our model NAME with another attention: queries and keys
are rotated one after the other and out of place, the class token is split off and concatenated again, pairs turn as
complex numbers by way of float32 (RoPE-ViT, arXiv 2403.13298), matrices are applied by einsum (LieRE, arXiv 2406.10322;
no code of Spherical RoPE, arXiv 2511.08368, is published, so its 3 x 3 matrices are taken literally). Learned
frequencies become tables or matrix exponentials, in float32, in every forward pass.
"""
import argparse
import ast
from typing import Any, Dict, NamedTuple, Optional, Tuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_rope.encodings import RotaryEncoding
from timm_rope.positions.coordinates import grid_axes
from timm_rope.rotations import BlockRotation, PairRotation, TripletRotation

NAIVE = 'naive:'


class Spec(NamedTuple):
    """A name with arguments, as written on the command line."""
    text: str
    name: str
    options: Dict[str, Any]


def parse_options(text: str) -> Spec:
    """Split `NAME[,ARGUMENT=VALUE ...]`; values are Python literals, else text."""
    name, *items = text.split(',')
    options = {}
    for item in items:
        key, equals, value = item.partition('=')
        if not key.isidentifier() or not equals:
            raise argparse.ArgumentTypeError(f'must be NAME or NAME,ARGUMENT=VALUE with more of these, got {text!r}')
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return Spec(text, name, options)


def model_spec(text: str) -> Spec:
    """Spec of a model that timm knows."""
    spec = parse_options(text)
    name = spec.name.removeprefix(NAIVE)
    if not timm.is_model(name):
        raise argparse.ArgumentTypeError(f'timm knows no model {name!r}; `python -m timm_rope list` prints ours')
    if name != spec.name and not (
            timm.model_entrypoint(name).__module__ == 'timm_rope.models.rope_vit' and '_rope_' in name):
        raise argparse.ArgumentTypeError(f'{NAIVE} needs one of our rotary ViTs, vit_*_rope_*, got {text!r}')
    return spec


def build(spec: Spec, size: int, device: torch.device, dtype: torch.dtype = torch.float32, **kwargs: Any) -> nn.Module:
    """Create the model for square images of `size` pixels; `kwargs` override the arguments of the spec."""
    name = spec.name.removeprefix(NAIVE)
    with torch.device(device):
        model = timm.create_model(name, img_size=size, **{**spec.options, **kwargs})
    model = model.to(device, dtype)
    return make_naive(model) if spec.name != name else model


def check_models(specs: Any, sizes: Any, **kwargs: Any) -> None:
    """Build every model in every size without giving it memory.

    Raises:
        ValueError: One cannot be built; says which and why.
    """
    for spec in specs:
        for size in sizes:
            try:
                build(spec, size, torch.device('meta'), **kwargs)
            except Exception as error:
                raise ValueError(f'{spec.text} cannot be built for {size} pixels: {error}') from error


def tokens_of(model: nn.Module) -> Optional[Tuple[int, int]]:
    """Tokens, prefix included, and channels of the blocks of a ViT; None for a model of another shape."""
    if not hasattr(model, 'blocks'):
        return None
    rows, columns = model.patch_embed.grid_size
    return model.num_prefix_tokens + rows * columns, model.embed_dim


# -- the naive rotation

def make_naive(model: nn.Module) -> nn.Module:
    """Give every block of one of our ViTs the naive attention, with the frequencies it has."""
    rope, model.rope = model.rope, None
    turn = NAIVE_ROTATIONS.get(type(rope.rotation))
    if turn is None:
        raise ValueError(f'there is no naive form of {type(rope.rotation).__name__}')
    for i, block in enumerate(model.blocks):
        naive = turn(rope, i, model.patch_embed.grid_size, model.num_prefix_tokens)
        block.attn = NaiveAttention(block.attn, naive)
    return model


class NaiveAttention(nn.Module):
    def __init__(self, attention: nn.Module, turn: 'NaiveRotation') -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.qkv, self.proj, self.turn = attention.qkv, attention.proj, turn

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False, *ours: Any) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.turn(q), self.turn(k)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        return self.proj(out.transpose(1, 2).reshape(B, N, C))


class NaiveRotation(nn.Module):
    """Rotation of one layer on one grid.

    `freqs` is (2, H, G) or, of blocks, (2, H, G, b (b - 1) / 2). Tables of fixed frequencies are made once; they are no
    buffers, which a cast of the model would round.
    """

    def __init__(self, rope: RotaryEncoding, layer: int, grid: Tuple[int, int], prefix: int) -> None:
        super().__init__()
        freqs = rope.frequencies().detach()
        self.freqs = nn.Parameter(freqs[:, layer % freqs.shape[1]].clone(), requires_grad=rope.learned)
        y, x = grid_axes(list(grid), rope.reference_grid, rope.freqs, rope.coords, rope.span, rope.centered)
        self.y = y.float().repeat_interleave(grid[1])  # (N,), row-major
        self.x = x.float().repeat(grid[0])
        self.prefix, self.rotated, self.size = prefix, rope.rotation.rotated, rope.rotation.size
        self.order = getattr(rope.rotation, 'order', '')
        self.fixed = None if rope.learned else self.table()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            table = self.table() if self.fixed is None else self.fixed
            groups = x[:, :, self.prefix:, :self.rotated].float().unflatten(-1, (-1, self.size))
            turned = self.apply_table(groups, table).flatten(-2).type_as(x)
            if self.rotated < x.shape[-1]:
                turned = torch.cat((turned, x[:, :, self.prefix:, self.rotated:]), dim=-1)
            return torch.cat((x[:, :, :self.prefix], turned), dim=2)

    def angles(self) -> Tuple[Tensor, Tensor]:
        """w_x x and w_y y, (H, N, G) each."""
        return self.x[:, None] * self.freqs[0].unsqueeze(1), self.y[:, None] * self.freqs[1].unsqueeze(1)

    def table(self) -> Tensor:
        """What is left to do at each position, (H or 1, N, G) or (H or 1, N, G, b, b)."""
        raise NotImplementedError

    def apply_table(self, groups: Tensor, table: Tensor) -> Tensor:
        """Turn (B, H, N, G, size) in float32."""
        return torch.einsum('hngij,bhngj->bhngi', table.expand(groups.shape[1], -1, -1, -1, -1), groups)


class NaivePairs(NaiveRotation):
    def table(self) -> Tensor:
        along_x, along_y = self.angles()
        angle = along_x + along_y
        return torch.polar(torch.ones_like(angle), angle)

    def apply_table(self, groups: Tensor, table: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(groups.contiguous()) * table)


class NaiveTriplets(NaiveRotation):
    def table(self) -> Tensor:
        yaw, roll = self.angles()
        zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
        cos, sin = yaw.cos(), yaw.sin()
        by_x = torch.stack((cos, -sin, zero, sin, cos, zero, zero, zero, one), dim=-1).unflatten(-1, (3, 3))
        cos, sin = roll.cos(), roll.sin()
        by_y = torch.stack((one, zero, zero, zero, cos, -sin, zero, sin, cos), dim=-1).unflatten(-1, (3, 3))
        return by_x @ by_y if self.order == 'yx' else by_y @ by_x


class NaiveBlocks(NaiveRotation):
    def table(self) -> Tensor:
        upper = torch.triu_indices(self.size, self.size, 1, device=self.freqs.device)
        generators = self.freqs.new_zeros(*self.freqs.shape[:-1], self.size, self.size)
        generators[..., upper[0], upper[1]] = self.freqs
        generators = (generators - generators.mT).unsqueeze(2)  # (2, H, 1, G, b, b)
        along_x, along_y = self.x[:, None, None, None] * generators[0], self.y[:, None, None, None] * generators[1]
        return torch.linalg.matrix_exp(along_x + along_y)


NAIVE_ROTATIONS = {PairRotation: NaivePairs, TripletRotation: NaiveTriplets, BlockRotation: NaiveBlocks}
