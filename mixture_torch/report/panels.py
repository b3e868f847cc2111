"""The panels that show one run."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mixture_torch.report.drawing import CHARACTERS, COLOURS, GREY, INK, POINTS, QUIET, Shown, line, over_steps, remark
from mixture_torch.report.series import Array, buckets, least_even

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NUMBERED = 16  # components that are numbered in the plane
MOST_LINES, LINE = 12, 12.0  # lines of text in a panel, and the height of each in points
MARKS = {
    "relocation": "|", "alarm: composition": "v", "alarm: trace_T": "^", "alarm: share_B": "D", "alarm: collapse": "X",
    "alarm: no structure": "s", "alarm: dimensional collapse": "P", "alarm: dead component": "x",
}  # fmt: skip
LEVELS = {"wrong": "#D55E00", "changed": "#E69F00", "fine": "#009E73", "unknown": "#999999"}


def weights(axes: "Axes", one: Shown) -> None:
    """The mixing weights, stacked, below marks for relocations and alarms."""
    log, extra = one.run.log, one.run.extra
    if extra is None:
        for number, name in enumerate(("pi_max", "pi_min")):
            line(axes, log["step"], log[name], {"color": COLOURS[number], "label": name})
    elif np.isfinite(extra["pi"]).any():
        step, pi = least_even(extra["step"], extra["pi"], POINTS)
        if len(step) == 1:
            step, pi = np.array(one.span), np.repeat(pi, 2, axis=0)
        K = pi.shape[1]
        fills = [one.colours.get(k, QUIET[k % 2]) for k in range(K)]
        axes.stackplot(step, pi.T, colors=fills, edgecolor="white", linewidth=0.4 if K <= 16 else 0.0)
    over_steps(axes, [one])
    axes.set(ylim=(0.0, _events(axes, one)), yticks=(0.0, 0.5, 1.0))
    axes.grid(visible=False)


def _events(axes: "Axes", one: Shown) -> float:
    """Marks relocations and the first steps of alarms, one row per kind, and returns the upper end of the axis."""
    events, top = dict[str, list[float]](), 1.01
    if (extra := one.run.extra) is not None:
        x, _, moved = buckets(extra["step"], extra["n_relocated"], POINTS)
        events = {"relocation": x[moved > 0].tolist()} if moved.any() else {}
    for alarm in one.run.alarms:
        events.setdefault(f"alarm: {alarm.kind}", []).append(alarm.since)
    for label, steps in events.items():
        top += 0.09
        where = sorted(set(steps))
        look: dict[str, Any] = {"marker": MARKS[label], "color": INK, "markersize": 4, "linestyle": ""}
        axes.plot(where, np.full(len(where), top - 0.04), label=label, clip_on=False, **look)
    return top


def batch(axes: "Axes", one: Shown) -> None:
    """The share of each component in each batch; components to highlight are in colour."""
    if (extra := one.run.extra) is not None:
        rows = extra["n_rows"] - extra["n_ignored"]
        known, K = np.where(rows > 0, rows, np.nan), extra["n"].shape[1]
        for k in sorted(range(K), key=lambda k: (k in one.colours, k)):  # those in colour in front
            look = {"color": one.colours.get(k, QUIET[1]), "label": str(k) if k in one.colours else None}
            line(axes, extra["step"], extra["n"][:, k] / known, {"linewidth": 0.9, **look})
        if len(one.colours) < K:
            others = "other components" if one.colours else "a component; none raised an alarm"
            axes.plot([], [], color=QUIET[1], label=others)
    over_steps(axes, [one])


def plane(axes: "Axes", one: Shown) -> None:
    """The last snapshot on the plane of the two leading directions of B."""
    if one.run.snapshots:
        components(axes, one.run.snapshots[-1], one.colours, inches=(3.2, 1.8))


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
        remark(axes, "No component has weight.")


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
    said = [(LEVELS[verdict.level], verdict.title) for verdict in one.verdicts]
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
