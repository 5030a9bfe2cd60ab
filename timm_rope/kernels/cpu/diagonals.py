"""Small groups of channels by the diagonals of their matrices.

The rotation of a whole row of heads is a band matrix: with groups of b channels it has at most 2 b - 1 diagonals, and
a row times it is the sum of as many products of a diagonal with the row shifted along it. So all loops run over whole
rows of H * D numbers; loops over groups of three would spend their time starting.
"""
from typing import Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor

from ...rotations.formulas import BlockRotation, Rotation, TripletRotation
from .derived_cache import cached_table

Matrix = List[List[Optional[Tensor]]]  # [row][column] -> (H or 1, N, G), None for zero
Diagonals = Dict[int, Tensor]  # shift -> (N, H * D)

BY_IMAGE = True
LARGEST = 4  # channels of a group; beyond, batched products are faster
PIECE = 160 * 1024  # numbers that are worked on at a time, so that they and the table stay in the cache of a core


def supports(packed: Tensor, payload: Tensor, rotation: Rotation) -> bool:
    # where each image has its own payload, making the diagonals costs as much as the formula
    return (
        isinstance(rotation, (TripletRotation, BlockRotation)) and payload.ndim == 3
        and rows_are_whole(packed[:, :, 0]))


def turn_(packed: Tensor, payload: Tensor, rotation: Rotation) -> None:
    diagonals = cached_table(payload, diagonals_of, rotation, packed.shape[3], False)
    x = packed[:, :, :2].flatten(3)
    for image, tokens in pieces(x):
        piece = x[image, tokens]
        piece.copy_(times(piece, diagonals, tokens, torch.empty_like(piece)))


def turn_back(
        dq: Tensor, dk: Tensor, dv: Tensor, payload: Tensor, rotation: Rotation,
        q: Optional[Tensor], k: Optional[Tensor], payload_grad: bool,
) -> Tuple[Tensor, Optional[Tensor]]:
    B, H, N, D = dv.shape
    out = dv.new_empty(B, N, 3, H, D)
    out[:, :, 2].copy_(dv.transpose(1, 2))
    diagonals = cached_table(payload, diagonals_of, rotation, H, True)
    sums = {shift: payload.new_zeros(N, H * D) for shift in range(1 - rotation.size, rotation.size)}
    for i, (grad, turned) in enumerate(((dq, q), (dk, k))):
        grad = rows(grad)
        target = out[:, :, i].flatten(2)
        for image, tokens in pieces(grad):
            piece = grad[image, tokens]
            times(piece, diagonals, tokens, target[image, tokens])
            if payload_grad and turned is not None:
                y = rows(turned)[image, tokens]
                for shift, total in sums.items():
                    to, along = shifted(shift)
                    total[tokens, to].addcmul_(piece[..., to], y[..., along])
    return out, payload_gradient(sums, payload, rotation, H) if payload_grad else None


def times(x: Tensor, diagonals: Diagonals, tokens: slice, out: Tensor) -> Tensor:
    """Matrices of a range of tokens times x (tokens, ..., H * D)."""
    def of_rows(diagonal: Tensor) -> Tensor:
        return diagonal[tokens].unsqueeze(1) if x.ndim == 3 else diagonal[tokens]

    torch.mul(x, of_rows(diagonals[0]), out=out)
    for shift, diagonal in diagonals.items():
        if shift:
            to, along = shifted(shift)
            out[..., to].addcmul_(x[..., along], of_rows(diagonal)[..., to])
    return out


def payload_gradient(sums: Diagonals, payload: Tensor, rotation: Rotation, num_heads: int) -> Tensor:
    """Gradient of the payload from the diagonals of g y^T: with y = R x it is g x^T = (g y^T) R for every group."""
    b = rotation.size
    products = {
        shift: total.unflatten(-1, (num_heads, -1))[..., :rotation.rotated].transpose(0, 1)
        for shift, total in sums.items()}
    if payload.shape[0] == 1:
        products = {shift: total.sum(0, keepdim=True) for shift, total in products.items()}
    with torch.enable_grad():
        leaf = payload.detach().requires_grad_()
        matrix = matrix_of(leaf, rotation)
        outputs, grads = [], []
        for i, row in enumerate(matrix):
            for j, entry in enumerate(row):
                if entry is not None:
                    terms = [products[m - i][..., i::b] * matrix[m][j] for m in range(b) if matrix[m][j] is not None]
                    outputs.append(entry)
                    grads.append(torch.stack(terms).sum(0).detach())
        return torch.autograd.grad(outputs, leaf, grads)[0]


def matrix_of(payload: Tensor, rotation: Rotation) -> Matrix:
    """Entries of the matrices that a payload (H or 1, N, W) stands for."""
    if isinstance(rotation, TripletRotation):
        cos_y, sin_y, cos_x, sin_x = payload.unflatten(-1, (4, rotation.groups)).unbind(-2)
        if rotation.order == 'yx':
            return [
                [cos_x, -cos_y * sin_x, sin_y * sin_x], [sin_x, cos_y * cos_x, -sin_y * cos_x], [None, sin_y, cos_y]]
        return [[cos_x, -sin_x, None], [sin_x * cos_y, cos_x * cos_y, -sin_y], [sin_x * sin_y, cos_x * sin_y, cos_y]]
    b = rotation.size
    return [[payload[..., b * i + j::b * b] for j in range(b)] for i in range(b)]


def diagonals_of(payload: Tensor, rotation: Rotation, num_heads: int, back: bool) -> Diagonals:
    """Diagonals of the matrices, or of their transposes, repeated for heads that share them."""
    matrix, b = matrix_of(payload, rotation), rotation.size
    if back:
        matrix = [[matrix[j][i] for j in range(b)] for i in range(b)]
    tokens = payload.shape[1]
    out = {}
    for shift in range(1 - b, b):
        entries = [matrix[i][i + shift] if 0 <= i + shift < b else None for i in range(b)]
        if any(entry is not None for entry in entries):
            diagonal = payload.new_full((tokens, num_heads, rotation.head_dim), 0. if shift else 1.)
            for i, entry in enumerate(entries):
                if entry is not None:
                    diagonal[..., i:rotation.rotated:b] = entry.transpose(0, 1)
            out[shift] = diagonal.flatten(1)
    return out


def shifted(shift: int) -> Tuple[slice, slice]:
    """Where in a row a diagonal writes, and what it reads."""
    if shift < 0:
        return slice(-shift, None), slice(None, shift)
    return slice(None, -shift or None), slice(shift, None)


def pieces(x: Tensor) -> Iterator[Tuple[int, slice]]:
    """Images and ranges of tokens of x (B, N, ...) that are worked on one after the other."""
    tokens = max(1, PIECE // max(1, x[:1, :1].numel()))
    for image in range(x.shape[0]):
        for start in range(0, x.shape[1], tokens):
            yield image, slice(start, start + tokens)


def rows_are_whole(x: Tensor) -> bool:
    """Whether the heads of (B, N, H, D) lie side by side."""
    return x.stride(3) == 1 and x.stride(2) == x.shape[3]


def rows(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D)."""
    return x.transpose(1, 2).flatten(2)
