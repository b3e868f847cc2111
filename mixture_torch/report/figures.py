"""A figure of one or more runs, for a notebook or a paper."""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from mixture_torch.report.drawing import CHARACTERS, Shown, head, logarithmic, remark, shorter, shown, values_of
from mixture_torch.report.panels import LINE, batch, plane, verdict_lines, verdict_list, weights
from mixture_torch.report.run import Run, read_runs
from mixture_torch.report.together import ranks, share, spectrum, variance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Panel(NamedTuple):
    """What a panel draws, and what it says without data."""

    draw: Callable[..., None]  # takes the axes and the runs
    title: str
    short: str = ""  # its title after the name of a run, if each run has its own axes
    needs: str = ""  # the part of a run that it shows
    lack: str = "nothing"  # what is not there without this part
    scale: str = ""  # `log`, or `zero`, from which the axis begins


PANELS = {
    "variance": Panel(variance, "Variance", needs="extra", lack="no total", scale="log"),
    "share": Panel(share, "Share of the variance between components", needs="extra", scale="log"),
    "ranks": Panel(ranks, "Directions in use", needs="extra", lack="no participation ratio", scale="zero"),
    "spectrum": Panel(spectrum, "Eigenvalues in the last snapshot", needs="snapshots", scale="log"),
    "weights": Panel(weights, "Weights of the components", "weights", needs="extra", lack="no others"),
    "batch": Panel(batch, "Share of the batch", "share of the batch", needs="extra", scale="zero"),
    "plane": Panel(plane, "Components, seen where they differ most", "components", needs="snapshots"),
    "verdicts": Panel(verdict_list, "Verdicts", "verdicts"),
}
WHY = {"extra": "There is no mixture_extra.csv with rows.", "snapshots": "There is no snapshot yet."}
NOTHING = "All figures are 0 or unknown."
Cell: TypeAlias = tuple[Panel, Sequence[Shown]]
WIDTH, HEIGHT = 4.0, 2.65  # inches of a panel
HEAD = 0.19  # inches of a row of names
TITLE = 38  # characters in a title that fills the width of a panel
MOST = 12  # runs that get their own axes
STYLE = {
    "figure.dpi": 160,  # two columns are 1280 pixels wide
    "savefig.dpi": 160,
    "font.size": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.xmargin": 0.0,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.1,
    "text.parse_math": False,  # a `$` in the name of a run means itself
}


def plot(*runs: Run | str | os.PathLike[str], panels: Sequence[str] = tuple(PANELS), columns: int = 2) -> "Figure":
    """Returns a figure of one or more runs, finished or not.

    All runs share the panels `variance`, `share` (of the variance, between components), `ranks` and `spectrum`. Each
    run has its own `weights` (with relocations and alarms), `batch` (the share of each component in each batch),
    `plane` (the two leading directions of B, with ellipses at 1 and 2 standard deviations) and `verdicts`. A panel
    without data says what is missing. Long series are drawn as ranges, so no spike is lost.

    Args:
        runs: Run folders, or what `read_run` returned.
        panels: Names of the panels, in order.
        columns: Panels per row. Each is 4 inches wide, at 160 dots per inch.

    Raises:
        ImportError: matplotlib is not installed.
        FileNotFoundError: A folder has no `mixture.csv`.
        ValueError: A file has another format, no run is given, or a panel is unknown.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from mixture_torch import MixtureStats, plot
        >>> folder = tempfile.mkdtemp()
        >>> with MixtureStats(K=2, enabled=True, log_dir=folder) as estimator:
        ...     for step in range(3):
        ...         _ = estimator.update(torch.randn(64, 8))
        ...         estimator.log_step(step=step, epoch=0)
        ...     estimator.flush()
        >>> figure = plot(folder)
        >>> figure.savefig(f"{folder}/run.png")
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError('`plot` needs matplotlib: pip install "mixture-diagnostics[plot]".') from error
    if not runs:
        raise ValueError("There is nothing to plot: give at least one run.")
    if unknown := [name for name in panels if name not in PANELS]:
        raise ValueError(f"`panels` must be some of {', '.join(PANELS)}, got {unknown[0]!r}.")
    if not panels or columns < 1:
        raise ValueError(f"A figure needs at least one panel and one column, got {len(panels)} and {columns}.")
    all_shown = shown(read_runs(*runs))
    cells = _cells(panels, all_shown, columns)
    heights = _heights(cells, columns)
    with style.context(["default", STYLE]):  # the user's own settings could make it illegible
        layout = ConstrainedLayoutEngine(w_pad=0.08)  # inches
        figure = Figure(figsize=(WIDTH * columns, sum(heights) + HEAD * (1 + len(runs) // columns)), layout=layout)
        grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
        for place, cell in enumerate(cells):
            if cell is not None:
                _draw(figure.add_subplot(grid[divmod(place, columns)]), *cell)
        _head(figure, all_shown, columns)
    return figure


def _draw(axes: "Axes", panel: Panel, runs: Sequence[Shown]) -> None:
    panel.draw(axes, *runs)
    values = values_of(axes)
    is_empty = not (values > 0).any() if panel.scale else not (len(values) or axes.collections or axes.texts)
    without = [one.run.name for one in runs if panel.needs and not getattr(one.run, panel.needs)]
    if is_empty:
        remark(axes, WHY[panel.needs] if len(without) == len(runs) else NOTHING)
    elif panel.scale == "log":
        logarithmic(axes)
    elif panel.scale == "zero":
        axes.set_ylim(0.0, 1.08 * values.max())
    if without and not is_empty:
        of = "" if len(runs) == 1 else f" of {', '.join(without)}"
        axes.plot([], [], " ", label=shorter(f"{panel.lack}{of}", CHARACTERS - 12))
    if not panel.short or runs[0].is_alone:
        head(axes, panel.title)
    else:
        name = shorter(runs[0].run.name, TITLE - len(panel.short) - 2)
        head(axes, f"{name}: {panel.short}", colour=runs[0].colour)


def _cells(names: Sequence[str], runs: Sequence[Shown], columns: int) -> list[Cell | None]:
    """The panel and the runs of each cell, row by row; a panel that is drawn once per run begins a row."""
    cells: list[Cell | None] = []
    for panel in map(PANELS.__getitem__, names):
        shares = [[one] for one in runs[:MOST]] if panel.short else [runs]
        cells += [None] * (-len(cells) % columns if len(shares) > 1 else 0)
        cells += [(panel, share) for share in shares]
    return cells


def _heights(cells: Sequence[Cell | None], columns: int) -> list[float]:
    """The height of each row in inches; a row with only verdicts is as high as its text."""
    heights = []
    for begin in range(0, len(cells), columns):
        row = [cell for cell in cells[begin : begin + columns] if cell is not None]
        n_lines = max(len(verdict_lines(runs[0])) for _, runs in row)
        is_text = all(panel.draw is verdict_list for panel, _ in row)
        heights.append(0.3 + LINE * max(n_lines, 2) / 72 if is_text else HEIGHT)
    return heights


def _head(figure: "Figure", runs: Sequence[Shown], columns: int) -> None:
    """Writes the name of the only run, or the colours of several."""
    from matplotlib.lines import Line2D

    if len(runs) == 1:
        figure.suptitle(f"{shorter(runs[0].run.name, CHARACTERS)}   ({_size(runs[0].run)})", x=0.02, ha="left", size=9)
        return
    handles = [
        Line2D([], [], color=one.colour, linewidth=2.5, label=shorter(one.run.name, CHARACTERS - 8)) for one in runs
    ]
    if len(runs) > MOST:
        handles.append(Line2D([], [], linestyle="", label=f"the first {MOST} have panels of their own"))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, fontsize=9)


def _size(run: Run) -> str:
    """How many rows a run has, K and D."""
    K = f", K = {run.log['K'][-1]}" if len(run.log["K"]) else ""
    return f"{len(run.log['step']):,} rows{K}" + ("" if run.D is None else f", D = {run.D}")
