"""What every model of this package does when a state dict is loaded into it or its arguments are saved.

The state dict is brought into our keys and checked by the functions of the model's family, `fit_vit` or `fit_swin`.
"""
import copy
from types import ModuleType
from typing import Any, Dict

from .mismatches import report_left


class Checkpointed:
    """In front of timm's class: state dicts are checked as a whole before anything is copied.

    Attributes:
        _fitting: Module with `to_our_keys` and `prepare_state_dict` for this family of models, `fit_vit` or `fit_swin`.
    """
    _fitting: ModuleType
    __jit_unused_properties__ = ['_model_args']

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As torch's, but all is checked before anything is copied."""
        # only here is `strict` known: torch passes True to every `_load_from_state_dict`
        state_dict = copy.copy(self._fitting.to_our_keys(self, state_dict))  # keeps torch's `_metadata`
        self._fitting.prepare_state_dict(self, state_dict, '', strict)
        result = super().load_state_dict(state_dict, strict, assign)  # type: ignore[misc]
        report_left(result.missing_keys, result.unexpected_keys)
        return result

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        self._fitting.prepare_state_dict(self, state_dict, prefix, False)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    @property
    def _model_args(self) -> Dict[str, Any]:
        """Constructor arguments that timm saves with the weights, without how their training was once started."""
        return self.__dict__.get('_saved_model_args', {})

    @_model_args.setter
    def _model_args(self, args: Dict[str, Any]) -> None:
        self.__dict__['_saved_model_args'] = {k: v for k, v in args.items() if k != 'rope_warm_start'}
