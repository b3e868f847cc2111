"""Watches the rows of the log for alarms, and tells each to a function or, once per kind, to the user."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from mixture_core.alarms import Alarm, AlarmState, Reading, observe
from mixture_torch.update.figures import Figures
from mixture_torch.update.ranks import text_of

OnAlarm: TypeAlias = Callable[[Alarm], object] | None


class Watch:
    """The alarms of one estimator.

    Args:
        on_alarm: Called with each alarm; what it raises becomes a warning. None warns.
        note: Keeps a warning, given its kind and text, unless there was one of its kind.
    """

    def __init__(self, on_alarm: OnAlarm, note: Callable[[str, str], None]) -> None:
        self._on_alarm, self._note = on_alarm, note
        self._state: AlarmState | None = None
        self._seen: Figures | None = None
        self.excess = math.nan  # since the last row

    def has_seen(self, figures: Figures) -> bool:
        """Whether these are the figures of the last row, which an interrupt may have brought a second time."""
        return figures is self._seen

    def see(self, step: int, figures: Figures, *, D: int) -> None:
        """Observes a row."""
        alarms, self._seen = self._observe(reading_of(step, figures, self.excess), D), figures
        self.excess = math.nan
        for alarm in alarms:
            self._tell(alarm)

    def replay(self, readings: Iterable[Reading], *, D: int) -> None:
        """Observes the rows that a resumed run goes on from, whose alarms have been told.

        The last reading is of the row to come: only its excess is known.
        """
        self._state = None
        *earlier, next_one = readings
        for reading in earlier:
            self._observe(reading, D)
        self.excess = next_one.excess

    def _observe(self, reading: Reading, D: int) -> tuple[Alarm, ...]:
        self._state, alarms = observe(self._state or AlarmState(D=D), reading)
        return alarms

    def _tell(self, alarm: Alarm) -> None:
        if self._on_alarm is None:
            self._note(f"alarm: {alarm.kind}", f"Alarm: {alarm}. This warning comes once for each kind.")
            return
        try:
            self._on_alarm(alarm)
        except Exception as error:
            self._note("on_alarm", f"`on_alarm` raised {type(error).__name__}: {text_of(error)}. Training goes on.")


def reading_of(step: int, figures: Figures, excess: float) -> Reading:
    """Returns what `observe` takes."""
    return Reading(
        step=step,
        n_rows=figures.N - figures.n_ignored,
        n_relocated=figures.n_relocated,
        trace_B=figures.trace_B,
        opnorm_B=figures.opnorm_B,
        trace_T=figures.trace_T,
        participation_ratio=figures.participation_ratio,
        pi=figures.pi,
        n=figures.counts,
        rel=figures.rel,
        excess=excess,
    )


def readings_before(
    position: tuple[int, int],
    log: Mapping[str, Any],
    extra: Mapping[str, Any],
    excesses: Mapping[tuple[int, int], float],
) -> Iterator[Reading]:
    """Yields the readings of the rows before an (epoch, step), as `observe` has seen them, and the excess for the next.

    Args:
        position: Of the row to come.
        log: The columns of `mixture.csv`.
        extra: The columns of `mixture_extra.csv`.
        excesses: Of the snapshots, by (epoch, step). A row is read with that of the snapshot before it.
    """
    logged = {key: n for n, key in enumerate(zip(log["epoch"].tolist(), log["step"].tolist(), strict=True))}
    columns = {name: column.tolist() for name, column in extra.items()}
    excess = math.nan
    for n, key in enumerate(zip(columns["epoch"], columns["step"], strict=True)):
        if key < position and (place := logged.get(key)) is not None:
            pi, counts, rel = (tuple(columns[name][n]) for name in ("pi", "n", "rel"))
            yield Reading(
                step=key[1],
                n_rows=columns["n_rows"][n] - columns["n_ignored"][n],
                n_relocated=columns["n_relocated"][n],
                trace_B=float(log["trace_B"][place]),
                opnorm_B=float(log["opnorm_B"][place]),
                trace_T=columns["trace_T"][n],
                participation_ratio=columns["participation_ratio"][n],
                pi=pi,
                n=counts,
                rel=rel,
                excess=excess,
            )
            excess = excesses.get(key, math.nan)
    nan = math.nan
    yield Reading(position[1], 0, 0, nan, nan, nan, nan, (), (), (), excess)
