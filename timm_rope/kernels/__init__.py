"""Turning queries and keys in place, in front of attention.

    rotate.py       the op and its backward pass
    routes.py       which route takes which input, and the measurements behind that
    guard.py        what happens where a route fails or turns wrongly
    cpu/, triton/   the routes
"""
from .rotate import does_nothing as does_nothing
from .rotate import owned as owned
from .rotate import rotate as rotate
from .rotate import unpack as unpack
from .routes import ROUTES as ROUTES
from .routes import VARIABLE as VARIABLE
from .routes import find_route as find_route
