"""Window attention that turns queries and keys by their place in the window, and NAVER's choice of windows.

Both stand in for parts of timm's Swin block, which calls its attention with one window after another: after the cyclic
shift and the partition, so that neighbours in a window are neighbours in the image unless the mask separates them.
"""
from typing import Any, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor
from torch.jit import Final

from .._timm import WindowAttention
from .._tracing import recording
from ..encodings import RotaryEncoding
from ..kernels import owned, rotate, unpack


class RopeWindowAttention(WindowAttention):
    """timm's window attention with a rotation of queries and keys beside, or instead of, its relative position bias.

    A token is at (row, column) of its window, the same in every window: attention sees offsets within a window, not
    places in the image. Values are not rotated.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        rope: Encoding of this block, one layer deep; None for attention without rotation.
        rel_pos_bias: Add a learned bias per head and offset to the scores, as Swin Transformer.
        head_dim: Channels per head; None for dim // num_heads.
        window_size: (rows, columns).
        qkv_bias: Bias of queries, keys and values.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout of the output.
        device: Device of all tensors.
        dtype: Dtype of all tensors but the encoding's.

    Attributes:
        rope: The encoding; its reference grid is the window the weights were trained with.
        relative_position_bias_table: As timm's, or None.
    """
    rel_pos_bias: Final[bool]

    def __init__(
            self,
            dim: int,
            num_heads: int,
            rope: Optional[RotaryEncoding] = None,
            rel_pos_bias: bool = False,
            head_dim: Optional[int] = None,
            window_size: Union[int, Tuple[int, int]] = 7,
            qkv_bias: bool = True,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        super().__init__(
            dim, num_heads, head_dim, window_size, qkv_bias, attn_drop, proj_drop, device=device, dtype=dtype)
        self.rel_pos_bias = rel_pos_bias
        if not rel_pos_bias:
            self.register_parameter('relative_position_bias_table', None)
            self.register_buffer('relative_position_index', None, persistent=False)
        self.rope = rope

    @classmethod
    def of(cls, attention: WindowAttention, rope: Optional[RotaryEncoding], rel_pos_bias: bool) -> Any:
        """An attention with the layers of another one, which are initialised already; that one is used up."""
        out = cls(
            attention.dim, attention.num_heads, rope, rel_pos_bias,
            attention.proj.in_features // attention.num_heads, attention.window_size, attention.qkv.bias is not None,
            device='meta')
        for name, module in attention.named_children():
            setattr(out, name, module)
        if rel_pos_bias:
            out.relative_position_bias_table = attention.relative_position_bias_table
            out.relative_position_index = attention.relative_position_index
        return out

    def reset_parameters(self) -> None:
        """Initialise the bias and its index, if there is a bias."""
        if self.relative_position_bias_table is not None:
            super().reset_parameters()

    def _init_buffers(self) -> None:
        if self.relative_position_index is not None:
            super()._init_buffers()

    def set_window_size(self, window_size: Tuple[int, int]) -> None:
        """Change the window; a bias is interpolated. The reference grid stays: it belongs to the weights."""
        if self.relative_position_bias_table is not None:
            with torch.device('cpu'):  # where timm interpolates a bias, whatever the default is
                super().set_window_size(window_size)
        else:
            self.window_size = to_2tuple(window_size)
            self.window_area = self.window_size[0] * self.window_size[1]

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Attend within windows.

        Args:
            x: Tokens of the windows, (images * windows, N, C), N = rows * columns, row-major.
            mask: Added to the scores, (windows, N, N), or None.

        Returns:
            Same shape as `x`.
        """
        windows = x.shape[0]
        qkv = self.qkv(x)
        if self.rope is None:
            q, k, v = unpack(qkv, self.num_heads)
        else:
            payload = self.rope(window_grid(x, self.window_size[0], self.window_size[1]))[0]
            if torch.jit.is_scripting():
                q, k, v = unpack(qkv, self.num_heads)
                q, k = self.rope.rotation(q, payload), self.rope.rotation(k, payload)
            else:
                q, k, v = rotate(owned(qkv, self.qkv), payload, self.rope.rotation, self.num_heads)
            if self.rope.log_n:
                q = q * self.rope.score_scale(self.window_size[0] * self.window_size[1])

        added: Optional[Tensor] = None  # to the scores: (1 or windows of an image, heads or 1, N, N)
        if self.rel_pos_bias:
            added = self._get_rel_pos_bias()
        if mask is not None:
            mask = mask.unsqueeze(1)
            added = mask if added is None else added + mask

        if self.fused_attn:
            if added is not None and mask is not None:
                added = added.repeat(windows // mask.shape[0], 1, 1, 1)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=added, dropout_p=self.attn_drop.p if self.training else 0., scale=self.scale)
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            if added is not None:
                scores = (scores.unflatten(0, [-1, added.shape[0]]) + added).flatten(0, 1)
            out = self.attn_drop(self.softmax(scores)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


@torch.fx.wrap
def window_grid(x: Tensor, height: int, width: int) -> Tuple[int, int]:
    """Grid of a window for the encoding.

    One node in a traced graph, so that the payloads are computed in the graph and not frozen into it.
    """
    return height, width


class AnySizeWindowBlock(SwinTransformerBlock):
    """timm's Swin block with a mask of the shifted windows for every image that comes.

    timm fixes the mask when the model is built, or makes it anew in every forward. Here the mask of the nominal size
    is kept, and only an image of another size has one made.
    """
    input_resolution: Tuple[int, int]  # said for mypy; set by timm's constructor
    attn_mask: Optional[Tensor]

    def _init_buffers(self) -> None:
        weight: Any = self.norm1.weight
        self.register_buffer(
            'attn_mask', self.get_attn_mask(device=weight.device, dtype=weight.dtype), persistent=False)

    def get_attn_mask(
            self,
            x: Optional[Tensor] = None,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
    ) -> Optional[Tensor]:
        """Mask of the shifted windows, (windows of an image, N, N) with N = rows * columns; None without a shift.

        Args:
            x: An image that is cut into windows, (B, H, W, C); None for the nominal size.
            device: Of the mask, where there is no `x`.
            dtype: Of the mask, where there is no `x`.
        """
        if not any(self.shift_size):
            return None
        height, width = self.input_resolution
        rows = -(-height // self.window_size[0]) * self.window_size[0]
        columns = -(-width // self.window_size[1]) * self.window_size[1]
        if x is None:
            mask = shifted_mask(rows, columns, self.window_size, self.shift_size, device)
            return mask if dtype is None else mask.to(dtype)  # older releases of timm do not say it, and cast it
        return mask_of(x, self.attn_mask, (rows, columns), self.window_size, self.shift_size)


@torch.fx.wrap
def mask_of(
        x: Tensor,
        nominal: Optional[Tensor],
        nominal_size: Tuple[int, int],
        window: Tuple[int, int],
        shift: Tuple[int, int],
) -> Tensor:
    """Mask of the shifted windows of an image: that of the nominal size where it fits, else a new one.

    One node in a traced graph, so that the graph takes images of any size.

    Args:
        x: The image, padded to whole windows, (B, H, W, C).
        nominal: Mask of an image of the nominal size.
        nominal_size: (rows, columns) of it, whole windows.
        window: (rows, columns).
        shift: (rows, columns) by which the image was moved before it is cut.
    """
    if nominal is not None and (torch.jit.is_scripting() or not recording()):  # a recording must hold for every size
        if (x.shape[1], x.shape[2]) == nominal_size:
            return nominal
    return shifted_mask(x.shape[1], x.shape[2], window, shift, x.device).to(x.dtype)


def shifted_mask(
        rows: int,
        columns: int,
        window: Tuple[int, int],
        shift: Tuple[int, int],
        device: Optional[torch.device],
) -> Tensor:
    """-100 where two patches of a window come from opposite sides of the image, else 0, (windows, N, N).

    The image was moved up and left, around its edges: its last `shift` rows and columns are those of the other side.
    """
    lower = torch.arange(rows, device=device).view(-1, window[0]) >= rows - shift[0]
    right = torch.arange(columns, device=device).view(-1, window[1]) >= columns - shift[1]
    apart_in_rows = lower.unsqueeze(2) != lower.unsqueeze(1)  # (windows of a column, rows, rows)
    apart_in_columns = right.unsqueeze(2) != right.unsqueeze(1)
    apart = apart_in_rows[:, None, :, None, :, None] | apart_in_columns[None, :, None, :, None, :]
    area = window[0] * window[1]
    return torch.zeros_like(apart, dtype=torch.float32).masked_fill(apart, -100.).view(-1, area, area)


class NaverWindowBlock(AnySizeWindowBlock):
    """timm's Swin block with NAVER's rule for windows: where the shorter side fits in a window, nothing is shifted.

    The window is then a square of that side. timm decides for each axis apart: along an axis that fits, the window
    spans the image and is not shifted; along the other it is. Both rules agree on square images.
    """

    def _calc_window_shift(self, target_window_size, target_shift_size=None):
        window_size, shift_size = super()._calc_window_shift(target_window_size, target_shift_size)
        height, width = to_2tuple(self.input_resolution)
        # timm has cut the window to the image, so a side that fits is one that the window reaches
        if not self.always_partition and (height <= window_size[0] or width <= window_size[1]):
            return (min(height, width), min(height, width)), (0, 0)
        return window_size, shift_size
