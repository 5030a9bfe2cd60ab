"""Accuracy of models at several image sizes: found and loaded, evaluated, recorded, shown."""
from .command import add_arguments as add_arguments
from .command import run as run
