"""Checkpoints of any known layout -> folders that timm loads and the Hub takes as they are."""
from .command import add_arguments as add_arguments
from .command import convert as convert
from .command import run as run
