"""Verdicts on runs without alarms: healthy, too little known, or no usable rows."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from mixture_core.alarms import DEAD, LASTING, WINDOW
from mixture_torch.report.run import Run
from mixture_torch.report.verdict import Verdict

SHRUNK = 0.01  # without mixture_extra.csv, a collapse is a trace_B below this part of its largest value
LACK = "A full verdict needs `mixture_extra.csv`, which the option `extra` writes."


def unusable(run: Run) -> Iterator[Verdict]:
    """Yields a verdict if no embedding was usable in at least the last two steps, or in two steps before."""
    step, known = run.log["step"], np.isfinite(run.log["trace_B"])  # rows without a usable embedding hold nan
    first = _last_true(known) + 1
    why = "their batches were empty, or all embeddings had NaN or infinity, or no label."
    if (n_steps := len(step) - first) >= 2:
        yield Verdict(
            level="wrong",
            kind="no rows",
            since=int(step[first]),
            title=f"Since step {step[first]}, no embedding has been usable",
            text=f"These are the last {n_steps} steps: {why} Did the loss diverge?",
        )
    elif len(lost := step[~known]) >= 2:
        yield Verdict(
            level="changed",
            kind="no rows",
            since=int(lost[0]),
            title=f"In {len(lost)} of {len(step)} steps, no embedding was usable",
            text=f"The first was step {lost[0]} and the last step {lost[-1]}: {why}",
        )


def of_figures(run: Run) -> Verdict:
    """Returns the verdict on a run without alarms: `fine`, or `unknown` if it is too short."""
    assert run.extra is not None
    is_finite = np.isfinite(run.extra["trace_T"] + run.extra["n"].sum(axis=1))
    known = is_finite & (run.extra["n_rows"] > run.extra["n_ignored"])  # other rows raise no alarm
    extra = {name: column[known] for name, column in run.extra.items()}
    steps = _steps(extra["step"])
    if len(extra["step"]) <= WINDOW + 1:
        text = f"The log has figures of {steps}; a change can be detected from {WINDOW + 2} steps on."
        return Verdict(level="unknown", kind="unknown", title="The run is too short for a verdict", text=text)
    of_D = "" if run.D is None else f" of {run.D}"
    told = [
        f"No alarm in {steps}. At the end, the total variance is {extra['trace_T'][-1]:.3g}, "
        f"{100 * extra['share_B'][-1]:.0f} % of it between components. The embeddings use {run.directions:.1f}{of_D} "
        f"directions. The smallest weight is {extra['pi'][-1].min():.3f}."
    ]
    if ignored := extra["n_ignored"].sum():
        told.append(f"Of all rows, {100 * ignored / extra['n_rows'].sum():.2g} % had NaN, infinity or no label.")
    if moves := np.count_nonzero(extra["n_relocated"]):
        told.append(f"In {moves} steps components moved; changes of shares are not seen until {WINDOW} steps later.")
    excesses = [e for e in (float(entry.get("excess", np.nan)) for entry in run.snapshots) if not np.isnan(e)]
    if excesses:
        told.append(f"The excess over a Gaussian is {excesses[-1]:.2f} (0 means no clusters).")
    if len(excesses) < 2:
        told.append("Whether there are clusters is not known: this takes two snapshots, with `snapshot_every=100`.")
    if run.D is None:
        told.append("What part of the dimensions is in use is not known: no file says how many there are.")
    return Verdict(level="fine", kind="fine", title="Nothing is wrong", text=" ".join(told))


def of_log(run: Run) -> Verdict:
    """Returns the verdict from `mixture.csv` alone."""
    known = np.isfinite(run.log["trace_B"])
    step, K, trace_B, pi_min, pi_max = (run.log[name][known] for name in ("step", "K", "trace_B", "pi_min", "pi_max"))
    if not len(step):
        text = f"The log has {len(known)} rows, and none has figures."
        return Verdict(level="unknown", kind="unknown", title="No step with embeddings has been logged yet", text=text)
    largest = trace_B.max()
    collapsed = _last_true(trace_B >= SHRUNK * largest) + 1
    dead = _last_true(pi_min * K >= DEAD) + 1
    if len(step) - collapsed >= LASTING:
        title = f"All components have had nearly the same mean since step {step[collapsed]}"
        text = f"The variance between components is {trace_B[-1]:.3g}; its largest was {largest:.3g}. {LACK}"
        return Verdict(level="wrong", kind="collapse", since=int(step[collapsed]), title=title, text=text)
    if len(step) - dead >= LASTING:
        title = f"A component has had hardly any samples since step {step[dead]}"
        text = f"The smallest weight is {pi_min[-1]:.2g}; equal weights would be {1 / K[-1]:.2g}. {LACK}"
        return Verdict(level="wrong", kind="dead component", since=int(step[dead]), title=title, text=text)
    text = (
        f"In {_steps(step)}, neither the variance between components nor a weight collapsed; "
        f"at the end they are {trace_B[-1]:.3g} and {pi_min[-1]:.3f} to {pi_max[-1]:.3f}. {LACK}"
    )
    return Verdict(level="unknown", kind="unknown", title="Too little is known for a verdict", text=text)


def _last_true(rows: npt.NDArray[np.bool_]) -> int:
    """The last row that is true; -1 without one."""
    return int(np.flatnonzero(rows)[-1]) if rows.any() else -1


def _steps(step: npt.NDArray[np.int64]) -> str:
    if len(step) < 2:
        return f"1 step, {step[0]}" if len(step) else "no step"
    return f"{len(step)} steps, {step[0]} to {step[-1]}"
