"""How a group of channels turns: pairs (2x2), triplets (two 3x3 rotations in sequence), blocks (matrix exponential).

Each family is one file with one class. It knows two things: `table` makes a *payload* of frequencies and coordinates,
everything that is left to do for one position, flattened into the last axis, and `forward` applies a payload to queries
or keys. It is the plain out-of-place formula and the single source of truth: a fused kernel has to reproduce it.

Shapes, in this room and in all that use it: B batch, H heads, N tokens, D head_dim, L layers (blocks of the model),
G groups of channels, W payload width, b channels of a group. H and L are 1 in frequencies and payloads that are shared.
An axis of size 2 is (x, y), x first. Groups are consecutive channels; channels left over at the end of a head pass
unrotated.

Everything is real arithmetic on strided slices, so that TorchScript, FX, export and ONNX need no special case.
Functions under `torch.fx.wrap` stay one node in a traced graph.
"""
from .axes import AxesRotation as AxesRotation
from .base import Rotation as Rotation
from .blocks import BlockRotation as BlockRotation
from .pairs import PairRotation as PairRotation
from .planes import PlanesRotation as PlanesRotation
from .triplets import TripletRotation as TripletRotation
