"""Passes rows, alarms and snapshots to the user's tracker; its errors never stop a run."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from mixture_core.alarms import Alarm
from mixture_core.config import shown
from mixture_torch.files.shards import copied
from mixture_torch.update.figures import Figures
from mixture_torch.update.ranks import text_of

Tracker: TypeAlias = Callable[[dict[str, float], int], object] | None
SLOW = 1.0  # seconds that training waits for the tracker before a warning says so


class Outlet:
    """Calls the tracker of one estimator.

    Args:
        tracker: Called with the figures of a row, by name, and the step. Its method `alarm`, if it has one, gets each
            alarm, and its method `snapshot` each snapshot, as `read_snapshots` returns it. None calls nothing.
        note: Takes the kind and text of a warning, and warns once per kind.
    """

    def __init__(self, tracker: Tracker, note: Callable[[str, str], None]) -> None:
        if tracker is not None and not callable(tracker):
            raise TypeError(f"`tracker` must be a function of scalars and a step, or None, got {shown(tracker)}.")
        self._tracker, self._note = tracker, note

    def row(self, figures: Figures, step: int) -> None:
        """Sends the figures of a row."""
        start = time.monotonic()
        if self._tracker is not None:
            self._send("__call__", figures.scalars, step, step=step)
        if (seconds := time.monotonic() - start) >= SLOW:
            text = f"Training waited {seconds:.1f} s for the tracker at step {step}. This warning comes once."
            self._note("slow tracker", text)

    def alarm(self, alarm: Alarm) -> None:
        """Sends an alarm."""
        self._send("alarm", alarm, step=alarm.step)

    def snapshot(self, entry: Mapping[str, Any]) -> None:
        """Sends a copy of a snapshot, on the CPU."""
        if self._tracker is not None:
            self._send("snapshot", copied(entry), step=entry["step"])

    def _send(self, method: str, *arguments: Any, step: int) -> None:
        """Calls a method of the tracker if it exists; warns once for each class of errors it raises."""
        try:
            function = getattr(self._tracker, method, None)
            if function is not None:
                function(*arguments)
        except Exception as error:  # any: it is the user's code, and must not end the run
            name = type(error).__name__
            text = f"The tracker raised {name} at step {step}: {text_of(error).rstrip('.')}. Training goes on."
            self._note(f"tracker: {name}", text)
