"""STRING: pairs that turn by wave vectors in a learned orthogonal basis, of the widest form that stays relative."""
from typing import Any, Dict, Tuple

from torch import Tensor

from .._checks import check_choice, check_group, check_integer
from ..rotations import PlanesRotation
from . import _commuting
from ._base import RotaryEncoding
from ._frequencies import turned_basis


class String(RotaryEncoding, name='string'):
    """STRING (arXiv 2502.02562): R(p) = exp(x A_x + y A_y) on blocks of b channels, with A_x A_y = A_y A_x, both skew.

    That is R(p) = P RoPE(p) P^T: in one orthogonal basis P, pair k turns by x u_k + y v_k, as in `mixed`. So it is
    exactly relative, unlike `liere`, at the same price. The paper leaves out the outer P, which scores do not see; here
    prefix tokens, which do not turn, would. Larger grids extrapolate to higher indices. Begins as `mixed`, with S
    normal of deviation 0.01 (the paper's start is not known here). Channels of
    head_dim beyond the last whole block pass unrotated.

        cayley      P = (I - S) (I + S)^-1, S skew. Learned are the strict upper triangle of S and all u_k and v_k.
        circulant   A = C - C^T, C circulant: P is that of the Fourier transform, in which the first plane, and the last
                    of an even block, do not turn. Learned are the free numbers of A_x and A_y, its column 0 from row 1.

    `freqs`: (1, depth, heads * blocks, 2 (b // 2) + b (b - 1) / 2), u, v, S; (2, depth, heads * blocks, (b - 1) // 2).
    In D dimensions, as in the paper, there are D generators and wave numbers.

    Args:
        basis: 'cayley', in the paper the more accurate, or 'circulant', with fewer parameters.
        block: b. Default: the largest even divisor of head_dim from 8 to 16, else 16; the paper's cayley has head_dim.
        temperature: Ratio of the longest to the shortest initial wave vector.
        coords: 'index', or 'cells' or 'ends', which are normalised to the reference grid.
        share_heads: One set for all heads of a layer.
        share_layers: One set for all layers.
    """
    summary = 'Mixed in a learned basis: whole blocks turn, and scores still depend on offsets alone.'
    source = 'arXiv 2502.02562'
    learned = True
    oblique = True
    defaults = dict(basis='cayley', block=16, temperature=10., coords='index')
    scalings = ('extrapolate', 'interpolate')
    basis: str

    def _checked(self, options: Dict[str, Any]) -> Dict[str, Any]:
        fitting = [b for b in range(16, 7, -2) if self.head_dim % b == 0]
        options = super()._checked({'block': (fitting or [min(16, self.head_dim)])[0], **options})
        self.basis = check_choice(options['basis'], ('cayley', 'circulant'), 'basis')
        check_integer(options['block'], 'block', 3 if self.basis == 'circulant' else 2)
        return options

    def make_rotation(self) -> PlanesRotation:
        size = self.options['block']
        check_group(self.head_dim, size, self.name)
        return PlanesRotation(self.head_dim, size, (size - (self.basis == 'circulant')) // 2)

    def no_scaling(self) -> str:
        return 'a block turns by all its wave vectors at once, so only coordinates can change'

    def freqs_shape(self, layers: int, heads: int) -> Tuple[int, ...]:
        size, blocks = self.rotation.size, heads * self.rotation.groups  # at most 4 dimensions, as LieRE
        if self.basis == 'circulant':
            return self.dims, layers, blocks, (size - 1) // 2
        return 1, layers, blocks, size // 2 * self.dims + size * (size - 1) // 2

    def initial_freqs(self) -> Tensor:
        size, blocks, like = self.rotation.size, self.rotation.groups, self.freqs
        pairs = blocks * ((size - (self.basis == 'circulant')) // 2)
        waves = turned_basis(pairs, self.options['temperature'], self.dims, like[0, :, ::blocks, 0])
        return _commuting.freqs_of_waves(waves.reshape(self.dims, *like.shape[1:3], -1), size, self.basis)

    def frequencies(self) -> Tensor:
        generators = _commuting.generators(self.freqs, self.dims, self.rotation.size, self.basis)
        return generators.unflatten(2, [-1, self.rotation.groups])

    def table_freqs(self) -> Tensor:
        packed = _commuting.planes(self.freqs, self.dims, self.rotation.size, self.basis)
        return packed.unflatten(2, [-1, self.rotation.groups])

    def freqs_for(self, frequencies: Tensor) -> Tensor:
        return _commuting.freqs_of(frequencies.flatten(2, 3), self.rotation.size, self.basis)
