"""What an encoding is: coordinate convention + frequencies + rotation + learned or not, under a name.

This is the contract: what a subclass states (one file in `encodings/`, one line in `encodings/__init__.py`), and what
everybody else asks of it, the payloads of a grid or of points (`_positions.py`). Beside it: `_usage.py`, `_state.py`,
`_reference.py`, `_cache.py`.

Shapes: see `rotations/__init__.py`.
"""
import math
from typing import Any, ClassVar, Dict, List, Optional, Set, Tuple, Type

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_flag, check_integer, check_positive, check_real
from ..positions.coordinates import COORDS, LARGEST_DIMS, Grid, describe_grid, to_grid
from ..positions.scaling import log_n_scale
from ..rotations import Rotation
from ._cache import PayloadCache
from ._many import ServesManyGrids
from ._payloads import check_rotate
from ._signature import format_signature, write_signature
from ._usage import USAGE

torch.fx.wrap('log_n_scale')  # FX keeps it as a single node; it looks for the name in the module that calls it

ENCODINGS: Dict[str, Type['RotaryEncoding']] = {}
# in which the axes may act, the first of each is the default
ORDERS = {1: ('x',), 2: ('yx', 'xy'), 3: ('zyx', 'zxy', 'yzx', 'yxz', 'xzy', 'xyz')}
SHARING = dict(share_heads=False, share_layers=False)  # options of every learned encoding


class RotaryEncoding(ServesManyGrids):
    """Base class of every rotary encoding.

    Calling the module with a grid size gives the payloads, one per block of the model, `at` those of points anywhere;
    `rotate` applies one.

        rope = create_rope('spherical', head_dim=64, num_heads=6, depth=12)
        payloads = rope((14, 14))
        q = rope.rotate(q, payloads[0])  # (batch, heads, 196, 64)

    Frequencies, coordinates and payloads are kept and computed in float32 (float64 in a float64 module), whatever
    dtype the model is cast to and outside autocast: in bfloat16 the positions of a 32 x 32 grid are off by 0.3 rad.

    A subclass gives its name in the class line, `class Mixed(RotaryEncoding, name='mixed')`, and defines

    * the class attributes below: `summary`, `source` (any citation), `defaults` (its options with their defaults,
      `coords` always among them), and where they differ `learned`, `oblique`, `relative`, ...;
    * `make_rotation`: how its channel groups turn;
    * `initial_freqs`: what the groups turn by, as plain numbers or a tensor;
    * only where frequencies are stored in another form `freqs_shape`, `frequencies` and its inverse `freqs_for`.

    Its docstring gives the equation, the source, every option as `option:`, and what happens to the channels of
    head_dim that form no group.

    Args:
        head_dim: Channels per head.
        num_heads: Attention heads.
        depth: Blocks of the model, one payload each.
        reference_grid: (rows, columns) the weights are trained on; see `coordinates.py`. Loaded weights bring theirs.
            (tokens,) makes an encoding of sequences, (frames, rows, columns) one of videos or volumes: positions and
            all grids then have one number, or three, in this order.
        device: Device of all tensors.
        dtype: float32 or float64; lower precisions are raised to float32.
        scaling: Rule for grids larger than the reference grid, see `scaling.py`; as `log_n` not saved with weights.
            None is the one of the coordinates: 'interpolate' for those of DINOv3 and EVA, else 'extrapolate'.
        log_n: Whether attention multiplies its scores by `score_scale`, where there are more tokens than in training.
        shift: In training coordinates move by up to this part of half the reference image, see `augmentation.py`.
        jitter: In training each axis is stretched by a factor between 1 / jitter and jitter.
        rescale: In training both axes are stretched by a factor between 1 / rescale and rescale; None is off, for all.
        **options: Options of the encoding, `option_defaults()`.

    Raises:
        ValueError: A size or option out of range, or an option that only other encodings take.
        TypeError: An option that no encoding takes.

    Attributes:
        options: All options with their values.
        usage: `scaling` to `rescale` above.
        dims: D, how many numbers a position has.
        freqs: Frequencies or generators, x first, which is the last of a position: a parameter if learned, else a
            non-persistent buffer.
        reference_grid: float32 tensor (D,), saved with the weights and rounded when it is read: as floating point
            numbers the weights can be averaged and cast as a whole.
        signature: Name and options of the encoding as text (see `_signature.py`), saved with the weights. Fixed
            encodings have no other tensor that could tell a spherical checkpoint from an axial one.
    """
    name: ClassVar[str] = ''
    summary: ClassVar[str] = ''  # one sentence for tables: what it is and when to use it
    source: ClassVar[str] = ''
    learned: ClassVar[bool] = False
    oblique: ClassVar[bool] = False  # wave vectors off the axes
    relative: ClassVar[str] = 'xy'  # axes along which the score depends on the offset alone: 'xy', '', 'last'
    defaults: ClassVar[Dict[str, Any]] = {}  # options of the encoding, `coords` among them, with their defaults
    coords_choices: ClassVar[Tuple[str, ...]] = COORDS
    span: ClassVar[float] = 2 * torch.pi  # of the reference image in normalised coordinates
    centered: ClassVar[bool] = True
    axes_apart: ClassVar[bool] = False  # frequencies of x and y are two rotations, not one wave vector
    dimensions: ClassVar[Tuple[int, ...]] = tuple(range(1, LARGEST_DIMS + 1))  # of positions that it has a meaning for
    no_dimensions: ClassVar[str] = ''  # why it has none for others
    __constants__ = ['axes_apart', 'centered', 'learned', 'span']  # TorchScript finds class attributes only here
    __jit_unused_properties__ = ['undecided', 'usage']

    def __init_subclass__(cls, name: str = '', **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if name:
            if name in ENCODINGS and ENCODINGS[name].__qualname__ != cls.__qualname__:
                raise ValueError(f'Rotary encoding {name!r} is already defined by {ENCODINGS[name].__qualname__}.')
            cls.name = name
            ENCODINGS[name] = cls

    def __init__(
            self,
            head_dim: int,
            num_heads: int,
            depth: int,
            reference_grid: Grid = (14, 14),
            *,
            device=None,
            dtype=None,
            **options: Any,
    ) -> None:
        super().__init__()
        self.head_dim = check_integer(head_dim, 'head_dim')
        self.num_heads = check_integer(num_heads, 'num_heads')
        self.depth = check_integer(depth, 'depth')
        self._initial_grid = to_grid(reference_grid, 'reference_grid', None)
        self.dims = len(self._initial_grid)
        if self.dims not in self.dimensions:
            grids = ' or '.join(describe_grid(dims) for dims in self.dimensions)
            raise ValueError(
                f'reference_grid of {self.name!r} must be {grids}, got {reference_grid!r}: {self.no_dimensions}.')
        usage = {key: options.pop(key, default) for key, default in USAGE.items()}
        self.options = self._checked(options)
        self.coords: str = self.options['coords']
        self.offset = float(self.options.get('offset', 0.))
        self.register_side = math.isqrt(self.options.get('registers', 0))
        self.rotation = self.make_rotation()
        self._signature = self.signature_of(self.options, self.head_dim)
        self._cache = PayloadCache()
        self.set_usage(**usage)

        dtype = dtype or torch.get_default_dtype()
        if dtype.itemsize < 4:
            dtype = torch.float32
        layers = self.depth if self.learned and not self.options['share_layers'] else 1
        heads = self.num_heads if self.learned and not self.options['share_heads'] else 1
        freqs = torch.empty(self.freqs_shape(layers, heads), device=device, dtype=dtype)
        if self.learned:
            self.freqs = nn.Parameter(freqs)
        else:
            self.register_buffer('freqs', freqs, persistent=False)
        self.register_buffer('reference_grid', torch.empty(self.dims, device=device, dtype=torch.float32))
        signature = write_signature(self._signature, self._initial_grid)
        self.register_buffer('signature', torch.empty(signature.shape, device=device, dtype=torch.float32))
        self.reset_parameters()

    @classmethod
    def option_defaults(cls) -> Dict[str, Any]:
        """The options the encoding takes, beside the sizes, with their defaults."""
        return {**cls.defaults, **(SHARING if cls.learned else {})}

    @classmethod
    def signature_of(cls, options: Dict[str, Any], head_dim: Optional[int] = None) -> str:
        """Text that is saved with weights of these options; those not given have their defaults."""
        # what only matters for initialisation, or shows in the shapes, is not compared with a checkpoint
        ignored = {*SHARING, 'temperature', 'scale'} if cls.learned else set()
        named = {k: v for k, v in {**cls.option_defaults(), **options}.items() if k not in ignored}
        if head_dim is not None:
            named['head_dim'] = head_dim  # nothing else in a checkpoint need tell the number of heads
        return format_signature(cls.name, named)

    def _checked(self, options: Dict[str, Any]) -> Dict[str, Any]:
        taken = self.option_defaults()
        for key in options:
            if key not in taken:
                known = any(key in other.option_defaults() for other in ENCODINGS.values())
                message = (
                    f'Rotary encoding {self.name!r} takes no option {key!r}; its options are {", ".join(taken)} '
                    f'(of a model with rope_ in front).')
                raise ValueError(message) if known else TypeError(message)
        options = {**taken, **options}
        check_choice(options['coords'], self.coords_choices, f'coords of {self.name!r}')
        for key in {'temperature', 'scale', 'register_temperature'} & set(options):
            check_positive(options[key], key)
        check_real(options.get('offset', 0.), 'offset')
        if 'order' in options:
            check_choice(options['order'], ORDERS[self.dims], 'order')
        for key in SHARING:
            check_flag(options.get(key, False), key)
        return options

    # -- what a subclass defines

    def make_rotation(self) -> Rotation:
        """How the channel groups turn, for `self.head_dim`, `self.dims` and `self.options`."""
        raise NotImplementedError

    def freqs_shape(self, layers: int, heads: int) -> Tuple[int, ...]:
        """Shape of `freqs`, layers on axis 1; `layers` and `heads` are 1 where frequencies are shared or fixed."""
        return self.dims, layers, heads, self.rotation.groups

    def initial_freqs(self) -> Any:
        """Initial value of `freqs`: numbers in nested lists or a tensor, of its shape or one that broadcasts to it.

        `self.freqs` is there for its shape, device and dtype, but has no values yet.
        """
        raise NotImplementedError

    def frequencies(self) -> Tensor:
        """Frequencies as the rotation takes them, x first; overridden where `freqs` is stored in a denser form."""
        return self.freqs

    def freqs_for(self, frequencies: Tensor) -> Tensor:
        """Inverse of `frequencies`, overridden with it.

        Raises:
            ValueError: `freqs` has no place for some of them; the message is a reason without a full stop.
        """
        return frequencies

    # -- payloads

    def forward(self, grid_size: Grid, num_prefix_tokens: int = 0) -> List[Tensor]:
        """Payloads of a grid.

        A grid whose payloads need no gradient is computed once and cached; the cache is dropped when the frequencies
        or the reference grid change in value, device or dtype.

        On a larger grid than the reference grid coordinates and frequencies follow the rule `scaling`. In training mode
        with an augmentation every call draws anew, once for all blocks.

        Args:
            grid_size: (rows, columns) of patches, or as many sizes as the reference grid has.
            num_prefix_tokens: Tokens in front of the patches (class, registers); their payload is the identity, but
                that of registers that have places of their own (an option of `axial`).

        Returns:
            One payload per block, (H or 1, prefix + N, W). Blocks that share their frequencies share the tensor.

        Raises:
            ValueError: A negative number, or no such positive integers; a TypeError if `grid_size` is a tensor.
        """
        if not torch.jit.is_scripting():
            if self._undecided and not self._is_recorded(grid_size):
                self.settle_reference_grid(grid_size)
            if self._is_eager(grid_size):
                return self._cached_payloads(to_grid(grid_size, 'grid_size', self.dims), num_prefix_tokens)
            if self.dims != 2:
                return self._payloads(list(grid_size), num_prefix_tokens)
        return self._payloads([grid_size[0], grid_size[1]], num_prefix_tokens)

    def score_scale(self, tokens: int, num_prefix_tokens: int = 0) -> Tensor:
        """What the scores of `tokens` queries and keys are multiplied by if `log_n` is set, see `scaling.log_n_scale`.

        Args:
            tokens: Tokens that attend to each other, prefix tokens included.
            num_prefix_tokens: Tokens in front of the patches, as many as in training.

        Returns:
            A scalar tensor, 1 where there are no more tokens than in training.
        """
        return log_n_scale(tokens, num_prefix_tokens, self.reference_grid, self.freqs)

    def rotate(self, x: Tensor, payload: Tensor) -> Tensor:
        """Rotate queries or keys of one block.

        Args:
            x: (batch, heads, N, head_dim), any floating dtype.
            payload: One element of what calling the module returned.

        Returns:
            Same shape and dtype as `x`, which is not changed.

        Raises:
            ValueError: The shapes do not fit each other.
            TypeError: The payloads of all blocks, or integers.
        """
        if not torch.jit.is_scripting():
            check_rotate(x, payload, self.num_heads, self.head_dim, self.rotation.width)
        return self.rotation(x, payload)

    # -- training

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Frequencies are not decayed: zero is a frequency like any other."""
        return {'freqs'} if self.learned else set()

    # -- display

    def extra_repr(self) -> str:
        grid = 'meta' if self.reference_grid.is_meta else tuple(round(side) for side in self.reference_grid.tolist())
        usage = {k: v for k, v in self.usage.items() if v != USAGE[k]}
        options = ''.join(f', {k}={v}' for k, v in {**self.options, **usage}.items())
        return (
            f'{self.name}, head_dim={self.head_dim}, num_heads={self.num_heads}, depth={self.depth}, '
            f'reference_grid={grid}{options}, freqs={tuple(self.freqs.shape)}'
            f'{" learned" if self.learned else " fixed"}')
