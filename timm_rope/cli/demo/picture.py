"""The picture that the demo writes beside its table: right answers in per cent against the size of the images."""
from pathlib import Path
from typing import Any, Dict


def draw(result: Dict[str, Any], path: Path) -> str:
    """Draw the result of `compare` into a PNG file.

    Returns:
        A sentence that says where the picture is, or why there is none.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return 'No picture was drawn: matplotlib is missing (pip install matplotlib).'
    axes = (figure := Figure(figsize=(6, 4), layout='constrained')).subplots()
    for model in result['models']:
        line, = axes.plot(*_points(model['tests']), 'o-', label=model['name'])
        if model['by_rule']:
            # the rule changes nothing at the size of training, where both lines begin
            tests = [model['tests'][0], *model['by_rule']['tests']]
            axes.plot(*_points(tests), 'o--', color=line.get_color(), label=f'rope_scaling={model["by_rule"]["rule"]}')
    axes.set(xlabel='size of the images, pixels', ylabel='right answers, %', ylim=(0, 100))
    axes.set_title(result['data']['name'])
    axes.legend()
    figure.savefig(path, dpi=120)
    return f'The same as a picture: {path}'


def _points(tests: Any) -> Any:
    return [test['size'] for test in tests], [100 * test['accuracy'] for test in tests]
