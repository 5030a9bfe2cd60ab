"""What an encoding does, as a picture: measured by `timm_rope.analysis`, drawn, and written with its values."""
from .command import add_arguments as add_arguments
from .command import run as run
