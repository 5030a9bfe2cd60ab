"""Results of the benchmarks as Markdown tables, and as a plot of the ratios.

    python benchmarks/report.py benchmarks/results/{speed,rotation,memory}*.json
    python benchmarks/report.py speed.json --plot speed.png     # needs matplotlib: pip install 'timm_rope[bench]'

Of every file one table or two: models in rows, settings in columns. Other files are refused.
"""
import argparse
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from machine import Row, output_file, read_result, summary

Result = Dict[str, Any]
Table = Dict[str, Dict[str, str]]  # row -> column -> cell


def table(corner: str, cells: Table) -> str:
    """Cells as a Markdown table; rows and columns in the order in which they first come."""
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    lines = [[corner, *columns], ['---'] * (1 + len(columns))]
    lines += [[name, *(row.get(column, '-') for column in columns)] for name, row in cells.items()]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def fill(rows: List[Row], name: Callable[[Row], str], cells: Callable[[Row], Dict[str, Optional[str]]]) -> Table:
    """Row names -> columns -> texts, without those that are None."""
    out: Table = {}
    for row in rows:
        found = {'failed': None} if row.get('error') else cells(row)
        out.setdefault(name(row), {}).update({k: v for k, v in found.items() if v is not None})
    return out


# -- one benchmark each

def setting_of(row: Row) -> str:
    return f'{row["mode"]}, {row["precision"]} {row["run"]}, {row["batch"]} x {row["size"]} px'


def speed_tables(result: Result) -> List[str]:
    rows = result['rows']

    def ratio(row: Row) -> Dict[str, Optional[str]]:
        if 'ratio' not in row:
            return {}
        unit = row['model'] == result['settings']['models'][0]
        return {setting_of(row): f'{row["ratio"]:.2f}' + (f' ({row["milliseconds"]:.4g} ms)' if unit else '')}

    def beside(row: Row) -> Dict[str, Optional[str]]:
        where, moved, memory = setting_of(row), row.get('bytes_per_element'), row['memory_bytes']
        kind = 'MB kept' if result['machine']['device'] == 'cpu' else 'MB peak'
        return {
            f'B per element: {where}': None if moved is None else f'{moved:.1f}',
            f'{kind}: {where}': None if memory is None else f'{memory / 1e6:,.0f}'}

    name = model_of
    texts = [table('time, ratio', with_failures(rows, fill(rows, name, ratio)))]
    more = fill(rows, name, beside)
    return texts + ([table('beside', more)] if any(more.values()) else [])


def with_failures(rows: List[Row], cells: Table) -> Table:
    for row in rows:
        if row.get('error'):
            cells[model_of(row)][setting_of(row)] = 'failed'
    return cells


def model_of(row: Row) -> str:
    return f'`{row["model"]}`'


def rotation_tables(result: Result) -> List[str]:
    def cells(row: Row) -> Dict[str, Optional[str]]:
        where = f'{row["dtype"]}, {row["batch"]} x {row["tokens"]} tokens'
        return {
            f'forward: {where}': f'{row["forward_copies"]:.2f} ({row["fraction_of_copy"]:.0%})',
            f'training: {where}': f'{row["training_copies"]:.2f}'}

    def name(row: Row) -> str:
        took = '' if row['took'] in (row['route'], None) else f': {row["took"]}'
        return f'`{row["encoding"]}`, {row["route"]}{took}'

    return [table('copies of q and k (part of its bandwidth)', fill(result['rows'], name, cells))]


def memory_tables(result: Result) -> List[str]:
    def cells(row: Row) -> Dict[str, Optional[str]]:
        where = f'{row["precision"]}, {row["batch"]} x {row["size"]} px'
        return {
            f'kept per block: {where}': None if row['kept_units'] is None else f'{row["kept_units"]:.2f}',
            f'peak: {where}': f'{row["peak_ratio"]:.3f} ({row["peak_bytes"] / 1e6:,.0f} MB)'}

    return [table('memory of training', fill(result['rows'], model_of, cells))]


def train_tables(result: Result) -> List[str]:
    def cells(row: Row) -> Dict[str, Optional[str]]:
        return {
            'loss': f'{row["first_loss"]:.3f} -> {row["last_loss"]:.3f}', 'right answers': f'{row["accuracy"]:.0%}',
            'frequencies learned': f'{row["freqs"]:,}', 'images / s': f'{row["images_per_second"]:,.0f}'}

    return [table('short training', fill(result['rows'], model_of, cells))]


TABLES: Dict[str, Callable[[Result], List[str]]] = dict(
    speed=speed_tables, rotation=rotation_tables, memory=memory_tables, train_loop=train_tables)


def report(result: Result) -> str:
    """Tables of one result under a line about where it was measured."""
    failed = [f'{row.get("model", row.get("encoding"))}: {row["error"]}' for row in result['rows'] if row.get('error')]
    rounds = f', {result["settings"]["rounds"]} rounds' if 'rounds' in result['settings'] else ''
    heading = f'{result["benchmark"]}: {summary(result["machine"])}{rounds}' + (
        '' if result['finished'] else ', unfinished')
    return '\n\n'.join([heading, *TABLES[result['benchmark']](result), *(f'failed: {line}' for line in failed)])


# -- the plot

def plot(results: List[Result], path: Path) -> None:
    """Bars of the ratios with their quartiles, one panel for each setting of each speed result.

    Raises:
        ValueError: There is no ratio to draw, or no matplotlib.
    """
    panels: Dict[Tuple[str, str], List[Row]] = {}
    for result in results:
        for row in result['rows']:
            if result['benchmark'] == 'speed' and 'ratio' in row:
                panels.setdefault((result['machine']['device'], setting_of(row)), []).append(row)
    if not panels:
        raise ValueError('--plot draws ratios of speed.py; none of these files has any.')
    try:
        import matplotlib

        matplotlib.use('Agg')
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("--plot needs matplotlib, which is not installed: pip install 'timm_rope[bench]'.") from None
    tallest = max(map(len, panels.values()))
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, len(panels) * (.8 + .3 * tallest)), squeeze=False, layout='constrained')
    for axis, ((device, setting), rows) in zip(axes[:, 0], panels.items()):
        ratios = [row['ratio'] for row in rows]
        # a median of few rounds may lie on a quartile, and rounding must not put it outside
        spread = [[max(0., row['ratio'] - row['quartiles'][0]) for row in rows],
                  [max(0., row['quartiles'][1] - row['ratio']) for row in rows]]
        axis.barh([row['model'] for row in rows], ratios, xerr=spread, color='#4c72b0', ecolor='#333333')
        axis.axvline(1, color='#333333', linewidth=.8)
        axis.invert_yaxis()
        axis.set_xlim(left=min(.9, min(ratios) - .05))
        axis.set_title(f'{device}: {setting}', fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set_xlabel('time, ratio to the first model', fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='+', type=Path, metavar='FILE', help='results in JSON')
    parser.add_argument('--partial', action='store_true', help='take results of benchmarks that did not finish')
    parser.add_argument('--plot', type=output_file, metavar='FILE', help='draw the ratios of speed.py into FILE (.png)')
    args = parser.parse_args(argv)
    try:
        results = [read_result(path, args.partial) for path in args.files]
        for path, result in zip(args.files, results):
            if result['benchmark'] not in TABLES:
                raise ValueError(f'{path} is of the benchmark {result["benchmark"]!r}; known are {", ".join(TABLES)}.')
        if args.plot:
            plot(results, args.plot)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print('\n\n'.join(map(report, results)))
    return 0


if __name__ == '__main__':
    sys.exit(main())
