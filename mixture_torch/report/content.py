"""The data that the page draws: short arrays of each run, as JSON."""

import base64
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from mixture_core.alarms import Alarm
from mixture_torch.report.run import Run
from mixture_torch.report.series import buckets
from mixture_torch.report.verdicts import Verdict, noted

Array: TypeAlias = npt.NDArray[Any]
Json: TypeAlias = dict[str, Any]

BUCKETS = 1000  # points of a series
COMPONENT_POINTS = 24_000  # points over the charts of one kind of all runs
MOST_COMPONENTS = 64  # lines in a chart
MOST_FRAMES = 200  # positions of the slider
MOST_EIGENVALUES = 64


class Chart(NamedTuple):
    """A chart over steps that shows all runs."""

    name: str
    title: str
    note: str
    log: bool = True


CHARTS = (
    Chart("trace_T", "Total variance, trace_T", "1 if normalized embeddings fill the sphere, 0 after a collapse."),
    Chart("trace_B", "Variance between components, trace_B", "How far apart the components are."),
    Chart("share_B", "Share of variance between components, share_B", "trace_B / trace_T."),
    Chart(
        "participation_ratio",
        "Directions in use",
        "Participation ratio (line), effective rank (circles), RankMe (squares); each at most D.",
        log=False,
    ),
    Chart("opnorm_B", "Variance in the main direction of B, opnorm_B", "Near trace_B if all components lie on a line."),
    Chart("alignment", "Distance between two views, alignment", "Mean squared distance between views of a sample."),
)
OF_SNAPSHOTS = ("effective_rank", "rankme")


def content(runs: tuple[Run, ...], found: Iterable[tuple[Verdict, ...]]) -> Json:
    """Returns `runs`, the `charts` that have something to show, and `frames`, the steps of the slider.

    Each array is {"f4": base64} or {"f8": base64} of its bytes: 1,000 numbers take 5.3 kB. Infinite values become NaN.

    Args:
        runs: At least one.
        found: The verdicts about each.
    """
    drawn = [_run(run, verdicts, len(runs)) for run, verdicts in zip(runs, found, strict=True)]
    charts = [chart._asdict() for chart in CHARTS if any(chart.name in run["series"] for run in drawn)]
    frames = sorted({step for run in drawn for step in (run["plane"] or {"steps": []})["steps"]})
    return {"runs": drawn, "charts": charts, "frames": _spread(frames, MOST_FRAMES)}


def _run(run: Run, verdicts: tuple[Verdict, ...], n_runs: int) -> Json:
    series = {name: _series(run.log, run.log[name]) for name in ("trace_B", "opnorm_B") if _has(run.log[name])}
    if run.extra is not None:
        names = [name for name in ("trace_T", "share_B", "participation_ratio", "alignment") if _has(run.extra[name])]
        series |= {name: _series(run.extra, run.extra[name]) for name in names}
    snapshots = _spread([entry for entry in run.snapshots if _is_like(entry, run.snapshots[-1])], MOST_FRAMES)
    ranks = {
        name: [_number(entry.get(name)) for entry in snapshots]
        for name in OF_SNAPSHOTS
        if any(_number(entry.get(name)) is not None for entry in snapshots)
    }
    marked = noted(run, verdicts)
    return {
        "name": run.name,
        "noted": marked,
        "series": series,
        "ranks": ranks,
        "components": None if run.extra is None else _components(run, marked, n_runs),
        "alarms": _alarms(run),
        "plane": _plane(snapshots) if snapshots else None,
    }


def _series(columns: Json, values: Array) -> Json:
    step, low, high = buckets(columns["step"], _finite(values), BUCKETS)
    return {"x": _pack(step, "f8"), "low": _pack(low)} | ({} if low is high else {"high": _pack(high)})


def _components(run: Run, marked: tuple[int, ...], n_runs: int) -> Json:
    """Weights and batch shares of the components drawn: those that are marked, then those that vary most."""
    assert run.extra is not None
    step, pi = run.extra["step"], _finite(run.extra["pi"])
    rows = run.extra["n_rows"].astype(np.float64)[:, None]
    share = run.extra["n"] / np.where(rows > 0, rows, np.nan)
    varying = [int(k) for k in np.argsort(-np.ptp(np.nan_to_num(pi), axis=0), kind="stable") if k not in marked]
    shown = ([k for k in marked if k < pi.shape[1]] + varying)[:MOST_COMPONENTS]
    n = min(max(COMPONENT_POINTS // (len(shown) * n_runs), 100), BUCKETS)
    moved, _, count = buckets(step, np.cumsum(run.extra["n_relocated"]), n)
    count = np.diff(count, prepend=0)
    drawn: Json = {"k": shown, "moved": {"x": moved[count > 0].tolist(), "count": count[count > 0].tolist()}}
    for name, values in (("pi", pi), ("share", _finite(share))):
        begins, low, high = buckets(step, values[:, shown], n)
        drawn |= {"x": _pack(begins, "f8"), name: [_pack(column) for column in low.T]}
        if low is not high:
            drawn[f"{name}_high"] = [_pack(column) for column in high.T]
    return drawn


def _alarms(run: Run) -> list[Json]:
    """The start of each bucket in which alarms began, and the first few of these alarms in words."""
    begins, _, _ = buckets(run.log["step"], run.log["step"], BUCKETS)
    groups: dict[int, list[Alarm]] = {}
    for alarm in run.alarms:
        where = max(int(np.searchsorted(begins, alarm.since, side="right")) - 1, 0)
        groups.setdefault(int(begins[where]), []).append(alarm)
    return [{"x": x, "lines": _lines(alarms)} for x, alarms in sorted(groups.items())]


def _lines(alarms: list[Alarm], most: int = 5) -> list[str]:
    kinds: dict[tuple[str, int], list[str]] = {}
    for alarm in alarms:
        about = kinds.setdefault((alarm.kind, alarm.since), [])
        about += [] if alarm.component is None else [str(alarm.component)]
    lines = [
        f"{kind}, step {since:,}" + (f": component{'s' * (len(about) > 1)} {', '.join(about)}" if about else "")
        for (kind, since), about in kinds.items()
    ]
    return lines[:most] + ([f"and {len(lines) - most} more"] if len(lines) > most else [])


def _plane(snapshots: list[Json]) -> Json:
    """The mixture in the plane of B's two leading directions, and the spectra, at each snapshot."""
    weight, mean, covariance = (
        np.stack([entry[name].double().numpy() for entry in snapshots])
        for name in ("weight", "plane_mean", "plane_covariance")
    )
    total = weight.sum(axis=1, keepdims=True)
    shape = np.stack([covariance[..., 0, 0], covariance[..., 0, 1], covariance[..., 1, 1]], axis=-1)
    plane = {"K": weight.shape[1], "steps": [entry["step"] for entry in snapshots]}
    plane |= {"pi": _pack(weight / np.where(total > 0, total, 1.0)), "mean": _pack(mean), "covariance": _pack(shape)}
    for name in ("T", "B"):
        spectrum = np.stack([entry[f"spectrum_{name}"].double().numpy() for entry in snapshots])
        kept = np.unique(np.geomspace(1, spectrum.shape[1], MOST_EIGENVALUES).round().astype(int))
        plane[name] = {"rank": kept.tolist(), "value": _pack(spectrum[:, kept - 1])}
    return plane


def _is_like(entry: Json, other: Json) -> bool:
    return bool(entry["weight"].shape == other["weight"].shape and entry["axes"].shape == other["axes"].shape)


def _spread(items: list[Any], most: int) -> list[Any]:
    """At most that many items, evenly spread, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[int(n)] for n in np.linspace(0, len(items) - 1, most).round()]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and np.isfinite(value) else None


def _has(values: Array) -> bool:
    return bool(np.isfinite(values).any())


def _finite(values: Array) -> Array:
    return np.where(np.isfinite(values), values, np.nan)


def _pack(values: Array, kind: str = "f4") -> Json:
    with np.errstate(over="ignore"):
        data = np.ascontiguousarray(_finite(values.astype(f"<{kind}")))
    return {kind: base64.b64encode(data.tobytes()).decode("ascii")}
