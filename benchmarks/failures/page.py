"""The page of the benchmark: tables and pictures of what is seen, by whom, and how soon."""

import io
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.failures import analysis, data, limits, score
from benchmarks.failures.kinds import KINDS
from benchmarks.failures.methods import NAMES as METHODS
from benchmarks.failures.runs import HEALTHY, LENGTHS
from benchmarks.failures.score import OTHERS, OURS, PRODUCT, Scored, of, place, places, share
from benchmarks.pages import Table

DETECTORS = (PRODUCT, *OURS, *OTHERS)


def tables(scored: Sequence[Scored], thresholds: dict[str, float]) -> list[Table]:
    """Returns all tables of the page."""
    tested = [one for one in scored if not one.record.is_calibration]
    return [
        changes(tested),
        healthy(tested),
        found(tested),
        delays(tested),
        gone(tested),
        from_start(tested, [one for one in scored if score.sets_limits(one.record)]),
        said(tested),
        analysis.levels(tested),
        analysis.which(tested),
        analysis.correlation(tested),
        limits.reached(scored),
        limits.traded(scored),
        thresholds_of_single(thresholds),
    ]


def changes(tested: Sequence[Scored]) -> Table:
    """Returns the table of what goes wrong, or changes without going wrong."""
    rows = []
    for name, kind in KINDS.items():
        if runs := of(tested, name):
            begins = "at the first step" if kind.from_start else "later"
            methods = "all" if kind.methods == METHODS else ", ".join(kind.methods)
            rows.append((name, kind.what, "yes" if kind.is_fault else "no", begins, methods, str(len(runs))))
    images, sentences = LENGTHS["digits"].onset, LENGTHS["sentences"].onset
    remark = (
        f"Later: at a random step from {images[0]} to {images[1] - 1} (sentences: {sentences[0]} to "
        f"{sentences[1] - 1}), the same in all runs of a seed. Affected classes are chosen for each "
        "change, method, encoder, samples and seed."
    )
    header = ("change", "what", "fault", "begins", "methods", "tested runs")
    return Table(title="What changes", header=header, rows=tuple(rows), remarks=(remark,))


def healthy(tested: Sequence[Scored]) -> Table:
    """Returns the table of false alarms."""
    rows = []
    for name, runs in [*places(of(tested, HEALTHY)), ("all", of(tested, HEALTHY))]:
        kinds = Counter(kind for one in runs for kind in {alarm.kind for alarm in one.record.run.alarms})
        told = ", ".join(f"{kind} {n}" for kind, n in kinds.most_common()) or "none"
        n_alarm, n_not_fine = sum(one.sees(PRODUCT) for one in runs), sum(not one.is_fine for one in runs)
        n_wrong = sum(one.verdicts[0].level == "wrong" for one in runs)
        rows.append((name, str(len(runs)), str(n_alarm), str(n_not_fine), str(n_wrong), told))
    header = ("runs of", "runs", "with an alarm", "verdict not `fine`", "verdict `wrong`", "runs by kind of alarm")
    return Table(title="Healthy runs, at the default thresholds", header=header, rows=tuple(rows))


def found(tested: Sequence[Scored]) -> Table:
    """Returns the table, and the picture, of the share of runs that each detector sees."""
    late = [name for name, kind in KINDS.items() if not kind.from_start and of(tested, name)]
    rows, shares = [], []
    for name in [HEALTHY, *late]:
        runs = of(tested, name)
        line = [sum(one.sees(detector) for one in runs) / len(runs) for detector in DETECTORS]
        shares.append(line)
        rows.append((name, str(len(runs)), *(f"{100 * value:.0f}" for value in line)))
    return Table(
        title="Seen after the onset, % of the runs",
        header=("change", "runs", *DETECTORS),
        rows=tuple(rows),
        remarks=(
            "`alarms`: those of this project, all together. Other columns: one figure alone, with a threshold that "
            f"{100 * score.FALSE_ALARMS:.0f} % of the healthy calibration runs exceed. "
            "Columns to `mean alignment`, an average over steps, are [this project's]"
            "(../../mixture_torch/README.md#files); then come the loss and [what others watch](../failures/others.py), "
            "each of one batch.",
            f"Counted: {LENGTHS['digits'].after} steps after the onset (sentences: {LENGTHS['sentences'].after}); "
            "healthy runs: all. The 95 % interval of a share of 40 runs is at most 30 points wide.",
        ),
        figures={"found": heatmap([HEALTHY, *late], DETECTORS, np.array(shares) * 100, "% of the runs")},
    )


def delays(tested: Sequence[Scored]) -> Table:
    """Returns the table of median delays, of runs that a detector sees."""
    rows = []
    for name, kind in KINDS.items():
        runs = of(tested, name)
        if kind.from_start or not runs:
            continue
        cells = []
        for detector in DETECTORS:
            known = [one.first[detector] for one in runs if one.sees(detector)]
            cells.append(f"{statistics.median(known):.0f}" if 2 * len(known) >= len(runs) else "-")
        rows.append((name, *cells))
    remark = "Steps from the onset to the first alarm, the median of the runs that are seen; - if fewer than half are."
    title = "Delay, steps"
    return Table(title=title, header=("change", *DETECTORS), rows=tuple(rows), remarks=(remark,))


def gone(tested: Sequence[Scored]) -> Table:
    """Returns the table of classes that are gone."""
    rows = []
    one, three = "one class gone", "three classes gone"
    for kind, which in (
        (one, of(tested, one)),
        (three, of(tested, three)),
        ("both", of(tested, one) + of(tested, three)),
    ):
        by_samples = [(name, [run for run in which if run.record.setting.samples == name]) for name in data.NAMES]
        groups = [*(places(which) if kind != "both" else ()), *by_samples, ("all", which)]
        for name, runs in groups:
            if not runs:
                continue
            any_named = share(bool(run.named) for run in runs)
            is_told = share(any(verdict.kind == "group gone" for verdict in run.verdicts) for run in runs)
            misnamed = str(sum(len(run.fallen - run.named) for run in runs))
            holders = [(set(run.record.holders), run.emptied, run.named) for run in runs]
            emptied = out_of((len(named & empty), len(empty)) for _, empty, named in holders)
            shared = out_of((len(named - empty), len(held - empty)) for held, empty, named in holders)
            rows.append((kind, name, str(len(runs)), any_named, emptied, shared, misnamed, is_told))
    header = (
        "change", "runs of", "runs", "one or more named, % of runs", "emptied components named",
        "shared components named", "others named", "verdict `group gone`, % of runs",
    )  # fmt: skip
    remark = (
        f"Named: an alarm within {score.SOON} steps names, for a loss, the component that held most samples of a lost "
        "class in the 10 steps before. It is emptied if it loses at least half of its share of the batch; otherwise it "
        "is shared: it holds other classes too, or other components hold the class too. Others: components named for "
        "a loss that are not the main component of any lost class. In brackets: 95 % intervals."
    )
    return Table(title="Classes that are gone", header=header, rows=tuple(rows), remarks=(remark,))


def from_start(tested: Sequence[Scored], calibration: Sequence[Scored]) -> Table:
    """Returns the table of faults that are there from the first step."""
    rows = []
    for name in [HEALTHY, *(name for name, kind in KINDS.items() if kind.from_start)]:
        runs = of(tested, name)
        off = [statistics.fmean(outside(one, calibration, figure) for one in runs) for figure in (*OURS, *OTHERS)]
        cells = (f"{100 * value:.0f}" for value in off)
        rows.append((name, str(len(runs)), share(not one.is_fine for one in runs), *cells))
    remark = (
        "Single figures: the share of runs whose mean over steps 80 to 99 lies outside the range of the calibration "
        "runs of the same method and samples, widened by half of it on both sides. Verdict: not `fine`, although it "
        "knows no other run."
    )
    header = ("fault", "runs", "verdict, % of runs", *OURS, *OTHERS)
    return Table(title="Wrong from the start, % of the runs", header=header, rows=tuple(rows), remarks=(remark,))


def out_of(counts: Iterable[tuple[int, int]]) -> str:
    """Returns sums of parts and wholes, such as `3 of 4`."""
    parts, wholes = zip(*counts, strict=True)
    return f"{sum(parts)} of {sum(wholes)}" if sum(wholes) else "-"


def outside(one: Scored, calibration: Sequence[Scored], figure: str) -> bool:
    """Whether a figure lies outside the widened range of the calibration runs of the same method and samples."""
    steps = slice(80, 100)
    mates = [other for other in calibration if place(other) == place(one)]
    values = [float(np.nanmean(mate.series[figure][steps])) for mate in mates]
    low, high = min(values), max(values)
    value, margin = float(np.nanmean(one.series[figure][steps])), 0.5 * (high - low)
    return not low - margin <= value <= high + margin


def said(tested: Sequence[Scored]) -> Table:
    """Returns the table of the first verdict on each kind of run."""
    rows = []
    for name in [HEALTHY, *KINDS]:
        runs = of(tested, name)
        if not runs:
            continue
        kinds = Counter(one.verdicts[0].kind for one in runs).most_common()
        rows.append((name, str(len(runs)), ", ".join(f"{kind} {n}" for kind, n in kinds)))
    header = ("change", "runs", "first verdict of the report, in runs")
    remark = (
        "Verdicts cover the whole run, so alarms from before the onset count too: some healthy beginnings have them."
    )
    return Table(title="What the report says", header=header, rows=tuple(rows), remarks=(remark,))


def thresholds_of_single(thresholds: dict[str, float]) -> Table:
    """Returns the thresholds."""
    rows = [(name, f"{value:.1f}") for name, value in thresholds.items()]
    header = ("single figure", "standard deviations")
    remark = f"{100 * score.FALSE_ALARMS:.0f} % of the healthy calibration runs exceed them."
    return Table(title="Thresholds of single figures", header=header, rows=tuple(rows), remarks=(remark,))


def heatmap(rows: Sequence[str], columns: Sequence[str], values: "np.ndarray", unit: str) -> bytes:
    """Returns a picture of a table of numbers between 0 and 100."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.55 * len(columns) + 2.6, 0.34 * len(rows) + 1.7), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.axvline(len(OURS) + 0.5, color="white", linewidth=4)
    axes.axvline(0.5, color="white", linewidth=4)
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            axes.text(
                j, i, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if value > 55 else "black"
            )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title(unit, loc="left", fontsize=9)
    for middle, whose in ((len(OURS) / 2 + 0.5, "this project"), (len(OURS) + len(OTHERS) / 2 + 0.5, "others")):
        axes.text(middle, -0.7, whose, ha="center", fontsize=9)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
