"""How the cost of a step grows with N, D and K."""

import importlib
import io
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks import cases
from benchmarks.cases import COMPILED, ESTIMATOR, PRODUCT, Settings, Size
from benchmarks.pages import Table, milliseconds, present, ratio
from benchmarks.timing import gpu_medians, minima, threads, warm_up

TITLE = "Growth"
BASES = {"N": Size(1, 128, 8), "D": Size(1024, 1, 8), "K": Size(2048, 128, 1)}
CPU_VALUES = {"N": (256, 1024, 4096, 16384), "D": (32, 128, 512, 2048), "K": (2, 8, 32, 128)}
CUDA_VALUES = {"N": (1024, 4096, 16384, 65536, 262144), "D": (64, 256, 1024, 4096), "K": (2, 8, 32, 128, 512)}
SLOPE = "Slope of log time over log size between the last two rows: 1 is linear, 2 quadratic."
QUICK_VALUES = {"N": (64, 256), "D": (8, 32), "K": (2, 4)}


def tables(settings: Settings) -> list[Table]:
    """Returns one table per axis, with a log-log figure."""
    on_cuda = settings.device.type == "cuda"
    values = QUICK_VALUES if settings.quick else CUDA_VALUES if on_cuda else CPU_VALUES
    return [_axis(settings, axis, values[axis]) for axis in BASES]


def _axis(settings: Settings, axis: str, values: Sequence[int]) -> Table:
    names = _names(settings)
    seconds = [_seconds(settings, BASES[axis]._replace(**{axis: value}), names) for value in values]
    curves = {name: [measured[name] for measured in seconds] for name in names}
    fixed = ", ".join(f"{key} = {size}" for key, size in BASES[axis]._asdict().items() if key != axis)
    rows = [
        (str(value), *(milliseconds(measured[name]) for name in names), ratio(measured[ESTIMATOR], measured[PRODUCT]))
        for value, measured in zip(values, seconds, strict=True)
    ]
    slopes = [f"{slope(values[-2:], curve[-2:]):.2f}" for curve in curves.values()]
    rows.append(("slope at the end", *slopes, ""))
    title = f"As {axis} grows ({fixed})"
    figures = {f"growth-{axis.lower()}": _figure(title, axis, values, curves)} if present("matplotlib") else {}
    return Table(
        title=title,
        header=(axis, *(f"{name}, ms" for name in names), f"times {PRODUCT}"),
        rows=tuple(rows),
        remarks=(("GPU time." if settings.device.type == "cuda" else "One thread.") + " " + SLOPE,),
        figures=figures,
    )


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Returns the exponent p of seconds = c size^p, by least squares on logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), deg=1)[0])


def _names(settings: Settings) -> list[str]:
    compiled = [COMPILED] if settings.device.type == "cuda" else []
    return [PRODUCT, ESTIMATOR, *compiled]


def _seconds(settings: Settings, size: Size, names: Sequence[str]) -> dict[str, float]:
    with cases.competitors(size, names, device=settings.device) as runs:
        if settings.device.type == "cuda":
            warm_up(runs, steps=settings.warmups)
            return gpu_medians(runs, rounds=settings.rounds)
        with threads(1):
            warm_up(runs, steps=settings.warmups)
            return minima(runs, rounds=settings.rounds)


def _figure(title: str, axis: str, values: Sequence[int], curves: Mapping[str, Sequence[float]]) -> bytes:
    # pyplot would look for a display.
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=axis, ylabel="ms per step", title=title)
    for name, seconds in curves.items():
        axes.loglog(values, [1000 * second for second in seconds], marker="o", label=name)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return png.getvalue()
