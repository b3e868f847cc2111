"""Verdicts: what is wrong with a run and what changed. Alarms with one cause give one verdict."""

from collections.abc import Iterator

from mixture_core.alarms import WINDOW, Alarm
from mixture_torch.report.events import events_of, row_of
from mixture_torch.report.quiet import no_rows, nothing, of_log
from mixture_torch.report.run import Run
from mixture_torch.report.words import LEVELS, Verdict, of_event, of_level

__all__ = ["Verdict", "verdicts"]
GLOBAL = ("collapse", "dimensional collapse", "no structure")  # each explains those after it


def verdicts(run: Run) -> tuple[Verdict, ...]:
    """Returns what is wrong with a run and what changed, worst first; if nothing is, one verdict that says so.

    One verdict covers all changes that begin within 44 rows, all levels of one kind that begin within 44 rows, and
    everything that comes with a collapse.

    Args:
        run: From `read_run`.
    """
    if run.extra is None or not len(run.extra["step"]):
        return (of_log(run),)
    found = [*no_rows(run), *_of_alarms(run)]
    found.sort(key=lambda verdict: (verdict.level != "wrong", verdict.since))
    return tuple(found) or (nothing(run),)


def _of_alarms(run: Run) -> Iterator[Verdict]:
    events, told = list(events_of(run)), set[int]()
    for group in _levels(run):
        alarm, row = group[0], row_of(run, group[0].since)
        near = [n for n, event in enumerate(events) if -WINDOW <= row - row_of(run, event.since) <= WINDOW]
        if alarm.kind in GLOBAL:
            told.update(near)
        elif any(alarm.component in events[n].lost for n in near):
            continue  # the verdict on the event says that this component lost its samples
        yield of_level(run, group, _end(run, group))
    for n, event in enumerate(events):
        if n not in told:
            yield of_event(event)


def _levels(run: Run) -> Iterator[list[Alarm]]:
    """Yields groups of levels of one kind that began together, except those that a worse level explains."""
    groups: list[list[Alarm]] = []
    for alarm in run.alarms:
        if alarm.kind in LEVELS:
            row = row_of(run, alarm.since)
            mates = (g for g in groups if g[0].kind == alarm.kind and abs(row - row_of(run, g[0].since)) <= WINDOW)
            if (mate := next(mates, None)) is None:
                groups.append([alarm])
            else:
                mate.append(alarm)
    spans = {kind: [(g[0].since, _end(run, g)) for g in groups if g[0].kind == kind] for kind in GLOBAL}
    for group in groups:
        worse = GLOBAL[: GLOBAL.index(group[0].kind)] if group[0].kind in GLOBAL else GLOBAL[:1]
        since = group[0].since
        if not any(begin <= since and (end is None or since <= end) for kind in worse for begin, end in spans[kind]):
            yield group


def _end(run: Run, group: list[Alarm]) -> int | None:
    """Returns the step at which the last level of a group ended; None if one of them lasts."""
    ends = [end for alarm, end in zip(run.alarms, run.ends, strict=True) if any(alarm is one for one in group)]
    return None if None in ends else max(end for end in ends if end is not None)
