"""Tiles of channel groups in Triton: where they lie, how they are read and written.

A tile is E consecutive groups of an image, counted through tokens, heads and the groups of a head. In registers it is
(E, 2) for pairs, (E, 2, 2) with an empty place for triplets and (E, SIZE) for blocks; its payload is (E, 2), (E, 2, 2)
and (E, SIZE, SIZE). One thread holds whole groups, so that the arithmetic exchanges nothing between threads; only
blocks of 16, with 256 numbers in a matrix, are spread over several. Triplets are exchanged when they are written.
"""
import triton
import triton.language as tl

from .pieces import load_rows, store_rows


@triton.jit
def places(tile, tokens, HEADS: tl.constexpr, GROUPS: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
           E: tl.constexpr):
    """Token, head, place in the head and mask of the first WIDE elements of E groups that are STEP elements apart.

    The three are 64 bit numbers: with the strides of a large batch their products pass 2^31.
    """
    flat = tile * (E * WIDE) + tl.arange(0, E * WIDE)
    mask = flat < tokens * HEADS * GROUPS * WIDE
    if WIDE == STEP:  # the same numbers as below, in a form that shows the compiler how far addresses are contiguous
        row = flat // (GROUPS * WIDE)
        place = flat % (GROUPS * WIDE)
    else:
        row = flat // WIDE // GROUPS
        place = flat // WIDE % GROUPS * STEP + flat % WIDE
    return (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64), place.to(tl.int64), mask


@triton.jit
def joined(a, b, c, d):
    """Four tiles (E,) as one (E, 2, 2), with a and b in the first row. `parts` takes it apart."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def parts(tile):
    """The four tiles (E,) that `joined` has put into one (E, 2, 2)."""
    left, right = tl.split(tile)
    a, c = tl.split(left)
    b, d = tl.split(right)
    return a, b, c, d


@triton.jit
def load_groups(start, mask, step, KIND: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, E: tl.constexpr):
    """A tile of queries, keys or their gradients in float32; channels are `step` elements apart."""
    if KIND == 'triplets':
        a = tl.load(start, mask, other=0.).to(tl.float32)
        b = tl.load(start + step, mask, other=0.).to(tl.float32)
        c = tl.load(start + 2 * step, mask, other=0.).to(tl.float32)
        groups = joined(a, b, c, tl.zeros_like(a))
    else:
        groups = load_rows(start, mask, step, SIZE, WIDE, E)
    return groups


@triton.jit
def store_groups(start, groups, mask, KIND: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, E: tl.constexpr):
    """Write a tile to consecutive channels, in the type of the memory."""
    if KIND == 'triplets':
        # If each thread wrote its three channels one after the other, the memory would get every sector three times, a
        # third of it each time: 2.4 times the time of pairs on an H100. So neighbours write neighbouring channels.
        channel = tl.arange(0, 4)
        rows = tl.reshape(groups, (E, 4)).to(start.dtype.element_ty)
        tl.store(start[:, None] + channel[None, :], rows, mask[:, None] & (channel[None, :] < 3))
    else:
        store_rows(start, groups, mask, SIZE, WIDE, E)


@triton.jit
def load_payload(start, mask, KIND: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
                 E: tl.constexpr):
    """The payload of a tile: cos and sin; cos_y, sin_y, cos_x and sin_x; or matrices."""
    if KIND == 'triplets':
        payload = joined(
            tl.load(start, mask, other=0.), tl.load(start + GROUPS, mask, other=0.),
            tl.load(start + 2 * GROUPS, mask, other=0.), tl.load(start + 3 * GROUPS, mask, other=0.))
    elif KIND == 'pairs':
        payload = load_rows(start, mask, 1, 2, WIDE, E)
    else:
        payload = tl.reshape(load_rows(start, mask, 1, SIZE * SIZE, WIDE, E), (E, SIZE, SIZE))
    return payload


@triton.jit
def store_payload(start, payload, mask, KIND: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
                  WIDE: tl.constexpr, E: tl.constexpr):
    """Write the gradient of a payload as `load_payload` reads one."""
    if KIND == 'triplets':
        cos_y, sin_y, cos_x, sin_x = parts(payload)
        tl.store(start, cos_y, mask)
        tl.store(start + GROUPS, sin_y, mask)
        tl.store(start + 2 * GROUPS, cos_x, mask)
        tl.store(start + 3 * GROUPS, sin_x, mask)
    elif KIND == 'pairs':
        store_rows(start, payload, mask, 2, WIDE, E)
    else:
        store_rows(start, tl.reshape(payload, (E, SIZE * SIZE)), mask, SIZE * SIZE, WIDE, E)
