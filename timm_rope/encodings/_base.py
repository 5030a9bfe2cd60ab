"""What an encoding is: coordinate convention + frequencies + rotation + learned or not, under a name.

A subclass (one file in `encodings/`, one line in `encodings/__init__.py`) says what its frequencies are; everything
else is here: the reference grid, the payloads of a grid, their cache, precision, and what a checkpoint must agree on.

Shapes: L layers, H heads, G channel groups, N tokens, W payload width. An axis of size 2 is (x, y), x first.
"""
from typing import Any, ClassVar, Dict, List, Optional, Set, Tuple, Type

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_choice, check_flag, check_integer, check_positive
from ..positions.augmentation import augment, check_amount
from ..positions.coordinates import COORDS, LARGEST_SIDE, grid_axes, reference_side, to_grid
from ..positions.scaling import RULES, growth, interpolate, log_n_scale, rescale
from ..rotations.formulas import PairRotation, Rotation
from ._cache import PayloadCache
from ._reference import HasReferenceGrid, saved_reference_grid
from ._signature import format_signature, read_signature, signature_conflicts, write_signature

for _name in ('augment', 'grid_axes', 'growth', 'log_n_scale', 'reference_side', 'rescale'):
    torch.fx.wrap(_name)

ENCODINGS: Dict[str, Type['RotaryEncoding']] = {}
SHARING = dict(share_heads=False, share_layers=False)  # options of every learned encoding
USAGE: Dict[str, Any] = dict(scaling='extrapolate', log_n=False, shift=None, jitter=None, rescale=None)


class RotaryEncoding(HasReferenceGrid):
    """Base class of every rotary encoding.

    Calling the module with a grid size gives the payloads, one per block of the model; `rotate` applies one.

        rope = create_rope('spherical', head_dim=64, num_heads=6, depth=12)
        payloads = rope((14, 14))
        q = rope.rotate(q, payloads[0])  # (batch, heads, 196, 64)

    Frequencies, coordinates and payloads are kept and computed in float32 (float64 in a float64 module), whatever
    dtype the model is cast to and outside autocast: in bfloat16 the positions of a 32 x 32 grid are off by 0.3 rad.

    A subclass defines `defaults`, `make_rotation` and `initial_freqs`, and where its frequencies are stored in another
    form `freqs_shape`, `frequencies` and its inverse `freqs_for`.

    Args:
        head_dim: Channels per head.
        num_heads: Attention heads.
        depth: Blocks of the model, one payload each.
        reference_grid: (rows, columns) the weights are trained on; see `coordinates.py`. Loaded weights bring theirs.
        device: Device of all tensors.
        dtype: float32 or float64; lower precisions are raised to float32.
        scaling: What happens on grids larger than the reference grid, a rule of `scaling.py`: 'extrapolate',
            'interpolate', 'ntk' or 'yarn'. As `log_n` a choice of whoever uses the weights: not saved with them.
        log_n: Multiply attention scores by ln(n) / ln(n_ref) where there are more tokens than in training; the
            attention has to do it, see `score_scale`.
        shift: Augmentation of the coordinates in training mode, see `augmentation.py`: they move by up to this part of
            half the reference image. None is off, as for the next two.
        jitter: Each axis is stretched by a factor between 1 / jitter and jitter.
        rescale: Both axes are stretched by a factor between 1 / rescale and rescale.
        **options: Options of the encoding, `option_defaults()`.

    Raises:
        ValueError: A size or option out of range, or an option that only other encodings take.
        TypeError: An option that no encoding takes.

    Attributes:
        options: All options with their values.
        usage: What is no part of the function that the weights were trained for: `scaling` to `rescale` above.
        freqs: Frequencies or generators, x first: a parameter if learned, else a non-persistent buffer.
        reference_grid: float32 tensor (2,), saved with the weights and rounded when it is read: as floating point
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
    scalings: ClassVar[Tuple[str, ...]] = RULES
    axes_apart: ClassVar[bool] = False  # frequencies of x and y are two rotations, not one wave vector
    __constants__ = ['axes_apart', 'centered', 'learned', 'span']  # TorchScript finds class attributes only here
    __jit_unused_properties__ = ['undecided', 'usage']

    freqs: Tensor
    signature: Tensor

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
            reference_grid: Tuple[int, int] = (14, 14),
            *,
            device=None,
            dtype=None,
            scaling: str = 'extrapolate',
            log_n: bool = False,
            shift: Optional[float] = None,
            jitter: Optional[float] = None,
            rescale: Optional[float] = None,
            **options: Any,
    ) -> None:
        super().__init__()
        self.head_dim = check_integer(head_dim, 'head_dim')
        self.num_heads = check_integer(num_heads, 'num_heads')
        self.depth = check_integer(depth, 'depth')
        self.options = self._checked(options)
        self.coords: str = self.options['coords']
        self.rotation = self.make_rotation()
        self._initial_grid = to_grid(reference_grid, 'reference_grid')
        self._signature = self.signature_of(self.options, self.head_dim)
        self._cache = PayloadCache()
        self.set_scaling(scaling, log_n)
        self._shift = check_amount(shift, 'shift', 0.)
        self._jitter = check_amount(jitter, 'jitter', 1.)
        self._rescale = check_amount(rescale, 'rescale', 1.)
        self._augmented = (self._shift, self._jitter, self._rescale) != (0., 1., 1.)

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
        self.register_buffer('reference_grid', torch.empty(2, device=device, dtype=torch.float32))
        signature = write_signature(self._signature)
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
        ignored = {*SHARING, 'temperature'} if cls.learned else set()
        named = {k: v for k, v in {**cls.option_defaults(), **options}.items() if k not in ignored}
        if head_dim is not None:
            named['head_dim'] = head_dim  # nothing else in a checkpoint need tell the number of heads
        return format_signature(cls.name, named)

    def _checked(self, options: Dict[str, Any]) -> Dict[str, Any]:
        taken = self.option_defaults()
        for key in options:
            if key not in taken:
                known = any(key in other.option_defaults() for other in ENCODINGS.values())
                message = f'Rotary encoding {self.name!r} takes no option {key!r}; its options are {", ".join(taken)}.'
                raise ValueError(message) if known else TypeError(message)
        options = {**taken, **options}
        check_choice(options['coords'], self.coords_choices, f'coords of {self.name!r}')
        if 'temperature' in options:
            check_positive(options['temperature'], 'temperature')
        for key in SHARING:
            check_flag(options.get(key, False), key)
        return options

    # -- how it is used

    def check_scaling(self, scaling: str) -> str:
        """The rule, if this encoding can follow it.

        Raises:
            ValueError: No rule of `scaling.py`, or one that has no meaning here; says why.
        """
        check_choice(scaling, RULES, 'scaling')
        if scaling not in self.scalings:
            raise ValueError(
                f'scaling must be one of {", ".join(map(repr, self.scalings))} for {self.name!r}, got {scaling!r}: '
                f'{self.no_scaling()}.')
        return scaling

    def no_scaling(self) -> str:
        """Why other rules than `scalings` have no meaning; overridden with it."""
        return ''

    def set_scaling(self, scaling: str, log_n: Optional[bool] = None) -> None:
        """Change what happens on grids larger than the reference grid; nothing is learned or saved with the weights.

        Args:
            scaling: 'extrapolate', 'interpolate', 'ntk' or 'yarn', see `scaling.py`.
            log_n: Whether attention scores are multiplied by `score_scale`; None keeps it.

        Raises:
            ValueError: A rule that there is not, or that has no meaning for this encoding. Nothing is changed.
        """
        self.check_scaling(scaling)
        if log_n is not None:
            self.log_n = check_flag(log_n, 'log_n')
        self.scaling = scaling
        self._cache = PayloadCache()

    @property
    def usage(self) -> Dict[str, Any]:
        """What is no part of the function that the weights were trained for, as the constructor takes it."""
        return dict(
            scaling=self.scaling, log_n=self.log_n, shift=self._shift or None,
            jitter=None if self._jitter == 1 else self._jitter, rescale=None if self._rescale == 1 else self._rescale)

    # -- what a subclass defines

    def make_rotation(self) -> Rotation:
        """How the channel groups turn, for `self.head_dim` and `self.options`."""
        raise NotImplementedError

    def freqs_shape(self, layers: int, heads: int) -> Tuple[int, ...]:
        """Shape of `freqs`, layers on axis 1; `layers` and `heads` are 1 where frequencies are shared or fixed."""
        return 2, layers, heads, self.rotation.groups

    def initial_freqs(self) -> Tensor:
        """Initial value of `freqs`, in its shape, on its device and in its dtype."""
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

    # -- what `reparametrize.py` asks: which wave vectors the channel pairs (2k, 2k+1) turn by, counter-clockwise

    def wave_vectors(self) -> Tensor:
        """Wave vectors of the pairs, (2, L or 1, H or 1, P), x first, in radians per unit of coordinate.

        Raises:
            ValueError: The rotation is not described by wave vectors of pairs; the message is a reason.
        """
        if type(self.rotation) is not PairRotation:  # its subclasses turn by other angles
            raise ValueError(f'{self._signature} does not turn each channel pair by one wave vector')
        return self.frequencies()

    def freqs_for_wave_vectors(self, vectors: Tensor) -> Tensor:
        """What `freqs` must hold to turn the pairs by (2, L, H, P) wave vectors; pairs beyond P stay unrotated.

        Raises:
            ValueError: No `freqs` do; the message is a reason.
        """
        if type(self.rotation) is not PairRotation:
            raise ValueError(f'{self.name!r} does not turn channel pairs')
        groups = self.rotation.groups
        if bool(vectors[..., groups:].any()):
            raise ValueError(f'{self.name!r} leaves the pairs beyond the first {groups} of a head unrotated')
        return self.freqs_for(F.pad(vectors[..., :groups], [0, max(0, groups - vectors.shape[-1])]))

    # -- initialisation and dtype

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill every tensor of the module, also after `to_empty`."""
        self.reference_grid.copy_(torch.tensor(self._initial_grid))
        self.signature.copy_(write_signature(self._signature, self._initial_grid))
        self.freqs.copy_(self.initial_freqs())

    @torch.no_grad()
    def init_non_persistent_buffers(self) -> None:
        """Fill what a checkpoint does not bring (called by timm and transformers after loading on the meta device)."""
        if not self.learned:
            self.freqs.copy_(self.initial_freqs())

    def _apply(self, fn, recurse: bool = True):
        def at_least_float32(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if tensor.is_floating_point() and out.is_floating_point() and out.dtype.itemsize < 4:
                return tensor.to(device=out.device, dtype=torch.float32)
            if out.stride() != tensor.stride() and out.shape == tensor.shape:
                # channels_last is meant for images; frequencies that happen to have four axes keep their layout
                return out.new_empty(out.shape).copy_(out)
            return out

        dtype, meta = self.freqs.dtype, self.freqs.is_meta
        super()._apply(at_least_float32, recurse)
        if self.freqs.dtype != dtype or (meta and not self.freqs.is_meta):
            # at the new precision, not rounded at the old one; no checkpoint brings them to a model made on meta
            self.init_non_persistent_buffers()
        return self

    def keep_layers(self, depth: int) -> None:
        """Drop the frequencies of all but the first `depth` blocks (the model was pruned)."""
        if self.learned and self.freqs.shape[1] > 1:
            self.freqs = nn.Parameter(self.freqs.detach()[:, :depth].clone(), requires_grad=self.freqs.requires_grad)
        self.depth = depth

    # -- payloads

    def forward(self, grid_size: Tuple[int, int], num_prefix_tokens: int = 0) -> List[Tensor]:
        """Payloads of a grid.

        A grid whose payloads need no gradient is computed once and cached; the cache is dropped when the frequencies
        or the reference grid change in value, device or dtype.

        On a larger grid than the reference grid coordinates and frequencies follow the rule `scaling`. In training mode
        with an augmentation every call draws anew, once for all blocks.

        Args:
            grid_size: (rows, columns) of patches.
            num_prefix_tokens: Tokens in front of the patches (class, registers); their payload is the identity.

        Returns:
            One payload per block, (H or 1, prefix + N, W). Blocks that share their frequencies share the tensor.

        Raises:
            ValueError: `grid_size` is not two positive integers.
        """
        if not torch.jit.is_scripting():
            if self._undecided and not self._is_recorded(grid_size):
                self.settle_reference_grid(grid_size)
            if self._is_eager(grid_size):
                return self._cached_payloads(to_grid(grid_size, 'grid_size'), num_prefix_tokens)
        return self._payloads(grid_size[0], grid_size[1], num_prefix_tokens)

    def _payloads(self, height: int, width: int, num_prefix_tokens: int) -> List[Tensor]:
        freqs = self.frequencies()
        axes = grid_axes(height, width, self.reference_grid, self.freqs, self.coords, self.span, self.centered)
        y, x = axes[0], axes[1]
        if self.scaling != 'extrapolate':
            s = growth(height, width, self.reference_grid, self.freqs)
            if self.scaling == 'interpolate':
                y, x = interpolate(y, s[1], self.coords), interpolate(x, s[0], self.coords)
            else:
                side = reference_side(self.reference_grid, self.freqs, self.coords, self.span)
                freqs = rescale(self.scaling, freqs, s, side, self.axes_apart)
        if self._augmented and self.training:
            moved = augment(
                y, x, reference_side(self.reference_grid, self.freqs, self.coords, self.span),
                self._shift, self._jitter, self._rescale)
            y, x = moved[0], moved[1]
        # R(0) is the identity in every encoding: a prefix token sits at the origin
        origin = torch.zeros_like(y[:1])
        return per_block(
            self.rotation.table(freqs, origin, origin),
            self.rotation.table(freqs, y, x),
            num_prefix_tokens,
            self.depth,
        )

    @torch.jit.unused
    def _is_recorded(self, grid_size: Tuple[int, int]) -> bool:
        """Whether the graph that is being recorded is meant for another runtime, or is no more than traced."""
        return (
            torch.compiler.is_exporting() or torch.jit.is_tracing() or isinstance(grid_size[0], torch.fx.Proxy))

    @torch.jit.unused
    def _is_eager(self, grid_size: Tuple[int, int]) -> bool:
        """False where a graph is being recorded (compile, export, FX, jit.trace) and sizes may be symbols."""
        return not (
            torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(grid_size[0], torch.fx.Proxy))

    @torch.jit.unused
    def _cached_payloads(self, grid_size: Tuple[int, int], num_prefix_tokens: int) -> List[Tensor]:
        if (torch.is_grad_enabled() and self.freqs.requires_grad) or (self._augmented and self.training):
            return self._payloads(grid_size[0], grid_size[1], num_prefix_tokens)
        key = (grid_size, num_prefix_tokens, self.depth, self.scaling)
        payloads = self._cache.get(key, self.freqs, self.reference_grid)
        if payloads is None:
            # outside inference mode, since what is made inside it could not be used in training later
            with torch.inference_mode(False), torch.no_grad():
                payloads = self._payloads(grid_size[0], grid_size[1], num_prefix_tokens)
            self._cache.put(key, payloads, self.freqs, self.reference_grid)
        return list(payloads)

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
        """
        if not torch.jit.is_scripting():
            self._check_rotate(x, payload)
        return self.rotation(x, payload)

    @torch.jit.unused
    def _check_rotate(self, x: Tensor, payload: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.num_heads or x.shape[3] != self.head_dim:
            raise ValueError(
                f'x must be (batch, {self.num_heads} heads, tokens, head_dim {self.head_dim}), got {tuple(x.shape)}.')
        if payload.shape[-1] != self.rotation.width or payload.shape[-2] != x.shape[2]:
            raise ValueError(
                f'payload must end in ({x.shape[2]} tokens, {self.rotation.width}), got {tuple(payload.shape)}: '
                f'call the encoding with the grid size of x.')

    # -- training

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Frequencies are not decayed: zero is a frequency like any other."""
        return {'freqs'} if self.learned else set()

    # -- checkpoints

    def check_state_dict(self, state_dict: Dict[str, Any], prefix: str = '') -> None:
        """Refuse a state dict that holds another encoding or damaged tensors, before anything is copied.

        Raises:
            RuntimeError: Another encoding or other options; says which.
            ValueError: Non-finite frequencies or a malformed reference grid.
        """
        saved = read_signature(state_dict.get(f'{prefix}signature'))
        if saved is not None:
            reason = signature_conflicts(saved, self._signature)
            if reason:
                raise RuntimeError(
                    f'The checkpoint holds the rotary encoding {saved}, this module is {self._signature}: {reason}. '
                    f'Build the model with the encoding and options of the checkpoint.')
        saved_reference_grid(state_dict, prefix)
        freqs = state_dict.get(f'{prefix}freqs')
        if isinstance(freqs, Tensor) and freqs.is_complex():
            raise ValueError(f'{prefix}freqs of the checkpoint must be real numbers, got {freqs.dtype}.')
        if isinstance(freqs, Tensor) and not freqs.is_meta and not bool(torch.isfinite(freqs).all()):
            bad = int((~torch.isfinite(freqs)).sum())
            raise ValueError(
                f'{prefix}freqs of the checkpoint has {bad} non-finite of {freqs.numel()} values; all must be finite.')

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        if type(self.reference_grid) is Tensor and not self.reference_grid.is_meta:
            self.adopt_reference_grid()
            sides = self.reference_grid.tolist()
            if all(0.5 < side < LARGEST_SIDE for side in sides):  # after `to_empty` they hold anything
                signature = write_signature(self._signature, (round(sides[0]), round(sides[1])), self.signature.device)
                if not torch.equal(signature, self.signature):  # the grid was changed, or an average moved the bits
                    with torch.no_grad():
                        self.signature.copy_(signature)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        self.check_state_dict(state_dict, prefix)
        assign = local_metadata.get('assign_to_params_buffers', False)
        tensors = dict(state_dict)
        grid = saved_reference_grid(state_dict, prefix)
        if grid is not None:
            device = state_dict[f'{prefix}reference_grid'].device if assign else self.reference_grid.device
            self._undecided = False
            tensors[f'{prefix}reference_grid'] = torch.tensor(grid, device=device, dtype=torch.float32)
            # weights from elsewhere have no signature, and one written by another version may differ in length
            tensors[f'{prefix}signature'] = write_signature(self._signature, grid, device)
        elif not self.signature.is_meta:
            tensors[f'{prefix}signature'] = self.signature.detach().clone()
        freqs = tensors.get(f'{prefix}freqs')
        if assign and isinstance(freqs, Tensor) and freqs.dtype.itemsize < 4:
            tensors[f'{prefix}freqs'] = freqs.float()  # learned frequencies stay float32 on this road, too
        super()._load_from_state_dict(tensors, prefix, local_metadata, *args)
        if not self.learned:
            # no checkpoint brings fixed frequencies, and after `to_empty` they hold anything
            if self.freqs.is_meta and not self.reference_grid.is_meta:
                self.freqs = torch.empty_like(self.freqs, device=self.reference_grid.device)
            self.init_non_persistent_buffers()

    # -- copies and display

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, '_cache': PayloadCache()}

    def _replicate_for_data_parallel(self):
        # replicas hold fresh tensors in every forward and run in threads: they share no cache
        replica = super()._replicate_for_data_parallel()
        replica._cache = PayloadCache()
        return replica

    def extra_repr(self) -> str:
        grid = 'meta' if self.reference_grid.is_meta else tuple(round(side) for side in self.reference_grid.tolist())
        usage = {k: v for k, v in self.usage.items() if v != USAGE[k]}
        options = ''.join(f', {k}={v}' for k, v in {**self.options, **usage}.items())
        return (
            f'{self.name}, head_dim={self.head_dim}, num_heads={self.num_heads}, depth={self.depth}, '
            f'reference_grid={grid}{options}, freqs={tuple(self.freqs.shape)}'
            f'{" learned" if self.learned else " fixed"}')


@torch.fx.wrap
def per_block(identity: Tensor, table: Tensor, num_prefix_tokens: int, depth: int) -> List[Tensor]:
    """Payloads (L or 1, H or 1, N, W) with that of the prefix tokens in front -> one (H or 1, ..., W) per block."""
    if num_prefix_tokens > 0:
        table = torch.cat((identity.expand(-1, -1, num_prefix_tokens, -1), table), dim=2)
    if table.shape[0] == 1:
        shared = table[0]
        return [shared for _ in range(depth)]
    return list(table.unbind(0))


@torch.fx.wrap
def keep_tokens(payload: Tensor, keep_indices: Tensor, num_prefix_tokens: int) -> Tensor:
    """Payload of the patches that patch dropout kept.

    Args:
        payload: (H or 1, prefix + N, W).
        keep_indices: (B, K), patches kept in each image, without the prefix tokens.
        num_prefix_tokens: Tokens in front, always kept.

    Returns:
        (B, H or 1, prefix + K, W).
    """
    batch = keep_indices.shape[0]
    prefix = torch.arange(num_prefix_tokens, device=keep_indices.device).unsqueeze(0).expand(batch, -1)
    index = torch.cat((prefix, keep_indices + num_prefix_tokens), dim=1)
    return payload[:, index].transpose(0, 1)
