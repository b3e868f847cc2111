"""A verdict, the alarms that verdicts are about, and the words that they share."""

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, TypeAlias

import attrs
import numpy as np

from mixture_core.alarms import WINDOW, Alarm
from mixture_torch.report.run import Run

Grade: TypeAlias = Literal["wrong", "changed", "fine", "unknown"]


@attrs.frozen(kw_only=True)
class Verdict:
    """One thing to know about a run.

    Attributes:
        level: `wrong`, `changed`, `fine` or `unknown`.
        kind: The kind of its alarm, `group gone`, `abrupt change`, `no rows`, or the level if there is no alarm.
        components: The components it is about; empty if it is about all embeddings.
        since: The step at which it began; None if it is about the whole run.
        title: What happened, in one sentence.
        text: The figures that show it, and what to check.
    """

    level: Grade
    kind: str
    components: tuple[int, ...] = ()
    since: int | None = None
    title: str
    text: str

    def __str__(self) -> str:
        """Returns the verdict in two lines, as `mixture-diagnostics report` prints it."""
        return f"{self.level}: {self.title}\n  {self.text}"


class Raised(NamedTuple):
    """An alarm of a run."""

    alarm: Alarm
    row: int  # of `mixture_extra.csv`, at which the change or the level begins
    end: int | None  # the step at which the level ended; None if it lasts, and for a change


def together(run: Run, *kinds: str) -> Iterator[list[Raised]]:
    """Yields the alarms of some kinds in groups: all in a group begin within 44 rows of its first, the earliest."""
    if run.extra is None:
        return
    rows = np.searchsorted(run.extra["step"], [alarm.since for alarm in run.alarms]).tolist()
    raised = [Raised(*one) for one in zip(run.alarms, rows, run.ends, strict=True) if one[0].kind in kinds]
    group: list[Raised] = []
    for one in sorted(raised, key=lambda one: one.row):
        if group and one.row > group[0].row + WINDOW:
            yield group
            group = []
        group.append(one)
    if group:
        yield group


def components_of(group: Iterable[Raised]) -> tuple[int, ...]:
    """Returns the components that alarms are about."""
    return tuple(sorted({one.alarm.component for one in group if one.alarm.component is not None}))


def listed(words: Iterable[object]) -> str:
    """Returns words as a list in English."""
    *first, last = map(str, words)
    return f"{', '.join(first)} and {last}" if first else last


def named(components: tuple[int, ...]) -> str:
    """Returns the components as the subject of a sentence."""
    if len(components) > 6:
        return f"{len(components)} components ({', '.join(map(str, components[:5]))} and others)"
    return f"Component{'s' if len(components) > 1 else ''} {listed(components)}"
