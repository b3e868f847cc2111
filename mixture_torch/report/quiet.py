"""Verdicts on runs without alarms: healthy, too little known, or no usable rows."""

from collections.abc import Iterator

import numpy as np

from mixture_core.alarms import DEAD, LASTING, WINDOW
from mixture_torch.report.run import Run
from mixture_torch.report.words import Verdict

SHRUNK = 0.01  # collapse if trace_B is below this part of its largest value, and there is no mixture_extra.csv
UNUSABLE = "Since step {}, all embeddings have been unusable"
LACK = "A full verdict needs `mixture_extra.csv`, which the option `extra` writes."


def no_rows(run: Run) -> Iterator[Verdict]:
    """Yields a verdict if all rows at the end of the log were ignored."""
    assert run.extra is not None
    extra = run.extra
    usable = np.flatnonzero(extra["n_rows"] > extra["n_ignored"])
    first = int(usable[-1]) + 1 if len(usable) else 0
    n_steps = len(extra["step"]) - first
    if n_steps > 1 and extra["n_ignored"][-1] > 0:
        since = int(extra["step"][first])
        yield Verdict(
            level="wrong",
            kind="no rows",
            since=since,
            title=UNUSABLE.format(since),
            text=f"In the last {n_steps} steps all rows were ignored ({extra['n_ignored'][-1]} in the last step), "
            "because they contain NaN or infinity or have no label. Has the loss diverged?",
            figures={"n_ignored": float(extra["n_ignored"][-1])},
        )


def nothing(run: Run) -> Verdict:
    """Returns the verdict on a run without alarms: `fine` if the log is long enough to tell, otherwise `unknown`."""
    assert run.extra is not None
    extra, n_steps = run.extra, len(run.extra["step"])
    first, last = int(extra["step"][0]), int(extra["step"][-1])
    steps = _steps(n_steps, first, last)
    if n_steps <= WINDOW + 1:
        text = f"The log has {steps}; a change can be detected from {WINDOW + 2} steps on."
        return Verdict(level="unknown", kind="unknown", title="The run is too short for a verdict", text=text)
    figures = {name: float(extra[name][-1]) for name in ("trace_T", "share_B", "participation_ratio")}
    K = extra["pi"].shape[1]
    figures |= {"pi_min": float(extra["pi"][-1].min())}
    excesses = [e for e in (float(entry.get("excess", np.nan)) for entry in run.snapshots) if not np.isnan(e)]
    of_D = "" if run.D is None else f" of {run.D}"
    told = [
        f"No alarm in {steps}. At the end, the total variance is {figures['trace_T']:.3g}, "
        f"{100 * figures['share_B']:.0f} % of it between the {K} components. The embeddings use "
        f"{figures['participation_ratio']:.1f}{of_D} directions. The smallest weight is {figures['pi_min']:.3f}."
    ]
    if excesses:
        figures["excess"] = excesses[-1]
        told.append(f"The excess over a Gaussian is {excesses[-1]:.2f} (0 means no clusters).")
    if len(excesses) < 2:
        told.append("Whether there are clusters is not known yet: this takes two snapshots 100 steps apart.")
    if run.D is None:
        told.append("What part of the dimensions is in use is not known: no file says how many there are.")
    return Verdict(level="fine", kind="fine", title="Nothing is wrong", text=" ".join(told), figures=figures)


def of_log(run: Run) -> Verdict:
    """Returns the verdict from `mixture.csv` alone."""
    log = run.log
    n_steps = len(log["step"])
    if not n_steps:
        return Verdict(
            level="unknown", kind="unknown", title="No step has been logged yet", text="The log has no rows."
        )
    known = np.flatnonzero(np.isfinite(log["trace_B"]))
    step = log["step"]
    if not len(known) or n_steps - 1 - known[-1] > 1:
        first = int(known[-1]) + 1 if len(known) else 0
        text = f"The last {n_steps - first} rows have no figures: all embeddings had NaN or infinity, or no label."
        title = UNUSABLE.format(step[first])
        return Verdict(level="wrong", kind="no rows", since=int(step[first]), title=title, text=text)
    trace_B, pi_min = log["trace_B"][known], log["pi_min"][known]
    recent = slice(-LASTING, None)
    figures = {"trace_B": float(trace_B[-1]), "pi_min": float(pi_min[-1])}
    if len(known) >= LASTING and (trace_B[recent] < SHRUNK * trace_B.max()).all():
        since = int(step[known[np.flatnonzero(trace_B >= SHRUNK * trace_B.max())[-1] + 1]])
        text = f"The variance between components is {trace_B[-1]:.3g}; its largest was {trace_B.max():.3g}. {LACK}"
        title = f"All components have had nearly the same mean since step {since}"
        return Verdict(level="wrong", kind="collapse", since=since, title=title, text=text, figures=figures)
    light = pi_min * log["K"][known] < DEAD
    if len(known) >= LASTING and light[recent].all():
        full = np.flatnonzero(~light)
        since = int(step[known[full[-1] + 1 if len(full) else 0]])
        text = f"The smallest weight is {pi_min[-1]:.2g}. {LACK}"
        title = f"A component has had hardly any samples since step {since}"
        return Verdict(level="wrong", kind="dead component", since=since, title=title, text=text, figures=figures)
    text = (
        f"In {_steps(n_steps, step[0], step[-1])}, neither the variance between components nor a weight collapsed; "
        f"at the end they are {trace_B[-1]:.3g} and {pi_min[-1]:.3f} to {log['pi_max'][known[-1]]:.3f}. {LACK}"
    )
    return Verdict(
        level="unknown", kind="unknown", title="Too little is known for a verdict", text=text, figures=figures
    )


def _steps(n: int, first: int, last: int) -> str:
    return f"{n} steps, {first} to {last}" if n > 1 else f"1 step, {first}"
