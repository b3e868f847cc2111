"""Recomputes the alarms of a run from its files."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy.typing as npt

from mixture_core.alarms import CHANGES, Alarm, AlarmState, Reading, observe
from mixture_torch.files.extra import shared
from mixture_torch.files.log import Position

BLOCK = 50_000  # rows at a time as Python numbers, which take much more memory than arrays
FIGURES = Reading._fields[:-1]  # the last is the excess, which only snapshots have

# Alarms, each with the first step after its level ended: None if the level lasts, and for a change.
Past: TypeAlias = list[tuple[Alarm, int | None]]
Columns: TypeAlias = Mapping[str, npt.NDArray[Any]]


def replay(log: Columns, extra: Columns, snapshots: Iterable[Mapping[str, Any]], *, D: int | None) -> Past:
    """Returns the alarms of a run.

    Args:
        log: Columns of `mixture.csv`, with increasing steps.
        extra: Columns of `mixture_extra.csv`, likewise.
        snapshots: With `step`, `epoch` and `excess`.
        D: Width of the embeddings. If None, alarms that need it are left out.
    """
    excesses = {(entry["epoch"], entry["step"]): entry.get("excess", math.nan) for entry in snapshots}
    state, excess, past = AlarmState(D=math.nan if D is None else D), math.nan, Past()
    lasting: dict[tuple[str, int | None], int] = {}
    for place, figures in _rows(log, extra):
        state, alarms = observe(state, Reading._make((*figures, excess)))
        excess = excesses.get(place, math.nan)  # a snapshot is seen with the next row
        for alarm in alarms:
            if alarm.kind not in CHANGES:
                lasting[alarm.kind, alarm.component] = len(past)
            past.append((alarm, None))
        for level in lasting.keys() - state.levels.keys():
            begun = lasting.pop(level)
            past[begun] = past[begun][0], state.step
    return past


def _rows(log: Columns, extra: Columns) -> Iterator[tuple[Position, tuple[Any, ...]]]:
    """The (epoch, step) and the figures of a `Reading`, but for the excess, of each row that both files have."""
    rows = shared(log, extra)
    rows["n_rows"] = rows["n_rows"] - rows["n_ignored"]
    for begin in range(0, len(rows["step"]), BLOCK):
        block = {name: column[begin : begin + BLOCK].tolist() for name, column in rows.items()}
        places = zip(block["epoch"], block["step"], strict=True)
        yield from zip(places, zip(*(block[name] for name in FIGURES), strict=True), strict=True)
