"""What trackers show: figures under `mixture/`, and a picture of the components."""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from mixture_torch.report.drawing import COLOURS
from mixture_torch.report.panels import components

READINGS = ("effective_rank", "rankme", "alpha_req", "nc1", "lidar", "excess")  # only in snapshots


def named(figures: Mapping[str, float]) -> dict[str, float]:
    """Returns the figures that are not nan, with `mixture/` before their names."""
    return {f"mixture/{name}": value for name, value in figures.items() if not math.isnan(value)}


def readings(entry: Mapping[str, Any]) -> dict[str, float]:
    """Returns the figures that only snapshots have, as `named` does."""
    return named({name: entry[name] for name in READINGS if name in entry})


def plane(entry: Mapping[str, Any]) -> npt.NDArray[np.uint8] | None:
    """Returns a picture of a snapshot, (600, 600, 3), or None if matplotlib is not installed.

    It shows the components on the plane of the two leading directions of B, with ellipses at 1 and 2 sigma. Heavier
    components have larger dots; one without weight is left out.
    """
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 6.0), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    colours = {k: COLOURS[k % len(COLOURS)] for k in range(len(entry["weight"]))}
    components(axes, entry, colours, inches=(5.0, 5.0))
    shown = float(entry["spectrum_B"][:2].sum() / entry["spectrum_B"].sum().clamp(min=1e-30))
    axes.set_title(
        f"Components at step {entry['step']}, with ellipses at 1 and 2 sigma\nThe plane has {shown:.0%} of trace_B"
    )
    canvas = FigureCanvasAgg(figure)  # without pyplot, whose state belongs to the user
    canvas.draw()  # type: ignore[no-untyped-call]  # matplotlib has not annotated it
    return np.array(canvas.buffer_rgba())[:, :, :3]  # type: ignore[no-untyped-call]  # matplotlib has not annotated it
