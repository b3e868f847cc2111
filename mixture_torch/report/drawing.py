"""Drawing for the panels of a figure: lines of any length, logarithmic axes with plain numbers, titles and remarks."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from mixture_torch.report.run import Run
from mixture_torch.report.series import Array, buckets
from mixture_torch.report.verdicts import Verdict, noted, verdicts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Okabe and Ito, "Color universal design" (2008), without yellow, which is too light for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
QUIET = ("#dce1e8", "#c3ccd6")  # alternate colours of components that did not change
INK, GREY = "#222222", "#666666"
LINES = ("-", "--", ":")
POINTS = 500  # most buckets of a series; a panel is about as many pixels wide
CHARACTERS = 52  # in a line of text that fills the width of a panel


@attrs.frozen(eq=False, kw_only=True)
class Shown:
    """A run, and how to draw it."""

    run: Run
    verdicts: tuple[Verdict, ...]
    colours: Mapping[int, str]  # of the components to highlight
    colour: str  # of the run, used if there are several
    is_alone: bool
    span: tuple[float, float]  # first and last step of all runs

    def look(self, line: int) -> dict[str, Any]:
        """The style of a line: if there is one run, each line has a colour; otherwise each run has one."""
        return {"color": COLOURS[line]} if self.is_alone else {"color": self.colour, "linestyle": LINES[line]}


def shown(runs: Sequence[Run]) -> list[Shown]:
    """Returns how to draw these runs together."""
    ends = [float(end) for run in runs if len(run.log["step"]) for end in run.log["step"][[0, -1]]]
    span = min(ends, default=0.0), max(ends, default=1.0)
    if span[0] == span[1]:
        span = span[0] - 0.5, span[0] + 0.5
    found = [verdicts(run) for run in runs]
    return [
        Shown(
            run=run,
            verdicts=found[n],
            colours=dict(zip(noted(run, found[n]), COLOURS, strict=False)),
            colour=COLOURS[n % len(COLOURS)],
            is_alone=len(runs) == 1,
            span=span,
        )
        for n, run in enumerate(runs)
    ]


def line(axes: "Axes", step: Array, values: Array, look: Mapping[str, Any]) -> Array:
    """Draws a series, or the range of each bucket if it is long, and returns the values drawn."""
    x, low, high = buckets(step, values, POINTS)
    if len(x) < len(step):
        x, low = np.repeat(x, 2), np.stack([low, high], axis=1).ravel()
    known = np.isfinite(low)
    alone = known & ~np.append(False, known[:-1]) & ~np.append(known[1:], False)  # without a line to a neighbour
    axes.plot(x, low, **{"marker": ".", "markevery": alone} if alone.any() else {}, **look)
    return low


def keys(axes: "Axes", runs: Sequence[Shown], *labels: str) -> None:
    """Adds the label of each line to the legend."""
    for number, label in enumerate(labels):
        look = runs[0].look(number) if runs[0].is_alone else {"color": INK, "linestyle": LINES[number]}
        axes.plot([], [], label=label, **look)


def values_of(axes: "Axes") -> Array:
    """Returns all finite values of the lines that were drawn."""
    values = np.concatenate([np.empty(0), *(np.asarray(line.get_ydata(), float) for line in axes.lines)])
    finite: Array = values[np.isfinite(values)]
    return finite


def remark(axes: "Axes", text: str) -> None:
    """Replaces everything on empty axes by a sentence."""
    for artist in [*axes.lines, *axes.texts]:
        artist.remove()
    look: dict[str, Any] = {"ha": "center", "va": "center", "color": GREY, "in_layout": False}
    axes.text(0.5, 0.5, textwrap.fill(text, CHARACTERS - 10), transform=axes.transAxes, **look)
    axes.set(xticks=[], yticks=[], xlabel="", ylabel="")


def head(axes: "Axes", title: str, *, colour: str = INK) -> None:
    """Writes the title and, under it, the legend, in as many columns as there is room for."""
    if not axes.get_legend_handles_labels()[1]:
        axes.plot([], [], " ", label=" ")  # so that the titles of neighbours are level
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), CHARACTERS // (max(map(len, labels), default=0) + 5)))
    if sum(len(label) + 5 for label in labels) <= CHARACTERS + 3:
        columns = max(len(labels), 1)
    legend = axes.legend(
        handles, labels, title=title, alignment="left", ncols=columns, loc="lower left",
        bbox_to_anchor=(0.0, 1.0), borderpad=0.0, borderaxespad=0.3, handlelength=1.6, columnspacing=1.2,
        handletextpad=0.5, labelspacing=0.25, title_fontproperties={"weight": "bold", "size": 9},
    )  # fmt: skip
    legend.get_title().set_color(colour)


def over_steps(axes: "Axes", runs: Sequence[Shown]) -> None:
    """Gives all panels over steps the same axis."""
    from matplotlib.ticker import MaxNLocator

    begin, end = runs[0].span
    axes.set(xlim=(begin, end), xlabel="step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    if begin % 1:  # of a single step
        axes.set_xticks([begin + 0.5])
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")


def logarithmic(axes: "Axes") -> None:
    """Makes the vertical axis logarithmic, with room around the values above 0."""
    values = values_of(axes)
    low, high = float(values[values > 0].min()), float(values.max())
    low, high = min(low / 1.15, high / 2.0), high * 1.15
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    plain_ticks(axes.yaxis, low, high)


def plain_ticks(axis: "Axis", low: float, high: float) -> None:
    """Writes plain numbers, such as 0.001 and 1e-05, on a logarithmic axis, closer together if it is short."""
    from matplotlib.ticker import LogLocator, NullLocator

    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if high < 4 * low else (1.0, 2.0, 5.0) if high < 50 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def shorter(text: str, length: int) -> str:
    """Returns a text in one line, without its middle if it is longer than `length`."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - length // 2 - 3]}...{text[-(length // 2) :]}"
