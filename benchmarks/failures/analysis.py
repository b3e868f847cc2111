"""Two questions to all figures together: which change is it, and do levels tell how good a run is?"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.stats import rankdata, spearmanr  # type: ignore[import-untyped]  # it has no annotations
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.failures import score
from benchmarks.failures.kinds import KINDS
from benchmarks.failures.methods import EMBEDDING
from benchmarks.failures.runs import HEALTHY
from benchmarks.failures.score import OF_CSV, OTHERS, OURS, PRODUCT, Scored, of, places, share
from benchmarks.failures.training import K, Setting
from benchmarks.pages import Table
from mixture_core.alarms import BASELINE

SEEN_AFTER = 30  # steps after the onset at which a classifier says which change it is


def at_end(name: str) -> Callable[[Scored], float]:
    """Returns a function that gives the mean of a figure over the last 10 steps."""
    return lambda one: float(np.nanmean(one.series[name][-10:]))


def relative(name: str) -> Callable[[Scored], float]:
    """Returns a function that gives this mean over that before the onset."""

    def ratio(one: Scored) -> float:
        begin = max(one.record.onset if one.record.kind != HEALTHY else 110, 45)
        return at_end(name)(one) / float(np.nanmean(one.series[name][begin - BASELINE : begin]))

    return ratio


def last_excess(one: Scored) -> float:
    """Returns the last excess that is known; nan after a late fault, when there is none yet."""
    if one.record.kind != HEALTHY and one.record.onset > 0:
        return math.nan
    known = [value for entry in one.record.run.snapshots if not math.isnan(value := float(entry["excess"]))]
    return known[-1] if known else math.nan


LEVELS: Mapping[str, Callable[[Scored], float]] = {
    "trace_T": at_end("trace_T"),
    "trace_T relative to before": relative("trace_T"),
    "trace_B": at_end("trace_B"),
    "trace_B relative to before": relative("trace_B"),
    "share_B": at_end("share_B"),
    "opnorm_B / trace_B": lambda one: at_end("opnorm_B")(one) / at_end("trace_B")(one),
    "participation_ratio / D": lambda one: at_end("participation_ratio")(one) / EMBEDDING,
    "K pi_min": lambda one: K * at_end("pi_min")(one),
    "K pi_max": lambda one: K * at_end("pi_max")(one),
    "excess": last_excess,
}
PROBES = ("linear", "kNN", "logistic")
GROUPS = {
    "all of this project": (PRODUCT, *OURS),
    "the four of mixture.csv": OF_CSV,
    "all of the others": OTHERS,
    "the others without the loss": OTHERS[1:],
    "RankMe alone": ("RankMe",),
    "the loss alone": ("loss",),
    "everything": (PRODUCT, *OURS, *OTHERS),
}


def which(tested: Sequence[Scored]) -> Table:
    """Returns the table of a classifier that says which change it is."""
    late = [
        one for one in tested
        if one.record.setting.samples != "sentences"
        and (one.record.kind == HEALTHY or not KINDS[one.record.kind].from_start)
    ]  # fmt: skip
    y, seeds = [one.record.kind for one in late], [one.record.seed for one in late]
    # Healthy runs have no onset; the classifier must not tell them by the time.
    onsets = {beginning(one): one.record.onset for one in late if one.record.kind != HEALTHY}
    rows = []
    for group, names in GROUPS.items():
        x = np.array([score.features(one, names, begin=onsets[beginning(one)], after=SEEN_AFTER) for one in late])
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        told = cross_val_predict(model, x, y, groups=seeds, cv=LeaveOneGroupOut())
        rows.append((group, str(x.shape[1]), share(a == b for a, b in zip(told, y, strict=True))))
    remark = (
        f"Multinomial logistic regression on how far each figure is from its mean before the onset, {SEEN_AFTER} steps "
        "after it; with all of this project, also on the largest fall, the largest rise and the whole change of the "
        f"components' shares. {len(set(y))} kinds of runs, {len(y)} runs of images; trained on all seeds but one, "
        f"tested on that one. By chance: {100 / len(set(y)):.0f} %. Runs of one seed share their beginning, so the "
        "intervals are somewhat too narrow."
    )
    return Table(
        title="Which change it is",
        header=("figures", "numbers", "right, %"),
        rows=tuple(rows),
        remarks=(remark,),
    )


def beginning(one: Scored) -> tuple[Setting, int]:
    """Returns what runs with the same beginning share."""
    return one.record.setting, one.record.seed


def correlation(tested: Sequence[Scored]) -> Table:
    """Returns the table of rank correlations with the probes at the end of the runs."""
    groups = {
        "healthy": [one for one in tested if not is_broken(one)],
        "broken": [one for one in tested if is_broken(one)],
        "all": tested,
    }
    rows = [
        (name, *(rank_correlation(runs, name, probe) for probe in PROBES for runs in groups.values()))
        for name in (*OURS, *OTHERS)
    ]
    header = ("figure", *(f"{probe}, {group}" for probe in PROBES for group in groups))
    remark = (
        "Spearman's correlation of the mean of the last 10 steps with the accuracy of the last linear, kNN or logistic "
        "probe, after both were ranked within their method and samples. Healthy: also the changes that are no faults. "
        "Broken: runs with a fault. Runs of one seed share their beginning, so .3 either way may be chance."
    )
    return Table(title="Do levels tell how good a run is?", header=header, rows=tuple(rows), remarks=(remark,))


def levels(tested: Sequence[Scored]) -> Table:
    """Returns the table of the figures that the product logs, at the end of the runs."""
    healthy = [(f"healthy, {name}", runs) for name, runs in places(of(tested, HEALTHY))]
    healthy.append(("healthy, all", of(tested, HEALTHY)))
    broken = [(name, of(tested, name)) for name in KINDS if of(tested, name)]
    rows = [
        (name, *(ranged([figure(one) for one in runs]) for figure in LEVELS.values()))
        for name, runs in healthy + broken
    ]
    remark = (
        "Medians over the runs, with the smallest and the largest. Means of the last 10 steps; the last excess that is "
        "known. Relative to before: over the 40 steps before the onset; of faults from the start, over steps 5 to "
        "44; of healthy runs, 70 to 109. -: no excess came after the onset."
    )
    return Table(title="Levels of the figures", header=("runs", *LEVELS), rows=tuple(rows), remarks=(remark,))


def ranged(values: Sequence[float]) -> str:
    """Returns the median of the values that are known, and the range, such as `0.5 (0.4 to 0.7)`."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    return f"{np.median(known):.2g} ({min(known):.2g} to {max(known):.2g})"


def is_broken(one: Scored) -> bool:
    """Whether there was a fault."""
    return one.record.kind != HEALTHY and KINDS[one.record.kind].is_fault


def rank_correlation(runs: Sequence[Scored], figure: str, probe: str) -> str:
    """Returns Spearman's correlation within methods and samples."""
    x, y = [], []
    for _, mates in places(runs):
        if len(mates) > 3:
            levels = [at_end(figure)(one) for one in mates]
            x += ((rankdata(levels) - 0.5) / len(mates)).tolist()
            y += ((rankdata([one.record.probes[probe][-1] for one in mates]) - 0.5) / len(mates)).tolist()
    value = float(spearmanr(x, y).statistic)
    return "-" if math.isnan(value) else f"{value:+.2f}"
