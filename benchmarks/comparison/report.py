"""Results of a comparison as Markdown tables, and as plots."""
import io
import statistics
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

from timm_rope.cli._common import write_whole

Row = Dict[str, Any]
Rows = Sequence[Row]


def tables(rows: Rows, tasks: Dict[str, Any]) -> str:
    """Accuracies of all tasks, mean and standard deviation over the seeds."""
    return '\n\n'.join(
        text for task in tasks for text in task_tables(task, tasks[task], [r for r in rows if r['task'] == task]))


def task_tables(task: str, about: Dict[str, Any], rows: Rows) -> List[str]:
    if not rows:
        return []
    sizes = about['recipe']['sizes']
    methods = list(dict.fromkeys(row['method'] for row in rows))
    of = {method: [row for row in rows if row['method'] == method] for method in methods}
    groups = list(rows[0]['tests'][0]['groups'])
    turned = next((test['turned'] for test in rows[0]['tests'] if test['turned']), None)
    heads = [f'{sizes[0]} px', *groups, *(f'{size} px' for size in sizes[1:])]
    heads += [] if turned is None else [f'turned by {turned:g}°']
    lines = []
    for method in methods:
        cells = [spread(of[method], lambda row: accuracy(find(row, sizes[0])))]
        cells += [spread(of[method], lambda row, g=group: share(find(row, sizes[0])['groups'][g])) for group in groups]
        cells += [spread(of[method], lambda row, s=size: accuracy(find(row, s))) for size in sizes[1:]]
        cells += [] if turned is None else [
            spread(of[method], lambda row: accuracy(find(row, sizes[0], turned)))]
        lines.append([f'`{method}`', *cells, str(len(of[method]))])
    out = [f'**{task}**: {about["about"]}', table(['', *heads, 'seeds'], lines)]
    for size in sizes[1:]:
        out += rule_table(task, size, of)
    return out


def rule_table(task: str, size: int, of: Dict[str, List[Row]]) -> List[str]:
    """Accuracies at a size by every rule that was tried there, for the methods that have rules."""
    def rules_of(row: Row) -> Dict[str, float]:
        return {rule_name(t): accuracy(t) for t in row['tests'] if t['size'] == size and t['rule'] is not None}

    names = list(dict.fromkeys(name for rows in of.values() for row in rows for name in rules_of(row)))
    if len(names) < 2:
        return []
    lines = [[f'`{method}`', *(
        spread(rows, lambda row, n=name: rules_of(row)[n]) if name in rules_of(rows[0]) else '-'
        for name in names)] for method, rows in of.items() if rules_of(rows[0])]
    return [f'**{task}** at {size} px, by rule', table(['', *names], lines)]


def find(row: Row, size: int, turned: float = 0.) -> Row:
    """The test at a size by the rule that needs no choice."""
    return next(
        t for t in row['tests'] if (t['size'], t['turned'], t['log_n']) == (size, turned, False)
        and t['rule'] in (None, 'extrapolate'))


def rule_name(row: Row) -> str:
    return row['rule'] + (', log-n' if row['log_n'] else '')


def accuracy(row: Row) -> float:
    return share((row['right'], row['images']))


def share(counts: Sequence[int]) -> float:
    return 100 * counts[0] / max(1, counts[1])


def spread(rows: Rows, figure: Callable[[Row], float]) -> str:
    """Mean and sample standard deviation, without the latter for a single run."""
    values = [figure(row) for row in rows]
    deviation = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.1f}{deviation}'


def table(heads: List[str], lines: List[List[str]]) -> str:
    rule = ['---'] * len(heads)
    return '\n'.join(f'| {" | ".join(line)} |' for line in [heads, rule, *lines])


# -- plots

def plot_accuracy(path: Path, rows: Rows, tasks: Dict[str, Any]) -> None:
    """Draw accuracy against image size: a panel for each task, a line for each method; bars are standard deviations."""
    def draw(axes: Any, task: str, method: str, runs: Rows, style: Dict[str, Any]) -> None:
        sizes = sorted(tasks[task]['recipe']['sizes'])
        values = [[accuracy(find(row, size)) for row in runs] for size in sizes]
        axes.errorbar(
            sizes, [statistics.mean(v) for v in values], [statistics.stdev(v) if len(v) > 1 else 0 for v in values],
            marker='o', capsize=3, label=method, **style)
        axes.set_xticks(sizes)
        axes.set_xlabel(f'image size in pixels, {tasks[task]["recipe"]["sizes"][0]} in training')

    _draw(path, rows, tasks, draw)


def plot_curves(path: Path, rows: Rows, tasks: Dict[str, Any]) -> None:
    """Draw learning curves: accuracy at the size of training, mean over the seeds."""
    def draw(axes: Any, task: str, method: str, runs: Rows, style: Dict[str, Any]) -> None:
        points = list(zip(*(row['curve'] for row in runs)))
        axes.plot(
            [p[0]['step'] for p in points], [100 * statistics.mean(r['accuracy'] for r in p) for p in points],
            label=method, **style)
        axes.set_xlabel('steps')

    _draw(path, rows, tasks, draw)


def _draw(path: Path, rows: Rows, tasks: Dict[str, Any], draw: Callable[..., None]) -> None:
    panels = {task: [row for row in rows if row['task'] == task] for task in tasks}
    draw_panels(path, panels, dict.fromkeys(tasks, 'right answers, %'), draw)


def draw_panels(path: Path, panels: Dict[str, Rows], labels: Dict[str, str], draw: Callable[..., None]) -> None:
    """Draw panels side by side, one colour for each method.

    Args:
        path: PNG file.
        panels: Rows by title; those without rows are left out.
        labels: Of the vertical axis, by title.
        draw: Function of axes, title, method, the rows of the method and the style of its lines.
    """
    from matplotlib.figure import Figure

    shown = {title: rows for title, rows in panels.items() if rows}
    figure = Figure(figsize=(2 + 4.5 * len(shown), 4), layout='constrained')
    methods = list(dict.fromkeys(row['method'] for rows in shown.values() for row in rows))
    for number, (title, rows) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(1, len(shown), number)
        for index, method in enumerate(methods):
            runs = [row for row in rows if row['method'] == method]
            if runs:
                draw(axes, title, method, runs, dict(color=f'C{index}', ls='--' if method in ('ape', 'none') else '-'))
        axes.set_title(title)
        axes.set_ylabel(labels[title])
        axes.grid(alpha=.3)
    known = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(known.values(), known.keys(), loc='outside right upper')
    content = io.BytesIO()
    figure.savefig(content, format='png', dpi=110)
    write_whole(path, content.getvalue())
