"""Encodings by name."""
from typing import Any, List

from ..positions.coordinates import Grid
from ._base import ENCODINGS, RotaryEncoding


def list_ropes() -> List[str]:
    """Names of all encodings, sorted."""
    return sorted(ENCODINGS)


def create_rope(
        name: str,
        head_dim: int = 64,
        num_heads: int = 6,
        depth: int = 12,
        reference_grid: Grid = (14, 14),
        device=None,
        dtype=None,
        **options: Any,
) -> RotaryEncoding:
    """Create a rotary encoding, usable without timm.

    Args:
        name: One of `list_ropes()`.
        head_dim: Channels per attention head.
        num_heads: Attention heads.
        depth: Blocks of the model; calling the encoding gives one payload for each.
        reference_grid: (rows, columns) of patches the weights are trained on; (tokens,) for sequences, (frames, rows,
            columns) for videos and volumes.
        device: Device of its tensors.
        dtype: float32 or float64; lower precisions are raised to float32.
        **options: Options of the encoding (`ENCODINGS[name].option_defaults()`), and `scaling`, `log_n`, `shift`,
            `jitter` and `rescale` of `RotaryEncoding`; all with or without the prefix `rope_` under which the models
            take them.

    Returns:
        Module: `rope(grid_size)` gives the payloads, `rope.rotate(x, payload)` turns (batch, heads, N, head_dim).

    Raises:
        ValueError: Unknown encoding, an option it does not take, or a value out of range.
        TypeError: An option that no encoding takes.
    """
    if name not in ENCODINGS:
        raise ValueError(f'Unknown rotary encoding {name!r}; known are {", ".join(list_ropes())}.')
    plain = {}
    for key, value in options.items():
        key = key.removeprefix('rope_')
        if key in plain:
            raise TypeError(f'Option {key!r} was given twice, with and without the prefix rope_.')
        plain[key] = value
    return ENCODINGS[name](head_dim, num_heads, depth, reference_grid, device=device, dtype=dtype, **plain)
