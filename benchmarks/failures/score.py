"""What is seen of a run: by the product's alarms and verdicts, and by single figures at calibrated thresholds.

A single figure raises an alarm if two rows in succession are off its mean over the 40 rows before a gap of 4 rows, on
the same side, by more of their standard deviations than its threshold. 5 % of the calibration runs exceed that
threshold.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import attrs
import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from benchmarks.failures.runs import HEALTHY, Record
from mixture_core.alarms import BASELINE, GAP, WINDOW
from mixture_torch.report.verdicts import Verdict, verdicts

FALSE_ALARMS = 0.05  # share of the calibration runs that a threshold lets raise one
SOON = 5  # steps within which a class that is gone must be named
OURS = ("trace_B", "opnorm_B", "pi_min", "pi_max", "trace_T", "share_B", "participation_ratio", "mean alignment")
OF_CSV = OURS[:4]
AVERAGED = {"mean alignment": "alignment"}  # its column; others watch the alignment of one batch
OTHERS = ("loss", "RankMe", "effective rank", "LiDAR", "alpha-ReQ", "uniformity", "alignment", "std")
PRODUCT = "alarms"
Array = npt.NDArray[np.float64]


@attrs.frozen(kw_only=True, eq=False)
class Scored:
    """A run and what is seen of it.

    Attributes:
        record: The run.
        series: Each figure, (T,), by name.
        verdicts: The product's, worst first.
        first: Delay of the first alarm after the onset, by detector: `PRODUCT` or a figure. nan without an alarm. Of a
            healthy run, the step of its first alarm.
    """

    record: Record
    series: Mapping[str, Array]
    verdicts: tuple[Verdict, ...]
    first: Mapping[str, float]

    def sees(self, detector: str) -> bool:
        """Whether a detector raised an alarm after the onset."""
        return not math.isnan(self.first[detector])

    @property
    def is_fine(self) -> bool:
        """Whether the product says that nothing is wrong."""
        return self.verdicts[0].level == "fine"

    @property
    def named(self) -> set[int | None]:
        """The components that held a class that is gone and were named by an alarm within 5 steps."""
        return self.fallen & set(self.record.holders)

    @property
    def fallen(self) -> set[int | None]:
        """The components of which an alarm within 5 steps says that they lost a part of their share."""
        begin = self.record.onset
        soon = [alarm for alarm in self.record.run.alarms if begin <= alarm.step < begin + SOON]
        return {alarm.component for alarm in soon if alarm.kind == "composition" and alarm.figures["deviation"] < 0}

    @property
    def emptied(self) -> set[int]:
        """The components that held a class that is gone and lost at least half of their share with it."""
        shares, begin = shares_of(self.record), self.record.onset
        before, after = shares[begin - WINDOW : begin - GAP].mean(axis=0), shares[begin : begin + 3].mean(axis=0)
        return {k for k in self.record.holders if after[k] <= before[k] / 2}


def score(records: Sequence[Record]) -> tuple[list[Scored], dict[str, float]]:
    """Returns what is seen of each run, and the thresholds of the single figures."""
    series = [figures_of(record) for record in records]
    deviations = [{name: deviation(values) for name, values in one.items()} for one in series]
    known = [dev for record, dev in zip(records, deviations, strict=True) if sets_limits(record)]
    thresholds = {
        name: float(np.quantile([dev[name].max(initial=0.0) for dev in known], 1 - FALSE_ALARMS))
        for name in (*OURS, *OTHERS)
    }
    scored = []
    for record, one, dev in zip(records, series, deviations, strict=True):
        begin = 0 if record.kind == HEALTHY else record.onset
        alarms = [alarm.step for alarm in record.run.alarms if alarm.step >= begin]
        first = {PRODUCT: float(min(alarms) - begin) if alarms else math.nan}
        for name, values in dev.items():
            off = np.flatnonzero(values[begin:] > thresholds[name])
            first[name] = float(off[0]) if len(off) else math.nan
        scored.append(Scored(record=record, series=one, verdicts=verdicts(record.run), first=first))
    return scored, thresholds


def figures_of(record: Record) -> dict[str, Array]:
    """Returns each figure at each step, (T,)."""
    columns = {**record.run.log, **(record.run.extra or {})}
    ours = {name: columns[AVERAGED.get(name, name)] for name in OURS}
    return {**ours, **{name: record.others[name] for name in OTHERS}}


def shares_of(record: Record) -> Array:
    """Returns the share of the batch in each component at each step, (T, K)."""
    assert record.run.extra is not None
    n: Array = record.run.extra["n"].astype(float)
    shares: Array = n / n.sum(axis=1, keepdims=True)
    return shares


def sets_limits(record: Record) -> bool:
    """Whether thresholds are taken from a run."""
    return record.is_calibration and record.kind == HEALTHY


def deviation(values: Array, *, least: float = 0.0) -> Array:
    """Returns by how many standard deviations a row and the one before are off, the smaller of both, (T,).

    It is 0 in the first 45 rows, if both are on different sides, and if a value is not finite.

    Args:
        values: (T,).
        least: The least standard deviation.
    """
    found = np.zeros(len(values))
    if len(values) <= WINDOW + 1:
        return found
    windows = sliding_window_view(values, BASELINE)[: len(values) - WINDOW]
    spread = np.maximum(windows.std(axis=1, ddof=1), np.maximum(1e-9 * np.abs(values[WINDOW:]) + 1e-30, least))
    off = np.nan_to_num((values[WINDOW:] - windows.mean(axis=1)) / spread, posinf=0.0, neginf=0.0)
    both = np.minimum(np.abs(off[1:]), np.abs(off[:-1]))
    found[WINDOW + 1 :] = np.where(off[1:] * off[:-1] > 0, both, 0.0)
    return found


def features(one: Scored, names: Iterable[str], *, begin: int, after: int) -> Array:
    """Returns how far each figure has moved from before a step to some steps after it, where 5 rows are averaged.

    In standard deviations of the 40 rows before the step, with a logarithm that keeps the sign and tames large values.

    Args:
        one: A run whose change comes late, or a healthy one.
        names: Of the figures; with `PRODUCT`, also the largest fall and rise of a component's share of the batch.
        begin: The onset; for a healthy run, that of the runs with the same beginning.
        after: Steps.
    """
    found: list[float] = []
    for name in names:
        if name == PRODUCT:
            shares = shares_of(one.record)
            now, before = shares[begin + after - 5 : begin + after], shares[begin - BASELINE : begin]
            change = now.mean(axis=0) - before.mean(axis=0)
            found += [change.min(), change.max(), np.abs(change).sum()]
            continue
        before, now = one.series[name][begin - BASELINE : begin], one.series[name][begin + after - 5 : begin + after]
        z = (now.mean() - before.mean()) / max(before.std(), 1e-9 * abs(before.mean()) + 1e-30)
        found.append(float(np.sign(z) * np.log1p(abs(z))))
    return np.asarray(np.nan_to_num(found, posinf=0.0, neginf=0.0))


def share(some: Iterable[bool]) -> str:
    """Returns a share in per cent with its 95 % interval, such as `90 (77 to 96)`."""
    all_of = list(some)
    low, high = interval(sum(all_of), len(all_of))
    return f"{100 * sum(all_of) / len(all_of):.0f} ({100 * low:.0f} to {100 * high:.0f})"


def place(one: Scored) -> str:
    """Returns the method and the samples of a run."""
    return f"{one.record.setting.method}, {one.record.setting.samples}"


def places(scored: Sequence[Scored]) -> list[tuple[str, list[Scored]]]:
    """Returns the runs by method and samples."""
    names = list(dict.fromkeys(map(place, scored)))
    return [(name, [one for one in scored if place(one) == name]) for name in names]


def of(scored: Sequence[Scored], kind: str) -> list[Scored]:
    """Returns the runs of a kind."""
    return [one for one in scored if one.record.kind == kind]


def interval(successes: int, n: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share (Wilson 1927)."""
    z, share = 1.96, successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return max(0.0, centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
