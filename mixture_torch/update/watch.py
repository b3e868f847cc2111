"""Watches the rows of the log for alarms, and tells each to a function or, once per kind, to the user."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from mixture_core.alarms import Alarm, AlarmState, Reading, observe
from mixture_torch.update.ranks import text_of

OnAlarm: TypeAlias = Callable[[Alarm], object] | None


class Watch:
    """The alarms of one estimator.

    Args:
        on_alarm: Called with each alarm; if it raises an error, that becomes a warning. None warns of the alarm.
        note: Takes the kind and text of a warning, and keeps the first one of each kind.
    """

    def __init__(self, on_alarm: OnAlarm, note: Callable[[str, str], None]) -> None:
        self._on_alarm, self._note = on_alarm, note
        self._state: AlarmState | None = None
        self.excess = math.nan  # of the snapshot since the last row

    def see(self, row: Mapping[str, Any], *, D: int) -> tuple[Alarm, ...]:
        """Returns the alarms that a row raises; it has the columns of both files by name."""
        figures = {name: row[name] for name in Reading._fields if name in row}
        figures |= {"n_rows": row["n_rows"] - row["n_ignored"], "excess": self.excess}
        self._state, alarms = observe(self._state or AlarmState(D=D), Reading(**figures))
        self.excess = math.nan
        return alarms

    def replay(self, rows: Iterable[Mapping[str, Any]], snapshots: Iterable[Mapping[str, Any]], *, D: int) -> None:
        """Begins anew with the rows and snapshots before a resumed run, whose alarms have been told."""
        excesses = {(entry["epoch"], entry["step"]): entry.get("excess", math.nan) for entry in snapshots}
        self._state, self.excess = None, math.nan
        for row in rows:
            self.see(row, D=D)
            self.excess = excesses.get((row["epoch"], row["step"]), math.nan)

    def tell(self, alarm: Alarm) -> None:
        """Gives an alarm to `on_alarm`, or warns."""
        if self._on_alarm is None:
            self._note(f"alarm: {alarm.kind}", f"Alarm: {alarm}. This warning comes once for each kind.")
            return
        try:
            self._on_alarm(alarm)
        except Exception as error:  # any: it is the user's code, and must not end the run
            self._note("on_alarm", f"`on_alarm` raised {type(error).__name__}: {text_of(error)}. Training goes on.")
