"""Results as a Markdown table, and as a plot."""
import statistics
from pathlib import Path
from typing import Any, Dict, Tuple

from comparison.report import Row, Rows, draw_panels, spread, table

from .opening import FOLDERS, MADE_UP

Key = Tuple[int, str, Any]  # size, content, rule
KINDS = {**MADE_UP, **FOLDERS}
WORDS = {'same': '', 'enlarged': ', enlarged'}
TITLES = {'same': 'content as large as in training', 'enlarged': 'content enlarged'}


def tables(rows: Rows, tasks: Dict[str, Any]) -> str:
    """Figures of all tasks, mean and standard deviation over the seeds."""
    texts = []
    for task in tasks:
        some = [row for row in rows if row['task'] == task]
        if some:
            texts += [f'**{task}**, {KINDS[task].title}: {tasks[task]["about"]}', _table(task, some)]
    return '\n\n'.join(texts)


def _table(task: str, rows: Rows) -> str:
    trained = rows[0]['tests'][0]['size']
    # APE follows no rule: its figures stand where the others extrapolate
    keys = sorted(
        {(test['size'], test['content'], test['rule'] or 'extrapolate') for row in rows for test in row['tests']},
        key=lambda key: (key[0] != trained, key[1] == 'enlarged', key[0], key[2]))
    heads = [f'{size} px{WORDS[content] if size != trained else ""}{", `interpolate`" if rule == "interpolate" else ""}'
             for size, content, rule in keys]
    lines = []
    for method in dict.fromkeys(row['method'] for row in rows):
        runs = [row for row in rows if row['method'] == method]
        cells = ['' if find(task, runs[0], key) is None else spread(runs, lambda row, k=key: find(task, row, k))
                 for key in keys]
        lines.append([f'`{method}`', *cells, str(len(runs))])
    return table(['', *heads, 'seeds'], lines)


def find(task: str, row: Row, key: Key) -> Any:
    """The figure of one test, None if there was none; at the size of training one test stands for all."""
    for number, test in enumerate(row['tests']):
        if test['size'] == key[0] and (number == 0 or (test['content'], test['rule'] or 'extrapolate') == key[1:]):
            return test[KINDS[task].figure]
    return None


def plot(path: Path, rows: Rows, tasks: Dict[str, Any]) -> None:
    """Draw the figure of each task against the size of images, a panel for each content; bars are standard deviations.

    Dotted lines are by `interpolate`.
    """
    panels: Dict[str, Rows] = {}
    about: Dict[str, Tuple[str, str]] = {}
    for task in tasks:
        for content in KINDS[task].contents:
            title = f'{task}, {TITLES[content]}'
            panels[title], about[title] = [row for row in rows if row['task'] == task], (task, content)

    def draw(axes: Any, title: str, method: str, runs: Rows, style: Dict[str, Any]) -> None:
        task, content = about[title]
        sizes = sorted(tasks[task]['recipe']['sizes'])
        for rule, changes in (('extrapolate', dict(label=method)), ('interpolate', dict(ls=':'))):
            values = {size: [find(task, row, (size, content, rule)) for row in runs] for size in sizes
                      if find(task, runs[0], (size, content, rule)) is not None}
            if len(values) > 1:
                axes.errorbar(
                    list(values), [statistics.mean(v) for v in values.values()],
                    [statistics.stdev(v) if len(v) > 1 else 0 for v in values.values()],
                    marker='o', capsize=3, **{**style, **changes})
        axes.set_xticks(sizes)
        axes.set_xlabel(f'image size in pixels, {tasks[task]["recipe"]["sizes"][0]} in training')

    draw_panels(path, panels, {title: f'{KINDS[task].title}, %' for title, (task, _) in about.items()}, draw)
