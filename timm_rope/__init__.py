"""Rotary position encodings for Vision Transformers, as a plugin for timm.

Importing this package imports neither torch nor timm: it only arranges that our models are registered as soon as
`timm.models` is there. The names below are resolved on first use.
"""
from importlib import import_module
from typing import TYPE_CHECKING

from . import plugin as _plugin
from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .encodings import RotaryEncoding as RotaryEncoding
    from .encodings import create_rope as create_rope
    from .encodings import list_ropes as list_ropes
    from .models.convert_encoding import convert_encoding as convert_encoding
    from .models.swin import RopeSwinTransformer as RopeSwinTransformer
    from .models.vit import RopeVisionTransformer as RopeVisionTransformer

_LAZY = {
    'RotaryEncoding': '.encodings',
    'convert_encoding': '.models.convert_encoding',
    'create_rope': '.encodings',
    'list_ropes': '.encodings',
    'RopeSwinTransformer': '.models.swin',
    'RopeVisionTransformer': '.models.vit',
}
__all__ = [
    'RopeSwinTransformer', 'RopeVisionTransformer', 'RotaryEncoding', '__version__', 'convert_encoding', 'create_rope',
    'list_ropes']


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(__all__))


# torch imports this package while it is itself being imported; then plugin.autoload() decides, so that the
# opt-out of an environment variable can be honoured. Any other import is a user's and is a wish to register.
if _plugin.is_importing('torch'):
    _plugin.imported_by_torch = True
else:
    _plugin.install()
