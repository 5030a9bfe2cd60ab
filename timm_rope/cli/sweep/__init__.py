"""`python -m timm_rope sweep`: accuracy of models at several image sizes.

`command` reads the arguments, `tasks` lists and tries the evaluations, `evaluate` runs one, `results` keeps what came
out in a file, `rules` names rules for larger grids, and `views` shows the results."""
from .command import add_arguments as add_arguments
from .command import run as run
