"""`python -m timm_rope demo`: one small training that shows what a rotary encoding does."""
from .command import add_arguments as add_arguments
from .command import run as run
