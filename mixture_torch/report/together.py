"""The panels that show all runs on the same axes."""

from typing import TYPE_CHECKING

import numpy as np

from mixture_torch.report.drawing import Shown, keys, line, over_steps, plain_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST = 1e-7  # a smaller part of the largest eigenvalue is rounding


def variance(axes: "Axes", *shown: Shown) -> None:
    """The traces of T and B."""
    for one in shown:
        if (extra := one.run.extra) is not None:
            line(axes, extra["step"], extra["trace_T"], one.look(0))
        line(axes, one.run.log["step"], one.run.log["trace_B"], one.look(1))
    keys(axes, shown, "total (trace_T)", "between components (trace_B)")
    over_steps(axes, shown)


def share(axes: "Axes", *shown: Shown) -> None:
    """The share of the total variance that is between components."""
    for one in shown:
        if (extra := one.run.extra) is not None:
            line(axes, extra["step"], extra["share_B"], one.look(0))
    over_steps(axes, shown)


def ranks(axes: "Axes", *shown: Shown) -> None:
    """The participation ratio; effective rank and RankMe of the snapshots."""
    for one in shown:
        if (extra := one.run.extra) is not None:
            known = np.isfinite(extra["participation_ratio"])  # a wide mixture has it in every tenth step
            line(axes, extra["step"][known], extra["participation_ratio"][known], one.look(0))
        steps = np.array([entry["step"] for entry in one.run.snapshots])
        for number, name in enumerate(("effective_rank", "rankme"), 1):
            values = np.array([float(entry.get(name, np.nan)) for entry in one.run.snapshots])
            line(axes, steps, values, one.look(number))
    keys(axes, shown, "participation ratio", "effective rank", "RankMe")
    over_steps(axes, shown)


def spectrum(axes: "Axes", *shown: Shown) -> None:
    """The eigenvalues of T and B in the last snapshot."""
    widest = 1
    for one in [one for one in shown if one.run.snapshots]:
        for number, name in enumerate(("spectrum_T", "spectrum_B")):
            values = one.run.snapshots[-1][name].double().numpy()
            kept = np.flatnonzero(values > LEAST * np.nanmax(values, initial=0.0))
            axes.plot(kept + 1, values[kept], marker=".", markersize=4, **one.look(number))
            widest = max(widest, len(values))
    keys(axes, shown, "T (total)", "B (between components)")
    axes.set_xscale("log")
    axes.set(xlim=(0.9, 1.1 * widest), xlabel="direction, the largest first")
    plain_ticks(axes.xaxis, 1.0, widest)
