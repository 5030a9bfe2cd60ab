"""Mixed: every channel pair turns with its own learned direction and scale."""
from torch import Tensor

from .._checks import check_group
from ..rotations import PairRotation
from ._base import RotaryEncoding
from ._frequencies import turned_basis


class Mixed(RotaryEncoding, name='mixed'):
    """RoPE-Mixed (arXiv 2403.13298, section 3.2): a_k = x f_xk + y f_yk, learned for every layer, head and pair.

    Starts as the axial basis (temperature 10) turned by a random angle per layer and head. Exactly relative whatever
    is learned. Larger grids extrapolate to higher indices. `freqs`: (2, depth, heads, head_dim / 2), x first. An odd
    head_dim leaves its last channel unrotated.

    In D dimensions a wave vector has D numbers (arXiv 2511.08368); each axis begins with its share of the pairs, all
    turned together by a random rotation. In one it begins as RoPE, and learns the frequencies.

    Args:
        temperature: Ratio of the longest to the shortest initial wave vector.
        scale: Length of the longest, in radians per unit of coordinate.
        offset: Of patches from prefix tokens, along both axes: in patches with 'index' and 'eva', else in images.
        coords: 'index' as NAVER; 'cells' or 'ends' are normalised to the reference grid; more in
            `positions/coordinates.py`.
        share_heads: One set of frequencies for all heads of a layer.
        share_layers: One set of frequencies for all layers.
    """
    summary = 'Learned wave vectors in any direction; in its paper it loses less than axial on larger images.'
    source = 'arXiv 2403.13298'
    learned = True
    oblique = True
    defaults = dict(temperature=10., scale=1., offset=0., coords='index')

    def make_rotation(self) -> PairRotation:
        return PairRotation(self.head_dim, check_group(self.head_dim, 2, self.name))

    def initial_freqs(self) -> Tensor:
        basis = turned_basis(self.rotation.groups, self.options['temperature'], self.dims, self.freqs[0, ..., 0])
        return self.options['scale'] * basis
