"""The tensors of an encoding: how they are filled and cast, and what a checkpoint must agree on.

Comes in: state dicts, casts and moves of a model. Goes out: an encoding whose frequencies are float32 at least
and never uninitialised, or a clear error before anything is changed.
"""
from typing import Any, ClassVar, Dict

import torch
from torch import Tensor, nn

from ..positions.coordinates import LARGEST_SIDE
from ._reference import HasReferenceGrid, saved_reference_grid
from ._signature import read_signature, signature_conflicts, write_signature


class SavedState(HasReferenceGrid):
    """Part of `RotaryEncoding` that keeps its tensors right."""
    freqs: Tensor
    signature: Tensor
    depth: int
    learned: ClassVar[bool]
    _signature: str

    def initial_freqs(self) -> Any:
        raise NotImplementedError

    # -- initialisation, dtype and layout

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill every tensor of the module, also after `to_empty`."""
        self.reference_grid.copy_(torch.tensor(self._initial_grid, device='cpu'))
        self.signature.copy_(write_signature(self._signature, self._initial_grid))
        self._fill_freqs()

    @torch.no_grad()
    def init_non_persistent_buffers(self) -> None:
        """Fill what a checkpoint does not bring (called by timm and transformers after loading on the meta device)."""
        if not self.learned:
            self._fill_freqs()

    def _fill_freqs(self) -> None:
        values = self.initial_freqs()
        if not isinstance(values, Tensor):
            values = torch.tensor(values, dtype=torch.float64, device='cpu')
        if values.numel() == self.freqs.numel():
            values = values.reshape(self.freqs.shape)
        sharded: Any = self.freqs  # before it is filled, as FSDP2 does with a model that was made on the meta device
        if hasattr(sharded, 'placements') and not hasattr(values, 'placements'):
            from torch.distributed.tensor import distribute_tensor

            values = values.to(sharded.device, sharded.dtype).expand(sharded.shape)
            values = distribute_tensor(values, sharded.device_mesh, sharded.placements)
        self.freqs.copy_(values)

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
        saved_reference_grid(state_dict, prefix, self.dims)
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
                signature = write_signature(self._signature, [round(side) for side in sides], self.signature.device)
                if not torch.equal(signature, self.signature):  # the grid was changed, or an average moved the bits
                    with torch.no_grad():
                        self.signature.copy_(signature)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        self.check_state_dict(state_dict, prefix)
        assign = local_metadata.get('assign_to_params_buffers', False)
        tensors = dict(state_dict)
        grid = saved_reference_grid(state_dict, prefix, self.dims)
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
