"""Alarms: what changed, and what is wrong, according to the figures that are logged at each step.

`observe` takes the rows of a log one by one, in training or afterwards. It computes with plain numbers, on the host.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

import attrs

BASELINE, GAP = 40, 4  # a row is compared with the 40 rows before a gap of 4 rows
WINDOW = BASELINE + GAP
# In standard deviations. Successive changes of scalars over two rows share a row, so chance brings two more easily.
CHANGE, CHANGE_OF_SCALARS = 3.5, 5.0
SCALARS = ("trace_T", "share_B")
LEAST_CHANGES = (0.001, 0.01)  # of the logarithms of these over two rows; smaller ones have not changed
LEAST_ROWS = 6  # of a component in a batch; with fewer, two batches in succession without any are no surprise
CHANGES = ("composition", *SCALARS)  # kinds of alarms
UNIT = 2.0**-19  # compared figures are whole multiples of it, so running sums are exact and depend on the window alone
LASTING = 20  # rows in succession after which a level is reported
LASTING_EXCESS = 2  # the same for the excess, in rows that have it: it is not computed at each step
COLLAPSED = 0.1  # of the largest trace_T, or of 1 if that is less; rows of norm 1 that fill the sphere have 1
NORM_1 = 1.01  # trace_T of rows of norm 1 is at most 1; with room for rounding
FLAT, ONE_WAY = 0.09, 0.25  # participation_ratio / D, and opnorm_B / trace_B, at dimensional collapse
SHAPELESS, ROUND = 0.035, 0.5  # excess, and participation_ratio / D, of embeddings without clusters
DEAD = 0.01  # pi times K
SEEDING_ROWS = 4  # per component, until which components mean nothing yet

Row: TypeAlias = tuple[float, ...]  # (K + 2,) the compared figures, in UNITs
Levels: TypeAlias = Mapping[tuple[str, int | None], tuple[int, int]]


class Reading(NamedTuple):
    """The figures of one logged step; a figure that is not known is nan."""

    step: int
    n_rows: int  # usable rows of the batch; those of `mixture_extra.csv` less `n_ignored`
    n_relocated: int
    trace_B: float
    opnorm_B: float
    trace_T: float
    participation_ratio: float
    pi: tuple[float, ...]  # (K,)
    n: tuple[float, ...]  # (K,) rows of the batch
    excess: float = math.nan  # of a snapshot; see `mixture_core.null`


@attrs.frozen(kw_only=True)
class Alarm:
    """A figure that changed, or a level that lasts.

    Attributes:
        kind: A change: `composition` (of a component's share of the batch), `trace_T` or `share_B`. Or a level:
            `collapse` (little variance), `dimensional collapse` (few directions), `no structure` (no more than a
            Gaussian has) or `dead component` (little weight).
        component: Its index; None if the alarm is about all embeddings.
        step: The step at which it was raised.
        since: The first step of the change or of the level.
        figures: The figures that show it, by name. `deviation` is the distance of the figure that changed from the
            mean of 40 earlier rows, in standard deviations; for `composition` this figure is sqrt(n / N).
    """

    kind: str
    component: int | None
    step: int
    since: int
    figures: Mapping[str, float]

    def __str__(self) -> str:
        """Returns the alarm in one line."""
        figures = ", ".join(f"{name} {value:.3g}" for name, value in self.figures.items())
        about = "" if self.component is None else f" (component {self.component})"
        began = "changed at" if self.kind in CHANGES else "since"
        return f"{self.kind}{about} {began} step {self.since}: {figures}"


@attrs.frozen(eq=False, kw_only=True)
class AlarmState:
    """What `observe` keeps of earlier rows.

    Attributes:
        D: Width of the embeddings; nan if it is not known, and then levels that need it are left out.
        step: Of the last row.
        scalars: Logarithms of trace_T and share_B in the last two rows since a relocation.
        count: Rows since the first, or since K changed.
        n_seen: Usable embeddings in these rows.
        settled: Rows since components were last relocated.
        window: The compared figures of the last 44 rows; zeros before the first.
        sums: Their sums over the first 40 of these rows.
        squares: Their sums of squares over the same rows.
        off: The deviation of each figure that was beyond its limit in the last row, by index.
        quiet: For how many more rows a figure that changed raises no alarm, by index.
        largest: Largest trace_T so far.
        levels: First step and number of rows of each level that is beyond its bound, by kind and component.
    """

    D: float
    step: int = 0
    scalars: tuple[Row, ...] = ()
    count: int = 0
    n_seen: float = 0
    settled: int = 0
    window: tuple[Row, ...] = ()
    sums: Row = ()
    squares: Row = ()
    off: Mapping[int, float] = attrs.field(factory=dict)
    quiet: Mapping[int, int] = attrs.field(factory=dict)
    largest: float = 0.0
    levels: Levels = attrs.field(factory=dict)


def observe(state: AlarmState, reading: Reading) -> tuple[AlarmState, tuple[Alarm, ...]]:
    """Returns the state after one more row of the log, and the alarms that this row raises.

    The compared figures are sqrt(n_k / N) for each component, whose standard deviation, 1 / (2 sqrt(N)), does not
    depend on the share n_k / N, and the changes of log trace_T and log share_B over two rows, because these averages
    over a window wander. A figure is compared with the 40 rows before a gap of 4 rows: its deviation is the distance
    from their mean, in standard deviations. It has changed if its deviation exceeds the limit in two rows in
    succession, with the same sign; small changes of trace_T and share_B, and losses of fewer than 6 rows, are ignored.
    A change need not be a fault. For the next 44 rows the figure raises no further alarm. After a relocation,
    components mean something else, and their comparison begins again. Rows without usable embeddings are skipped.

    A level is reported once it has lasted for 20 rows, and again if it ends and comes back. If its figures are not
    known, the level stays as it is. Dead components are looked for after 4 K embeddings. Levels assume embeddings of
    norm 1; after trace_T has exceeded 1, dimensional collapse is not reported.

    Args:
        state: `AlarmState(D=...)` before the first row.
        reading: The row.

    Raises:
        ValueError: `pi` and `n` do not have one figure for each component.

    Example:
        >>> from mixture_core.alarms import AlarmState, Reading, observe
        >>> state = AlarmState(D=8)
        >>> for step in range(60):
        ...     n = (50.0 + step % 3, 50.0 - step % 3) if step < 50 else (100.0, 0.0)
        ...     reading = Reading(step, 100, 0, 0.5, 0.4, 1.0, 4.0, (0.5, 0.5), n)
        ...     state, alarms = observe(state, reading)
        ...     for alarm in alarms:
        ...         print(alarm.kind, alarm.component, alarm.since)
        composition 0 50
        composition 1 50

    Bartlett, "The use of transformations" (1947), for the square root.
    """
    if not (K := len(reading.pi)) == len(reading.n) or not K:
        raise ValueError("`pi` and `n` of a reading must have one figure for each component.")
    if min(reading.n_rows - 1, *reading.n) < 0 or not math.isfinite(reading.trace_T + reading.trace_B + sum(reading.n)):
        return state, ()
    trace_T = max(reading.trace_T, 1e-12)
    now = math.log(trace_T), math.log(max(reading.trace_B / trace_T, 1e-12))
    before = () if reading.n_relocated else state.scalars  # a relocation changes share_B
    unit = math.sqrt(reading.n_rows) * UNIT
    changes = [(value - earlier) // UNIT for value, earlier in zip(now, (*before, now)[0], strict=True)]
    row = (*[math.sqrt(n) // unit for n in reading.n], *changes)
    if len(state.sums) != len(row):
        zeros = (0.0,) * len(row)
        window, largest, levels = (zeros,) * WINDOW, state.largest, state.levels
        state = AlarmState(D=state.D, window=window, sums=zeros, squares=zeros, largest=largest, levels=levels)
    settled = 0 if reading.n_relocated else state.settled + 1
    off = _off(state, row, reading.n_rows, settled) if state.count >= WINDOW else {}
    changed = [i for i in off if off[i] * state.off.get(i, 0.0) > 0 and i not in state.quiet]
    quiet = {i: rows - 1 for i, rows in state.quiet.items() if rows > 1}
    largest = max(state.largest, reading.trace_T)
    n_seen = state.n_seen + reading.n_rows
    levels, lasting = _levels(state, reading, largest, is_seeded=n_seen >= SEEDING_ROWS * K)
    sums, squares, enter, leave = state.sums, state.squares, state.window[-GAP], state.window[0]
    after = AlarmState(
        D=state.D,
        step=reading.step,
        scalars=(*before[-1:], now),
        count=state.count + 1,
        n_seen=n_seen,
        settled=settled,
        window=(*state.window[1:], row),
        sums=tuple([total + a - b for total, a, b in zip(sums, enter, leave, strict=True)]),
        squares=tuple([total + (a - b) * (a + b) for total, a, b in zip(squares, enter, leave, strict=True)]),
        off=off,
        quiet=quiet | dict.fromkeys(changed, WINDOW),
        largest=largest,
        levels=levels,
    )
    return after, (*[_change(state, reading, i, off[i]) for i in changed], *lasting)


def _off(state: AlarmState, row: Row, n_rows: int, settled: int) -> dict[int, float]:
    """Deviation of each figure that is beyond its limit, in standard deviations."""
    K = len(row) - len(SCALARS)
    least = 0.5 / math.sqrt(n_rows) / UNIT  # the standard deviation from sampling the batch
    bounds = enumerate(LEAST_CHANGES, K)
    suspects = [(i, CHANGE_OF_SCALARS, 1.0) for i, bound in bounds if abs(row[i]) * UNIT > bound]
    if settled >= WINDOW:
        bound = BASELINE * CHANGE * least
        away = [BASELINE * value - total for value, total in zip(row[:K], state.sums[:K], strict=True)]
        suspects += [(i, CHANGE, least) for i, distance in enumerate(away) if not -bound < distance < bound]
    few = BASELINE * 2 * math.sqrt(LEAST_ROWS) * least  # sqrt(n / N) is 2 sqrt(n) of its standard deviations
    off: dict[int, float] = {}
    for i, limit, floor in suspects:
        total = state.sums[i]
        variance = (BASELINE * state.squares[i] - total * total) / (BASELINE * (BASELINE - 1))
        deviation = (row[i] - total / BASELINE) / math.sqrt(max(variance, floor * floor))
        if deviation > limit or (deviation < -limit and (i >= K or total >= few)):
            off[i] = deviation
    return off


def _change(state: AlarmState, reading: Reading, index: int, deviation: float) -> Alarm:
    kind, component = ("composition", index) if index < len(reading.pi) else (SCALARS[index - len(reading.pi)], None)
    scalars = {"trace_T": reading.trace_T, "trace_B": reading.trace_B}
    figures = scalars if component is None else {"pi": reading.pi[index], "n": reading.n[index]}
    figures |= {"deviation": deviation}
    return Alarm(kind=kind, component=component, step=reading.step, since=state.step, figures=figures)


def _levels(state: AlarmState, reading: Reading, largest: float, *, is_seeded: bool) -> tuple[Levels, list[Alarm]]:
    """The levels beyond their bounds after this row, and the alarms of those that have just lasted long enough."""
    levels: dict[tuple[str, int | None], tuple[int, int]] = {}
    alarms: list[Alarm] = []
    for kind, component, figures in _beyond(state.D, reading, largest):
        if component is not None and not is_seeded:
            continue
        since, rows = state.levels.get((kind, component), (reading.step, 0))
        if not math.isnan(sum(figures.values())):
            rows += 1
            if rows == (LASTING_EXCESS if kind == "no structure" else LASTING):
                alarms.append(Alarm(kind=kind, component=component, step=reading.step, since=since, figures=figures))
        if rows:
            levels[kind, component] = since, rows
    return levels, alarms


def _beyond(D: float, reading: Reading, largest: float) -> Iterator[tuple[str, int | None, dict[str, float]]]:
    """Kind, component and figures of each level that is beyond its bound, or whose figures are not known."""
    pi, excess = reading.pi, reading.excess
    used = reading.participation_ratio / D
    one_way = reading.opnorm_B / reading.trace_B if reading.trace_B > 0 else 0.0
    if reading.trace_T < COLLAPSED * min(largest, 1.0):
        yield "collapse", None, {"trace_T": reading.trace_T}
    if largest <= NORM_1 and (math.isnan(used + one_way) or (used < FLAT and one_way > ONE_WAY)):
        yield "dimensional collapse", None, {"participation_ratio / D": used, "opnorm_B / trace_B": one_way}
    if math.isnan(excess + used) or (excess < SHAPELESS and used > ROUND):
        yield "no structure", None, {"excess": excess, "participation_ratio / D": used}
    least = DEAD / len(pi)
    for k, share in enumerate(pi) if min(pi) < least else ():
        if share < least:
            yield "dead component", k, {"pi": share}
