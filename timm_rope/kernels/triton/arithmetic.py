"""The arithmetic of the rotations on tiles in Triton, forward, transposed, and the gradient of the payload.

Shapes of tiles and payloads are in `tiles.py`; YX says of triplets that the roll by y acts first.
"""
import triton
import triton.language as tl

from .tiles import joined, parts


@triton.jit
def plane(a, b, cos, sin):
    """a, b turned counter-clockwise; with -sin turned back."""
    return a * cos - b * sin, a * sin + b * cos


@triton.jit
def plane_gradient(a_grad, b_grad, a, b):
    """Gradients of cos and sin of `plane` with the inputs a, b."""
    return a_grad * a + b_grad * b, b_grad * a - a_grad * b


@triton.jit
def turned(x, payload, KIND: tl.constexpr, YX: tl.constexpr):
    """A tile of queries or keys after the rotation: R x for every group."""
    if KIND == 'pairs':
        a, b = tl.split(x)
        cos, sin = tl.split(payload)
        a, b = plane(a, b, cos, sin)
        y = tl.join(a, b)
    elif KIND == 'triplets':
        a, b, c, empty = parts(x)
        cos_y, sin_y, cos_x, sin_x = parts(payload)
        if YX:
            b, c = plane(b, c, cos_y, sin_y)
            a, b = plane(a, b, cos_x, sin_x)
        else:
            a, b = plane(a, b, cos_x, sin_x)
            b, c = plane(b, c, cos_y, sin_y)
        y = joined(a, b, c, empty)
    else:
        y = tl.sum(payload * x[:, None, :], axis=2)
    return y


@triton.jit
def turned_back(y, payload, KIND: tl.constexpr, YX: tl.constexpr):
    """A tile before the rotation: R^T y for every group.

    The same turns gradients of the output into gradients of the input, and the output back into the input.
    """
    if KIND == 'pairs':
        a, b = tl.split(y)
        cos, sin = tl.split(payload)
        a, b = plane(a, b, cos, -sin)
        x = tl.join(a, b)
    elif KIND == 'triplets':
        a, b, c, empty = parts(y)
        cos_y, sin_y, cos_x, sin_x = parts(payload)
        if YX:
            a, b = plane(a, b, cos_x, -sin_x)
            b, c = plane(b, c, cos_y, -sin_y)
        else:
            b, c = plane(b, c, cos_y, -sin_y)
            a, b = plane(a, b, cos_x, -sin_x)
        x = joined(a, b, c, empty)
    else:
        x = tl.sum(payload * y[:, :, None], axis=1)
    return x


@triton.jit
def payload_gradient(grad, y, payload, KIND: tl.constexpr, YX: tl.constexpr):
    """Gradient of the payload from that of the output and the output y itself.

    Of the two factors of a triplet the last is peeled off first, from both.
    """
    if KIND == 'pairs':
        ga, gb = tl.split(grad)
        a, b = tl.split(turned_back(y, payload, KIND, YX))
        cos_grad, sin_grad = plane_gradient(ga, gb, a, b)
        out = tl.join(cos_grad, sin_grad)
    elif KIND == 'triplets':
        ga, gb, gc, _ = parts(grad)
        a, b, c, _ = parts(y)
        cos_y, sin_y, cos_x, sin_x = parts(payload)
        if YX:
            a, b = plane(a, b, cos_x, -sin_x)
            cos_x_grad, sin_x_grad = plane_gradient(ga, gb, a, b)
            ga, gb = plane(ga, gb, cos_x, -sin_x)
            b, c = plane(b, c, cos_y, -sin_y)
            cos_y_grad, sin_y_grad = plane_gradient(gb, gc, b, c)
        else:
            b, c = plane(b, c, cos_y, -sin_y)
            cos_y_grad, sin_y_grad = plane_gradient(gb, gc, b, c)
            gb, gc = plane(gb, gc, cos_y, -sin_y)
            a, b = plane(a, b, cos_x, -sin_x)
            cos_x_grad, sin_x_grad = plane_gradient(ga, gb, a, b)
        out = joined(cos_y_grad, sin_y_grad, cos_x_grad, sin_x_grad)
    else:
        x = turned_back(y, payload, KIND, YX)
        out = grad[:, :, None] * x[:, None, :]
    return out
