"""What timm saves of how a model was made."""
from typing import Any, Dict


class SavedArgs:
    """For a model in front of timm's class: its constructor arguments are saved, not how it was once started."""
    __jit_unused_properties__ = ['_model_args']

    @property
    def _model_args(self) -> Dict[str, Any]:
        return self.__dict__.get('_saved_model_args', {})

    @_model_args.setter
    def _model_args(self, args: Dict[str, Any]) -> None:
        self.__dict__['_saved_model_args'] = {k: v for k, v in args.items() if k != 'rope_warm_start'}
