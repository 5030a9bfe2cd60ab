"""What the results of a sweep look like: a table for the terminal, a CSV file, and a plot of accuracy against size.

Files of the same name that something else wrote are never replaced.
"""
import csv
import importlib.util
import io
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from .._common import write_whole
from .rules import label_of

COLUMNS = (
    'model', 'rope_scaling', 'height', 'width', 'top1', 'top5', 'right_top1', 'right_top5', 'images',
    'images_per_second', 'crop_pct', 'interpolation', 'parameters')
WITHOUT_RULES = tuple(name for name in COLUMNS if name != 'rope_scaling')  # what earlier versions wrote
SOFTWARE = 'timm_rope sweep'
DASHES = ('-', '--', ':', '-.')  # for more lines than the ten colours of matplotlib
Rows = List[Dict[str, Any]]
Line = Tuple[str, Optional[str]]


def size_text(row: Dict[str, Any]) -> str:
    square = row['height'] == row['width']
    return str(row['height']) if square else f'{row["height"]}x{row["width"]}'


def line_of(row: Dict[str, Any]) -> Line:
    """Model and rule, which are one line of table and plot."""
    return row['model'], row.get('rope_scaling')


def format_table(rows: Rows) -> str:
    """Top-1 accuracies in per cent, a line for each model and rule, a column for each size."""
    models, sizes = list(dict.fromkeys(map(line_of, rows))), list(dict.fromkeys(map(size_text, rows)))
    found = {(line_of(row), size_text(row)): f'{row["top1"]:.2f}' for row in rows}
    lines = [['top-1, %', *sizes], *(
        [label_of(*model), *(found.get((model, size), '') for size in sizes)] for model in models)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ['  '.join(
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]).rstrip()
        for line in lines]
    unreadable = max(row.get('unreadable', 0) for row in rows)
    return '\n'.join([*text, *([f'(without {unreadable} images that cannot be read)'] if unreadable else [])])


def check_csv(path: Path) -> None:
    """Raise ValueError if there is a file that is not a table of ours."""
    if path.exists():
        with path.open('rb') as file:
            heading = file.readline(1000).decode(errors='replace').strip()
            if heading not in (','.join(COLUMNS), ','.join(WITHOUT_RULES)):
                raise ValueError(f'--csv: {path} is no table of sweep and is not replaced: name another file.')


def write_csv(path: Path, rows: Rows) -> None:
    """Write one line for each row, with a heading."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction='ignore', lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def check_plot(path: Path) -> None:
    """Raise ValueError if no plot can be drawn, or if it would replace a file that is no plot of ours."""
    if importlib.util.find_spec('matplotlib') is None:
        raise ValueError("--plot needs matplotlib: pip install 'timm_rope[bench]', or pip install matplotlib.")
    if path.exists():
        from PIL import Image

        try:
            with Image.open(path) as image:
                ours = image.info.get('Software') == SOFTWARE
        except OSError:
            ours = False
        if not ours:
            raise ValueError(f'--plot: {path} is no plot of sweep and is not replaced: name another file.')


def write_plot(path: Path, rows: Rows) -> None:
    """Draw top-1 accuracy against image size as PNG, a line for each model and rule.

    An image that is not square stands where the square one of as many pixels would.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.add_subplot()
    ticks: Dict[float, str] = {}
    for number, line in enumerate(dict.fromkeys(map(line_of, rows))):
        points = sorted((
            ((row['height'] * row['width']) ** .5, row['top1'], size_text(row)) for row in rows
            if line_of(row) == line), key=lambda point: point[:2])
        axes.plot(
            [x for x, _, _ in points], [y for _, y, _ in points], marker='o', label=label_of(*line),
            linestyle=DASHES[number // 10 % len(DASHES)])
        for x, _, text in points:
            if text not in ticks.get(x, '').split('\n'):
                ticks[x] = f'{ticks[x]}\n{text}' if x in ticks else text
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlabel('image size, pixels')
    axes.set_ylabel('top-1 accuracy, %')
    axes.grid(alpha=.3)
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format='png', dpi=150, metadata={'Software': SOFTWARE})
    write_whole(path, content.getvalue())
