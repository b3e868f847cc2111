"""The panels of a figure; one without data says what is missing."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mixture_torch.report.drawing import (
    CHARACTERS,
    COLOURS,
    GREY,
    INK,
    NOTHING,
    POINTS,
    QUIET,
    Shown,
    from_zero,
    has_rows,
    head,
    head_of,
    keys,
    lacking,
    line,
    logarithmic,
    over_steps,
    plain_ticks,
    remark,
)
from mixture_torch.report.series import Array, buckets, least_even
from mixture_torch.report.verdicts import verdicts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST = 1e-7  # a smaller part of the largest eigenvalue is rounding
MOST_NUMBERED = 16  # components that are numbered in the plane
MOST_LINES, LINE = 12, 12.0  # lines of text in a panel, and the height of each in points
NO_EXTRA = "there is no mixture_extra.csv with rows"
NO_SNAPSHOT = "there is no snapshot yet"
MARKS = {
    "relocation": "|", "composition": "v", "trace_T": "^", "share_B": "D", "collapse": "X", "no structure": "s",
    "dimensional collapse": "P", "point component": "o", "dead component": "x",
}  # fmt: skip
LEVELS = {"wrong": "#D55E00", "changed": "#E69F00", "fine": "#009E73", "unknown": "#999999"}


def variance(axes: "Axes", shown: Sequence[Shown]) -> None:
    """The traces of T and B."""
    drawn = []
    for one in shown:
        extra, log = one.run.extra, one.run.log
        if has_rows(extra):
            drawn.append(line(axes, extra["step"], extra["trace_T"], one.look(0)))
        drawn.append(line(axes, log["step"], log["trace_B"], one.look(1)))
    has_total = [has_rows(one.run.extra) for one in shown]
    keys(axes, shown, ({0: "total (trace_T)"} if any(has_total) else {}) | {1: "between components (trace_B)"})
    if any(has_total):
        lacking(axes, shown, lambda one: has_rows(one.run.extra), NO_EXTRA, what="no total")
    else:
        axes.plot([], [], " ", label="no total, as there is no mixture_extra.csv")
    over_steps(axes, shown)
    logarithmic(axes, drawn, "no row has a variance above 0")
    head(axes, "Variance")


def share(axes: "Axes", shown: Sequence[Shown]) -> None:
    """The share of the total variance that is between components."""
    extras = [(one, one.run.extra) for one in shown]
    drawn = [line(axes, extra["step"], extra["share_B"], one.look(0)) for one, extra in extras if has_rows(extra)]
    over_steps(axes, shown)
    logarithmic(axes, drawn, "no row has a share above 0" if drawn else NO_EXTRA)
    lacking(axes, shown, lambda one: has_rows(one.run.extra), NO_EXTRA)
    head(axes, "Share of the variance between components")


def ranks(axes: "Axes", shown: Sequence[Shown]) -> None:
    """The participation ratio; effective rank and RankMe of the snapshots."""
    for one in shown:
        series = []
        if has_rows(one.run.extra):
            series.append((0, one.run.extra["step"], one.run.extra["participation_ratio"]))
        steps = np.array([entry["step"] for entry in one.run.snapshots])
        for number, name in enumerate(("effective_rank", "rankme"), 1):
            series.append((number, steps, np.array([float(entry.get(name, np.nan)) for entry in one.run.snapshots])))
        for number, step, values in series:
            known = np.isfinite(values)  # of a wide mixture, the ratio is computed in every tenth step
            line(axes, step[known], values[known], one.look(number))
    over_steps(axes, shown)
    keys(axes, shown, {0: "participation ratio", 1: "effective rank", 2: "RankMe"})
    from_zero(axes)
    lacking(
        axes, shown, lambda one: has_rows(one.run.extra) or bool(one.run.snapshots), f"{NO_EXTRA}, and {NO_SNAPSHOT}"
    )
    widths = {one.run.D for one in shown} - {None}
    head(axes, f"Directions in use, of {widths.pop()}" if len(widths) == 1 else "Directions in use")


def spectrum(axes: "Axes", shown: Sequence[Shown]) -> None:
    """The eigenvalues of T and B in the last snapshot."""
    drawn, widest, steps = [], 1, set()
    for one in [one for one in shown if one.run.snapshots]:
        entry = one.run.snapshots[-1]
        steps.add(entry["step"])
        for number, name in enumerate(("spectrum_T", "spectrum_B")):
            values = entry[name].double().numpy()
            kept = np.flatnonzero(values > LEAST * np.nanmax(values, initial=0.0))
            axes.plot(kept + 1, values[kept], marker=".", markersize=4, **one.look(number))
            drawn.append(values[kept])
            widest = max(widest, len(values))
    axes.set_xscale("log")
    axes.set(xlim=(0.9, 1.1 * widest), xlabel="direction, the largest first")
    plain_ticks(axes.xaxis, 1.0, widest)
    keys(axes, shown, {0: "T (total)", 1: "B (between components)"})
    logarithmic(axes, drawn, "all eigenvalues are 0" if drawn else NO_SNAPSHOT)
    lacking(axes, shown, lambda one: bool(one.run.snapshots), NO_SNAPSHOT)
    head(axes, "Eigenvalues" + (f" at step {steps.pop():,}" if len(steps) == 1 else " in the last snapshot"))


def weights(axes: "Axes", one: Shown) -> None:
    """The mixing weights, stacked, below marks for relocations and alarms."""
    run, top = one.run, 1.0
    if has_rows(run.extra):
        step, pi = least_even(run.extra["step"], run.extra["pi"], POINTS)
        if len(step) == 1:
            step, pi = np.array(one.span), np.repeat(pi, 2, axis=0)
        K = pi.shape[1]
        fills = [one.changed.get(k, QUIET[k % 2]) for k in range(K)]
        axes.stackplot(step, pi.T, colors=fills, edgecolor="white", linewidth=0.4 if K <= 16 else 0.0)
        top = _events(axes, one)
    elif len(run.log["step"]):
        for number, name in enumerate(("pi_max", "pi_min")):
            line(axes, run.log["step"], run.log[name], {"color": COLOURS[number], "label": name})
        axes.plot([], [], " ", label="no others, as there is no mixture_extra.csv")
    over_steps(axes, [one])
    axes.set(ylim=(0.0, top), yticks=(0.0, 0.5, 1.0))
    axes.grid(visible=False)
    if not np.isfinite(run.log["pi_max"]).any():
        remark(axes, NOTHING)
    head_of(axes, one, "Weights of the components", "weights")


def _events(axes: "Axes", one: Shown) -> float:
    """Marks relocations and the first steps of alarms, one row per kind, and returns the upper end of the axis."""
    extra, events, top = one.run.extra, dict[str, list[float]](), 1.0
    if has_rows(extra):
        x, _, moved = buckets(extra["step"], extra["n_relocated"], POINTS)
        events["relocation"] = x[moved > 0].tolist()
    for alarm in one.run.alarms:
        events.setdefault(alarm.kind, []).append(alarm.since)
    for kind, steps in events.items():
        if steps:
            top += 0.09
            where = sorted(set(steps))
            look: dict[str, Any] = {"marker": MARKS[kind], "color": INK, "markersize": 4, "linestyle": ""}
            axes.plot(
                where,
                np.full(len(where), top - 0.03),
                label=kind if kind == "relocation" else f"alarm: {kind}",
                clip_on=False,
                **look,
            )
    return top + 0.01


def batch(axes: "Axes", one: Shown) -> None:
    """The share of each component in each batch; components that changed are in colour."""
    extra = one.run.extra
    if has_rows(extra):
        rows = extra["n_rows"] - extra["n_ignored"]
        known, K = np.where(rows > 0, rows, np.nan), extra["n"].shape[1]
        if one.changed:
            axes.plot([], [], " ", label="component")
        for k in sorted(range(K), key=lambda k: (k in one.changed, k)):  # those that changed in front
            label, colour = (str(k), one.changed[k]) if k in one.changed else (None, QUIET[1])
            line(axes, extra["step"], extra["n"][:, k] / known, {"color": colour, "label": label, "linewidth": 0.9})
        if not one.changed:
            axes.plot([], [], color=QUIET[1], label="a component; none raised an alarm")
        elif len(one.changed) < K:
            axes.plot([], [], color=QUIET[1], label="others")
    over_steps(axes, [one])
    from_zero(axes)
    lacking(axes, [one], lambda one: has_rows(one.run.extra), NO_EXTRA)
    head_of(axes, one, "Share of the batch", "share of the batch")


def plane(axes: "Axes", one: Shown) -> None:
    """The last snapshot on the plane of the two leading directions of B."""
    if one.run.snapshots:
        components(axes, one.run.snapshots[-1], one.changed, inches=(3.2, 1.8))
    lacking(axes, [one], lambda one: bool(one.run.snapshots), NO_SNAPSHOT)
    head_of(axes, one, "Components, seen where they differ most", "components")


def components(
    axes: "Axes", entry: Mapping[str, Any], colours: Mapping[int, str], *, inches: tuple[float, float]
) -> None:
    """Draws a snapshot on axes of about that size; components without a colour are grey, and behind the others."""
    from matplotlib.patches import Ellipse

    mean, covariance = entry["plane_mean"].double().numpy(), entry["plane_covariance"].double().numpy()
    weight = entry["weight"].double().numpy()
    pi = weight / max(weight.sum(), 1e-300)
    known = np.isfinite(mean).all(axis=1) & np.isfinite(covariance).all(axis=(1, 2)) & (pi > 0)
    order = sorted(np.flatnonzero(known).tolist(), key=lambda k: (k in colours, pi[k]))
    for k in order:
        size, turn = np.linalg.eigh(covariance[k])
        width, height = 2.0 * np.sqrt(np.clip(size, 0.0, None))
        angle = float(np.degrees(np.arctan2(turn[1, 0], turn[0, 0])))
        look: dict[str, Any] = {
            "fill": False,
            "edgecolor": colours.get(k, GREY),
            "linewidth": 1.6 if k in colours else 0.8,
        }
        for sigmas, alpha in ((2.0, 0.45), (1.0, 0.9)):
            axes.add_patch(Ellipse(mean[k], sigmas * width, sigmas * height, angle=angle, alpha=alpha, **look))
    fills = [colours.get(k, GREY) for k in order]
    axes.scatter(mean[order, 0], mean[order, 1], s=600.0 * pi[order], c=fills, linewidths=0, alpha=0.4)
    _number(axes, mean, order, inches)
    axes.plot([], [], "o", color=GREY, markersize=5, label="mean, larger if heavier")
    axes.plot([], [], color=GREY, linewidth=0.8, label="1 and 2 sigma")
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xlabel="first direction of B; the second upwards")
    if not order:
        remark(axes, "no component has weight")


def _number(axes: "Axes", mean: Array, order: Sequence[int], inches: tuple[float, float]) -> None:
    """Writes the numbers of components on their means, the last in `order` first, as long as there is room."""
    from matplotlib.patheffects import withStroke

    inch = max(axes.dataLim.width / inches[0], axes.dataLim.height / inches[1])  # how far an inch reaches
    placed: list[Array] = []
    for k in reversed(order[-MOST_NUMBERED:]):
        if all(np.abs(mean[k] - other).max() > 0.15 * inch for other in placed):
            placed.append(mean[k])
            halo = [withStroke(linewidth=2.0, foreground="white")]
            axes.annotate(str(k), mean[k], ha="center", va="center", color=INK, path_effects=halo, in_layout=False)


def verdict_lines(one: Shown) -> list[tuple[str, str]]:
    """Returns verdicts and missing parts as lines of text, each with the colour of the mark before it."""
    said = [(LEVELS[verdict.level], verdict.title) for verdict in verdicts(one.run)]
    lines = []
    for colour, text in [*said, *((GREY, text) for text in one.run.missing)]:
        wrapped = textwrap.wrap(text, CHARACTERS, max_lines=3, placeholder=" ...")
        lines += [(colour if n == 0 else "none", part) for n, part in enumerate(wrapped)]
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], ("none", "and more, which `report` shows")]


def verdict_list(axes: "Axes", one: Shown) -> None:
    """The verdicts, and what is missing."""
    axes.set_axis_off()
    look: dict[str, Any] = {
        "xycoords": "axes fraction", "textcoords": "offset points", "va": "top", "in_layout": False,
    }  # fmt: skip
    for n, (colour, text) in enumerate(verdict_lines(one)):
        axes.annotate("\u25a0", (0.0, 1.0), (0, 8 - LINE * n), color=colour, **look)
        axes.annotate(text, (0.0, 1.0), (12, 8 - LINE * n), color=INK, **look)
    head_of(axes, one, "Verdicts", "verdicts")
