"""The limits of the product's alarms, and the runs that they were chosen from."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from benchmarks.failures.methods import EMBEDDING
from benchmarks.failures.runs import HEALTHY, Record
from benchmarks.failures.score import SOON, Array, Scored, deviation, of, sets_limits, shares_of
from benchmarks.failures.training import K
from benchmarks.pages import Table
from mixture_core import alarms

DEMO, CALIBRATION = "runs of the demo", "calibration runs"
OTHER_LIMITS = (3.0, alarms.CHANGE, 4.0, 4.5, 5.0)


def reached(scored: Sequence[Scored]) -> Table:
    """Returns the table of limits, and of how near healthy runs come to them."""
    chosen = [one.record for one in scored if sets_limits(one.record)]
    tested = [one.record for one in of(scored, HEALTHY) if not sets_limits(one.record)]
    off, jumped = "deviation of sqrt(n / N)", f"> {alarms.CHANGE_OF_SCALARS}"
    used = lasting("participation_ratio", over=EMBEDDING)
    limits = (
        ("composition", off, f"> {alarms.CHANGE}", DEMO, max, composition),
        ("trace_T", "deviation of its change", jumped, CALIBRATION, max, jump("trace_T")),
        ("share_B", "deviation of its change", jumped, CALIBRATION, max, jump("share_B")),
        ("collapse", "trace_T over its largest", f"< {alarms.COLLAPSED}", CALIBRATION, min, trace_T_left),
        ("dimensional collapse", "participation_ratio / D", f"< {alarms.FLAT}", CALIBRATION, min, used),
        ("dimensional collapse", "opnorm_B / trace_B", f"> {alarms.ONE_WAY}", DEMO, max, one_way),
        ("no structure", "excess", f"< {alarms.SHAPELESS}", CALIBRATION, min, excess),
        ("no structure", "participation_ratio / D", f"> {alarms.ROUND}", DEMO, max, most_used),
        ("dead component", "K pi", f"< {alarms.DEAD}", DEMO, min, least_weight),
    )
    rows = []
    for kind, figure, limit, origin, worst, value in limits:
        extremes = (f"{worst(value(record) for record in records):.3g}" for records in (chosen, tested))
        counts = (str(sum(kind in kinds_of(record) for record in records)) for records in (chosen, tested))
        rows.append((kind, figure, limit, origin, *extremes, *counts))
    header = (
        "alarm", "figure", "limit", "set from", f"most extreme of {len(chosen)} calibration runs",
        f"of {len(tested)} tested runs", "calibration runs with the alarm", "tested runs with it",
    )  # fmt: skip
    remark = (
        "All runs are healthy. No limit was set from tested runs. Deviations are in standard deviations, after the "
        "first 45 rows, and must last two rows; other figures 20 rows, those of `no structure` two snapshots. "
        "An alarm with two limits needs both."
    )
    return Table(title="Limits of the alarms", header=header, rows=tuple(rows), remarks=(remark,))


def traded(scored: Sequence[Scored]) -> Table:
    """Returns the table of what other limits of `composition` would do."""
    known = [one for one in scored if one.record.is_calibration]
    off = [(one.record, np.array([shares_off(one.record, k) for k in range(K)])) for one in known]
    rows = []
    for limit in OTHER_LIMITS:
        false = [bool((dev > limit).any()) for record, dev in off if record.kind == HEALTHY]
        cells = [f"{sum(false)} of {len(false)}"]
        for kind in ("one class gone", "three classes gone"):
            named = []
            for record, dev in off:
                if record.kind == kind:
                    soon = np.any(dev[:, record.onset : record.onset + SOON] > limit, axis=1)
                    named.append(bool(soon[list(record.holders)].any()))
            cells.append(f"{sum(named)} of {len(named)}")
        rows.append((f"{limit}", *cells))
    remark = (
        "Calibration runs. A lower limit names more classes that are gone, and raises more false alarms. Gains of "
        "shares, and losses of components with fewer than 6 rows, count here."
    )
    return Table(
        title="Other limits for changes of shares",
        header=("limit", "healthy runs with an alarm", "one class gone: named", "three gone: one or more named"),
        rows=tuple(rows),
        remarks=(remark,),
    )


def kinds_of(record: Record) -> set[str]:
    """Returns the kinds of alarms of a run."""
    return {alarm.kind for alarm in record.run.alarms}


def shares_off(record: Record, k: int) -> Array:
    """Returns the deviation of the share of a component, (T,); 0 in the 45 rows after a relocation."""
    assert record.run.extra is not None
    found = deviation(np.sqrt(shares_of(record)[:, k]), least=0.5 / np.sqrt(record.run.extra["n_rows"].max()))
    for row in np.flatnonzero(record.run.extra["n_relocated"]):
        found[row : row + alarms.WINDOW + 1] = 0.0
    return found


def composition(record: Record) -> float:
    """Returns the largest deviation of the share of a component."""
    return float(max(shares_off(record, k).max() for k in range(K)))


def jump(name: str) -> Callable[[Record], float]:
    """Returns a function that gives the largest deviation of the changes of a column."""

    def largest(record: Record) -> float:
        level = np.log(column(record, name))
        return float(deviation(np.concatenate([np.zeros(2), level[2:] - level[:-2]])).max())

    return largest


def lasting(name: str, *, over: float = 1.0) -> Callable[[Record], float]:
    """Returns a function that gives the least value that a column had for 20 rows in succession."""

    def least(record: Record) -> float:
        return float(sliding_window_view(column(record, name) / over, alarms.LASTING).max(axis=1).min())

    return least


def trace_T_left(record: Record) -> float:
    """Returns the least share of its largest value that trace_T had for 20 rows in succession."""
    trace_T = column(record, "trace_T")
    share = trace_T / np.minimum(np.maximum.accumulate(trace_T), 1.0)
    return float(sliding_window_view(share, alarms.LASTING).max(axis=1).min())


def one_way(record: Record) -> float:
    """Returns the largest share of trace_B along one direction that lasted for 20 rows."""
    return float(
        sliding_window_view(column(record, "opnorm_B") / column(record, "trace_B"), alarms.LASTING).min(axis=1).max()
    )


def excess(record: Record) -> float:
    """Returns the least excess of two snapshots in succession."""
    values = [float(entry["excess"]) for entry in record.run.snapshots]
    known = np.array([value for value in values if not np.isnan(value)])
    return float(sliding_window_view(known, alarms.LASTING_EXCESS).max(axis=1).min())


def most_used(record: Record) -> float:
    """Returns the largest share of the dimensions that were in use at a snapshot with an excess."""
    steps = [int(entry["step"]) for entry in record.run.snapshots if not np.isnan(float(entry["excess"]))]
    used = column(record, "participation_ratio")[np.isin(record.run.log["step"], steps)]
    return float(sliding_window_view(used, alarms.LASTING_EXCESS).min(axis=1).max()) / EMBEDDING


def least_weight(record: Record) -> float:
    """Returns the least weight times K that lasted for 20 rows."""
    assert record.run.extra is not None
    pi = record.run.extra["pi"]
    return K * float(sliding_window_view(pi, alarms.LASTING, axis=0).max(axis=2).min())


def column(record: Record, name: str) -> Array:
    """Returns a column of either file, (T,)."""
    assert record.run.extra is not None
    found: Array = record.run.log[name] if name in record.run.log else record.run.extra[name]
    return found
