"""Rotary encodings, one file each. The registry: one import line for every encoding."""
from ._base import ENCODINGS as ENCODINGS
from ._base import RotaryEncoding as RotaryEncoding
from ._registry import create_rope as create_rope
from ._registry import list_ropes as list_ropes
from .axial import Axial as Axial
from .axial import AxialLearned as AxialLearned
from .golden import Golden as Golden
from .liere import LieRE as LieRE
from .mixed import Mixed as Mixed
from .nd import SimplexWaves as SimplexWaves
from .spherical import Spherical as Spherical
from .spherical import SphericalLearned as SphericalLearned
from .spiral import Spiral as Spiral
from .string import String as String
from .uniform import Uniform as Uniform
