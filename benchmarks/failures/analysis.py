"""Two questions to all figures together: which change is it, and do levels tell how good a run is?"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata, spearmanr  # type: ignore[import-untyped]  # it has no annotations
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.failures import score
from benchmarks.failures.kinds import KINDS
from benchmarks.failures.runs import HEALTHY
from benchmarks.failures.score import OF_CSV, OTHERS, OURS, PRODUCT, Scored, places, share
from benchmarks.pages import Table

SEEN_AFTER = 30  # steps after the onset at which a classifier says which change it is
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
    rows = []
    for group, names in GROUPS.items():
        x = np.array([score.features(one, names, after=SEEN_AFTER) for one in late])
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        told = cross_val_predict(model, x, y, groups=seeds, cv=LeaveOneGroupOut())
        rows.append((group, str(x.shape[1]), share(a == b for a, b in zip(told, y, strict=True))))
    remark = (
        f"Multinomial logistic regression on how far each figure is from its mean before the onset, {SEEN_AFTER} steps "
        f"after it; {len(set(y))} kinds of runs, {len(y)} runs of images; trained on all seeds but one, tested on that "
        "one. By chance: {:.0f} %.".format(100 / len(set(y)))
    )
    return Table(
        title="Which change it is",
        header=("figures", "numbers", "right, %"),
        rows=tuple(rows),
        remarks=(remark,),
    )


def correlation(tested: Sequence[Scored]) -> Table:
    """Returns the table of rank correlations with the probes at the end of the runs."""
    rows = []
    for name in (*OURS, *OTHERS):
        cells = []
        for probe in PROBES:
            for group in (is_healthy, is_broken, any_run):
                cells.append(rank_correlation([one for one in tested if group(one)], name, probe))
        rows.append((name, *cells))
    header = ("figure", *(f"{probe}, {group}" for probe in PROBES for group in ("healthy", "broken", "all")))
    remark = (
        "Spearman's correlation of the mean of the last 10 steps with the last probe, after both were ranked within "
        "their method and samples. Broken: runs with a fault. With so few healthy runs, .3 either way is chance."
    )
    return Table(title="Do levels tell how good a run is?", header=header, rows=tuple(rows), remarks=(remark,))


def is_healthy(one: Scored) -> bool:
    """Whether nothing changed, or only what is no fault."""
    return one.record.kind == HEALTHY or not KINDS[one.record.kind].is_fault


def is_broken(one: Scored) -> bool:
    """Whether there was a fault."""
    return not is_healthy(one)


def any_run(one: Scored) -> bool:
    """Any run."""
    return True


def rank_correlation(runs: Sequence[Scored], figure: str, probe: str) -> str:
    """Returns Spearman's correlation within methods and samples."""
    x, y = [], []
    for _, mates in places(runs):
        if len(mates) > 3:
            levels = [float(np.nanmean(one.series[figure][-10:])) for one in mates]
            x += ((rankdata(levels) - 0.5) / len(mates)).tolist()
            y += ((rankdata([one.record.probes[probe][-1] for one in mates]) - 0.5) / len(mates)).tolist()
    value = float(spearmanr(x, y).statistic)
    return "-" if math.isnan(value) else f"{value:+.2f}"
