"""Recomputes the alarms of a run from its files."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mixture_core.alarms import CHANGES, Alarm, AlarmState, Reading, observe

BLOCK = 50_000  # rows at a time as Python numbers, which take much more memory than arrays

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
    rows = _joined(log, extra, snapshots)
    state, past = AlarmState(D=math.nan if D is None else D), Past()
    lasting: dict[tuple[str, int | None], int] = {}
    for begin in range(0, len(rows["step"]), BLOCK):
        columns = [rows[name][begin : begin + BLOCK].tolist() for name in Reading._fields]
        for reading in map(Reading, *columns):
            state, alarms = observe(state, reading)
            for alarm in alarms:
                if alarm.kind not in CHANGES:
                    lasting[alarm.kind, alarm.component] = len(past)
                past.append((alarm, None))
            for level in lasting.keys() - state.levels.keys():
                place = lasting.pop(level)
                past[place] = past[place][0], reading.step
    return past


def _joined(log: Columns, extra: Columns, snapshots: Iterable[Mapping[str, Any]]) -> dict[str, npt.NDArray[Any]]:
    """The figures of a `Reading`, for the steps in both files."""
    _, of_log, of_extra = np.intersect1d(log["step"], extra["step"], return_indices=True)
    rows = {name: column[of_log] for name, column in log.items()} | {name: of[of_extra] for name, of in extra.items()}
    rows["n_rows"] = rows["n_rows"] - rows["n_ignored"]
    rows["excess"] = np.full(len(of_log), np.nan)
    for entry in snapshots:  # a snapshot is seen with the next row
        place = int(np.searchsorted(rows["step"], entry["step"], side="right"))
        if 0 < place < len(of_log) and rows["step"][place - 1] == entry["step"]:
            rows["excess"][place] = entry.get("excess", np.nan)
    return rows
