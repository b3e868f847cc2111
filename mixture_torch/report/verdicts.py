"""Verdicts: what is wrong with a run and what changed. Alarms with one cause give one verdict."""

from collections.abc import Iterator

from mixture_core.alarms import CHANGES, WINDOW
from mixture_torch.report.changes import Change
from mixture_torch.report.levels import WORDS, Level
from mixture_torch.report.quiet import of_figures, of_log, unusable
from mixture_torch.report.run import Run
from mixture_torch.report.verdict import Verdict, together

__all__ = ["Verdict", "noted", "verdicts"]
MOST_NOTED = 6  # components with their own colour; more could not be told apart


def verdicts(run: Run) -> tuple[Verdict, ...]:
    """Returns what is wrong with a run and what changed, worst first; if nothing is, one verdict that says so.

    One verdict covers all changes that begin within 44 rows, all levels of one kind that begin within 44 rows, and
    everything that comes with a collapse.

    Args:
        run: From `read_run`.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from mixture_torch import MixtureStats, read_run, verdicts
        >>> folder = tempfile.mkdtemp()
        >>> with MixtureStats(K=2, enabled=True, log_dir=folder) as estimator:
        ...     for step in range(20):
        ...         _ = estimator.update(torch.randn(64, 8))
        ...         estimator.log_step(step=step, epoch=0)
        >>> print(*verdicts(read_run(folder)))
        unknown: The run is too short for a verdict
          The log has figures of 20 steps, 0 to 19; a change can be detected from 46 steps on.
    """
    found = [*unusable(run), *_of_alarms(run)]
    found.sort(key=lambda verdict: (verdict.level != "wrong", verdict.since))
    if found:
        return tuple(found)
    return (of_log(run) if run.extra is None else of_figures(run),)


def noted(run: Run, found: tuple[Verdict, ...]) -> tuple[int, ...]:
    """Returns the components to show in colour: those in verdicts, worst first, then those with the latest alarms."""
    latest = [alarm.component for alarm in reversed(run.alarms) if alarm.component is not None]
    return tuple(dict.fromkeys([*(k for verdict in found for k in verdict.components), *latest]))[:MOST_NOTED]


def _of_alarms(run: Run) -> Iterator[Verdict]:
    changes = [Change.of(run, group) for group in together(run, *CHANGES)]
    levels = [Level.of(group) for kind in WORDS for group in together(run, kind)]
    for level in levels:
        if any(worse.explains(level) for worse in levels):
            continue
        near = [change for change in changes if abs(change.row - level.row) <= WINDOW]
        if not level.components:  # it is about all embeddings, and explains these changes
            changes = [change for change in changes if change not in near]
        elif any(set(level.components) <= set(change.lost) for change in near):
            continue  # the verdict on the change says that they lost their samples
        yield level.verdict(run)
    for change in changes:
        yield change.verdict()
