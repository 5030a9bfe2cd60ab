"""Reading and writing rows of a tile in Triton, so that each row is held by one thread.

A row is WIDE elements, or 2, 4 or 16 times as many. Longer rows are read in pieces of WIDE: 16 bytes in a row for each
thread, joined in registers. One load of whole rows would spread each over several threads, and every product of a
matrix with a vector would have to exchange them.
"""
import triton
import triton.language as tl

# One function for each number of pieces: not every version of Triton takes a function that calls itself.


@triton.jit
def side_by_side(left, right, WIDTH: tl.constexpr, E: tl.constexpr):
    """Two (E, WIDTH) as (E, 2 * WIDTH)."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (E, 2 * WIDTH))


@triton.jit
def halves(rows, WIDTH: tl.constexpr, E: tl.constexpr):
    """The left and the right half of rows (E, 2 * WIDTH); takes apart what `side_by_side` has made."""
    return tl.split(tl.permute(tl.reshape(rows, (E, 2, WIDTH)), (0, 2, 1)))


@triton.jit
def load_1(start, mask, step, WIDE: tl.constexpr, E: tl.constexpr):
    return tl.reshape(tl.load(start, mask, other=0.).to(tl.float32), (E, WIDE))


@triton.jit
def store_1(start, rows, mask, WIDE: tl.constexpr, E: tl.constexpr):
    tl.store(start, tl.reshape(rows, (E * WIDE,)).to(start.dtype.element_ty), mask)


@triton.jit
def load_2(start, mask, step, WIDE: tl.constexpr, E: tl.constexpr):
    left = load_1(start, mask, step, WIDE, E)
    return side_by_side(left, load_1(start + WIDE * step, mask, step, WIDE, E), WIDE, E)


@triton.jit
def store_2(start, rows, mask, WIDE: tl.constexpr, E: tl.constexpr):
    left, right = halves(rows, WIDE, E)
    store_1(start, left, mask, WIDE, E)
    store_1(start + WIDE, right, mask, WIDE, E)


@triton.jit
def load_4(start, mask, step, WIDE: tl.constexpr, E: tl.constexpr):
    left = load_2(start, mask, step, WIDE, E)
    return side_by_side(left, load_2(start + 2 * WIDE * step, mask, step, WIDE, E), 2 * WIDE, E)


@triton.jit
def store_4(start, rows, mask, WIDE: tl.constexpr, E: tl.constexpr):
    left, right = halves(rows, 2 * WIDE, E)
    store_2(start, left, mask, WIDE, E)
    store_2(start + 2 * WIDE, right, mask, WIDE, E)


@triton.jit
def load_8(start, mask, step, WIDE: tl.constexpr, E: tl.constexpr):
    left = load_4(start, mask, step, WIDE, E)
    return side_by_side(left, load_4(start + 4 * WIDE * step, mask, step, WIDE, E), 4 * WIDE, E)


@triton.jit
def store_8(start, rows, mask, WIDE: tl.constexpr, E: tl.constexpr):
    left, right = halves(rows, 4 * WIDE, E)
    store_4(start, left, mask, WIDE, E)
    store_4(start + 4 * WIDE, right, mask, WIDE, E)


@triton.jit
def load_16(start, mask, step, WIDE: tl.constexpr, E: tl.constexpr):
    left = load_8(start, mask, step, WIDE, E)
    return side_by_side(left, load_8(start + 8 * WIDE * step, mask, step, WIDE, E), 8 * WIDE, E)


@triton.jit
def store_16(start, rows, mask, WIDE: tl.constexpr, E: tl.constexpr):
    left, right = halves(rows, 8 * WIDE, E)
    store_8(start, left, mask, WIDE, E)
    store_8(start + 8 * WIDE, right, mask, WIDE, E)


@triton.jit
def load_rows(start, mask, step, SIZE: tl.constexpr, WIDE: tl.constexpr, E: tl.constexpr):
    """(E, SIZE) in float32 from the pointers (E * WIDE,) to the first pieces of the groups."""
    if SIZE == WIDE:
        rows = load_1(start, mask, step, WIDE, E)
    elif SIZE == 2 * WIDE:
        rows = load_2(start, mask, step, WIDE, E)
    elif SIZE == 4 * WIDE:
        rows = load_4(start, mask, step, WIDE, E)
    else:
        rows = load_16(start, mask, step, WIDE, E)
    return rows


@triton.jit
def store_rows(start, rows, mask, SIZE: tl.constexpr, WIDE: tl.constexpr, E: tl.constexpr):
    """Inverse of `load_rows`, to consecutive elements."""
    if SIZE == WIDE:
        store_1(start, rows, mask, WIDE, E)
    elif SIZE == 2 * WIDE:
        store_2(start, rows, mask, WIDE, E)
    elif SIZE == 4 * WIDE:
        store_4(start, rows, mask, WIDE, E)
    else:
        store_16(start, rows, mask, WIDE, E)
