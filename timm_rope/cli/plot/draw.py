"""Draws the values of `values.py`: a row for each kind, a column for each model, with the same scales in a row.

In come values of several models, out comes a matplotlib figure; nothing is measured here. A function of `KINDS` gets
the subfigure of one model, its values, and those of all models, from which it takes its scales.
"""
from typing import Any, Callable, Dict, List, NamedTuple

from matplotlib.figure import Figure

Values = Dict[str, Any]


class Row(NamedTuple):
    """How a kind is drawn: by what, under which title, and how high in inches for the values of one model."""
    draw: Callable[[Any, Values, List[Values]], None]
    title: str
    height: Callable[[Values], float]


def figure_of(kinds: List[str], names: List[str], values: List[Dict[str, Values]], width: float = 8.) -> Figure:
    """A page.

    Args:
        kinds: Rows, keys of KINDS.
        names: Columns, one for each model.
        values: Of each model, kind -> values, or `{'missing': reason}`.
        width: Of a column in inches.
    """
    drawn = [[each[kind] for each in values if 'missing' not in each[kind]] for kind in kinds]
    heights = [max(map(KINDS[kind].height, every), default=1.) for kind, every in zip(kinds, drawn)]
    figure = Figure(figsize=(width * len(names), sum(heights)), layout='constrained')
    cells = figure.subfigures(len(kinds), len(names), squeeze=False, height_ratios=heights)
    for row, kind, every in zip(cells, kinds, drawn):
        for cell, name, each in zip(row, names, values):
            cell.suptitle(f'{name}: {KINDS[kind].title}', fontsize=11, fontweight='bold')
            if 'missing' in each[kind]:
                cell.text(0.5, 0.45, each[kind]['missing'], ha='center', va='center', wrap=True)
            else:
                KINDS[kind].draw(cell, each[kind], every)
    return figure


def frequencies(cell: Any, values: Values, every: List[Values]) -> None:
    left, right = cell.subplots(1, 2, width_ratios=[1, 1.25])
    count = len(values['blocks'])
    colors = _colors(count)
    reach = max(abs(c) for each in every for block in each['blocks'] for wave in block['waves'] for c in wave) or 1.
    for block, color in zip(values['blocks'], colors):
        left.plot(*zip(*block['waves']), '.', color=color, markersize=2.5, alpha=0.7)
    left.set(xlim=(-1.08 * reach, 1.08 * reach), ylim=(1.08 * reach, -1.08 * reach), aspect='equal',
             xlabel='$w_x$, radians per patch', ylabel='$w_y$, radians per patch')
    left.set_title('wave vectors' if values['blocks'][0]['size'] == 2 else 'frequencies by direction', fontsize=10)
    lengths = [_lengths(block) for block in values['blocks']]
    parts = right.boxplot(lengths, positions=range(count), widths=0.6, whis=(0, 100), patch_artist=True)
    for box, color in zip(parts['boxes'], colors):
        box.set(facecolor=color, alpha=0.7)
    for median in parts['medians']:
        median.set(color='black')
    all_lengths = [length for each in every for block in each['blocks'] for length in _lengths(block)]
    shortest, longest = min(all_lengths), max(all_lengths)
    right.axhline(3.14159265, color='grey', linestyle=':', linewidth=1)
    right.text(count - 0.5, 3.3, 'aliased above $\\pi$', ha='right', fontsize=8, color='grey')
    right.set(yscale='log', xlabel='block', ylabel='length, radians per patch',
              ylim=(shortest / 1.5, max(6., 1.5 * longest)))
    _block_ticks(right, count)
    right.set_title('lengths: all, quartiles, median', fontsize=10)


def _lengths(block: Values) -> List[float]:
    """Lengths of the waves of a block; the axis is logarithmic, so those of no length are drawn at its lower end."""
    return [max((x * x + y * y) ** 0.5, 1e-3) for x, y in block['waves']]


def patterns(cell: Any, values: Values, every: List[Values]) -> None:
    rows = _rows_of_patterns(values)
    axes = cell.subplots(len(rows), max(3, *map(len, rows)), squeeze=False)
    for ax in axes.flat[sum(map(len, rows)):]:
        ax.axis('off')  # a single map would be as large as the page
    for line, row in zip(axes, rows):
        for ax, (title, scores) in zip(line, row):
            height, width = len(scores), len(scores[0])
            extent = (-width / 2, width / 2, height / 2, -height / 2)
            shown = ax.imshow(scores, cmap='RdBu_r', vmin=-1, vmax=1, extent=extent)
            ax.set_title(title, fontsize=9)
            ax.tick_params(labelsize=7)
    for ax in axes[-1][:len(rows[-1])]:
        ax.set_xlabel('offset in patches', fontsize=8)
    cell.colorbar(shown, ax=axes, shrink=0.8).set_label('mean score of $q = k$', fontsize=8)


def _rows_of_patterns(values: Values) -> List[List[Any]]:
    """(title, map) in rows: a row for each block, or one row of blocks where all heads are alike."""
    blocks = values['blocks']
    rows = [[(f'{b["name"]}, head {i}', each) for i, each in enumerate(b['maps'])] for b in blocks]
    if all(block['heads'] == 1 for block in blocks):
        return [[(block['name'], block['maps'][0]) for block in blocks]]
    return rows


def distance(cell: Any, values: Values, every: List[Values]) -> None:
    ax = _by_block(cell, values, every)
    ax.set_ylabel('mean attention distance, pixels')


def entropy(cell: Any, values: Values, every: List[Values]) -> None:
    ax = _by_block(cell, values, every, [block['most'] for each in every for block in each['blocks']])
    most = [block['most'] for block in values['blocks']]
    ax.plot(range(len(most)), most, ':', color='grey', label='$\\ln N$, uniform attention')
    ax.legend(fontsize=8)
    ax.set_ylabel('mean attention entropy, nats')


def _by_block(cell: Any, values: Values, every: List[Values], also: Any = ()) -> Any:
    ax = cell.subplots()
    blocks = values['blocks']
    for i, block in enumerate(blocks):
        ax.plot([i] * len(block['heads']), block['heads'], '.', color='tab:blue', alpha=0.6,
                label='a head' if i == 0 else None)
    ax.plot(range(len(blocks)), [sum(b['heads']) / len(b['heads']) for b in blocks], '-', color='tab:orange',
            label='mean of the heads')
    top = max([*also, *(h for each in every for block in each['blocks'] for h in block['heads'])])
    ax.set(xlabel='block', ylim=(0, 1.08 * top))
    _block_ticks(ax, len(blocks))
    ax.legend(fontsize=8)
    return ax


def fourier(cell: Any, values: Values, every: List[Values]) -> None:
    axes = cell.subplots(1, 4)
    for i, each in enumerate(values['images']):
        axes[2 * i].imshow(each['image'], cmap='gray', vmin=0, vmax=1)
        axes[2 * i].set_title(each['kind'], fontsize=9)
        shown = axes[2 * i + 1].imshow(each['drawn'], cmap='gray', vmin=0, vmax=1)
        axes[2 * i + 1].set_title(f'MSE {each["mse"]:.2g}, SSIM {each["ssim"]:.2f}', fontsize=9)
    for ax in axes:
        ax.set(xticks=[], yticks=[])
    cell.colorbar(shown, ax=list(axes), shrink=0.6)
    cell.supxlabel(f'{values["waves"]} of 4096 waves of 64 x 64 patches', fontsize=9)


def equivariance(cell: Any, values: Values, every: List[Values]) -> None:
    left, right = cell.subplots(1, 2)
    for ax, name, title in ((left, 'scores', 'scores of random queries and keys'), (right, 'logits', 'logits')):
        for axis, marker in (('x', 'o-'), ('y', 's--')):
            ax.plot(values['steps'], values[name][axis], marker, markersize=4, label=f'along {axis}')
        top = max([0.1, *(v for each in every for axis in 'xy' for v in each[name][axis])])
        ax.set(xlabel='shift, patches', ylabel='relative change', ylim=(-0.04 * top, 1.08 * top))
        ax.set_title(title, fontsize=10)
        ax.legend(fontsize=8)


def attention(cell: Any, values: Values, every: List[Values]) -> None:
    kinds = ['token', 'middle'] if values['images'][0]['token'] is not None else ['middle']
    titles = dict(token='class token', middle='patch in the middle')
    axes = cell.subplots(len(values['images']), 1 + len(kinds), squeeze=False)
    for row, each in zip(axes, values['images']):
        row[0].imshow(each['image'])
        row[0].set_title('image', fontsize=9)
        for ax, kind in zip(row[1:], kinds):
            shown = ax.imshow(each[kind], cmap='viridis', vmin=0)
            ax.set_title(f'{titles[kind]}, {values["name"]}{", first window" if values["window"] else ""}', fontsize=9)
            cell.colorbar(shown, ax=ax, shrink=0.8, label='weight')
        for ax in row:
            ax.set(xticks=[], yticks=[])


def _colors(count: int) -> List[Any]:
    from matplotlib import colormaps

    return [colormaps['viridis'](i / max(1, count - 1)) for i in range(count)]


def _block_ticks(ax: Any, count: int) -> None:
    step = -(-count // 12)
    ax.set_xticks(range(0, count, step), [str(i) for i in range(0, count, step)])
    ax.set_xlim(-0.6, count - 0.4)


KINDS: Dict[str, Row] = dict(
    frequencies=Row(frequencies, 'frequencies', lambda values: 4.),
    patterns=Row(patterns, 'attention by position alone', lambda values: 2.2 * len(_rows_of_patterns(values)) + 0.6),
    distance=Row(distance, 'attention distance', lambda values: 3.),
    entropy=Row(entropy, 'attention entropy', lambda values: 3.),
    fourier=Row(fourier, 'images that its waves can draw', lambda values: 2.8),
    equivariance=Row(equivariance, 'change under a shift', lambda values: 3.2),
    attention=Row(attention, 'attention of the last block', lambda values: 0.4 + 2.8 * len(values['images'])),
)
