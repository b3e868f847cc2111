"""What the alarms promise, on rows written by hand."""

import itertools
import math
import random
from typing import Any

import pytest

from mixture_core.alarms import WINDOW, Alarm, AlarmState, Reading, observe

K = 4
NAN = math.nan
STEADY = Reading(
    step=0,
    n_rows=100,
    n_relocated=0,
    trace_B=0.5,
    opnorm_B=0.1,
    trace_T=0.9,
    participation_ratio=4.0,
    pi=(0.25,) * K,
    n=(25.0,) * K,
)
GONE = (0.0, 33.0, 33.0, 34.0)


def rows(n: int, *, seed: int = 1, decay: float = 0.0) -> list[Reading]:
    """A healthy run: the rows of components and the variance vary a little, the latter as averages over a window do."""
    chance, made, level = random.Random(seed), list[Reading](), 0.0
    for step in range(n):
        counts = [25 + chance.randint(-3, 3) for _ in range(K - 1)]
        level = decay * level + (1 - decay) * chance.gauss(0, 0.01)
        trace_T = 0.9 * math.exp(level)
        share = tuple(float(count) for count in (*counts, 100 - sum(counts)))
        made.append(STEADY._replace(step=step, n=share, trace_T=trace_T))
    return made


def change(run: list[Reading], where: range, **figures: Any) -> list[Reading]:
    return [row._replace(**figures) if row.step in where else row for row in run]


def follow(run: list[Reading], state: AlarmState | None = None) -> tuple[AlarmState, list[Alarm]]:
    state, alarms = state or AlarmState(D=8), list[Alarm]()
    for row in run:
        state, raised = observe(state, row)
        alarms += raised
    return state, alarms


def raised(run: list[Reading]) -> list[tuple[str, int | None, int, int]]:
    return [(alarm.kind, alarm.component, alarm.step, alarm.since) for alarm in follow(run)[1]]


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.95, 0.99])
def test_steady_figures_raise_at_most_one_alarm_in_20_runs(decay: float) -> None:
    assert sum(bool(raised(rows(300, seed=seed, decay=decay))) for seed in range(1, 21)) <= 1


def test_component_that_loses_its_rows_is_named_in_the_second_step() -> None:
    run = change(rows(80), range(60, 80), n=GONE)
    assert ("composition", 0, 61, 60) in raised(run)


def test_one_step_alone_raises_nothing() -> None:
    assert raised(change(rows(80), range(60, 61), n=GONE)) == []


def test_two_steps_off_in_opposite_directions_raise_nothing() -> None:
    run = change(rows(80), range(60, 61), n=(0.0, 50.0, 25.0, 25.0))
    assert raised(change(run, range(61, 62), n=(50.0, 0.0, 25.0, 25.0))) == []


@pytest.mark.parametrize(
    ("kind", "figures"), [("trace_T", {"trace_T": 0.6, "trace_B": 1 / 3}), ("share_B", {"trace_B": 0.3})]
)
def test_variance_that_changes_is_named(kind: str, figures: dict[str, Any]) -> None:
    assert raised(change(rows(65), range(60, 65), **figures)) == [(kind, None, 61, 60)]


def test_relocation_begins_the_comparison_of_components_anew() -> None:
    run = change(rows(200), range(60, 200), n=GONE)
    assert raised(change(run, range(60, 61), n_relocated=1)) == []
    again = change(change(rows(200), range(60, 61), n_relocated=1), range(60 + WINDOW, 200), n=GONE)
    assert ("composition", 0, 61 + WINDOW, 60 + WINDOW) in raised(again)


def test_what_changed_is_quiet_for_a_window() -> None:
    flicker = [(0.0, 50.0, 25.0, 25.0), (50.0, 0.0, 25.0, 25.0)]
    run = rows(60)
    for step in range(60, 200):
        run.append(STEADY._replace(step=step, n=flicker[step % 3 == 0]))
    steps = [alarm.step for alarm in follow(run)[1] if alarm.component == 0]
    assert steps
    assert all(later - earlier > WINDOW for earlier, later in itertools.pairwise(steps))


def test_idle_and_unknown_rows_are_passed_over() -> None:
    state, _ = follow(rows(50))
    for figures in ({"n_rows": 0}, {"trace_T": NAN}, {"trace_T": math.inf}, {"trace_B": NAN}, {"n": (NAN,) * K}):
        same, alarms = observe(state, STEADY._replace(**figures))
        assert same is state
        assert alarms == ()


LEVELS = [
    ("collapse", None, {"trace_T": 0.03, "trace_B": 1 / 60}),
    ("dimensional collapse", None, {"participation_ratio": 0.7, "opnorm_B": 0.2}),
    ("dead component", 2, {"pi": (0.333, 0.333, 0.001, 0.333)}),
]


@pytest.mark.parametrize(("kind", "component", "figures"), LEVELS)
def test_level_is_reported_when_it_has_lasted_and_again_if_it_came_back(
    kind: str, component: int | None, figures: dict[str, Any]
) -> None:
    run = rows(200)
    for bad in (range(60, 79), range(80, 120), range(150, 200)):
        run = change(run, bad, **figures)
    found = [each for each in raised(run) if each[0] == kind]
    assert found == [(kind, component, 99, 80), (kind, component, 169, 150)]


def test_directions_are_judged_only_at_norm_1() -> None:
    few = {"participation_ratio": 0.7, "opnorm_B": 0.2}
    assert len(raised(change(rows(100), range(50, 100), **few))) == 1
    wide = [row._replace(trace_T=50 * row.trace_T, trace_B=50 * row.trace_B) for row in rows(100)]
    wide = [row._replace(opnorm_B=0.5 * row.trace_B) for row in wide]
    assert raised(change(wide, range(50, 100), participation_ratio=0.7)) == []


def test_few_rows_that_are_missing_raise_no_alarm() -> None:
    def lost(n: float) -> list[tuple[str, int | None, int, int]]:
        run = [row._replace(n=(n, 30.0, 30.0, 40.0 - n)) for row in rows(60)]
        return raised(change(run, range(50, 60), n=(0.0, 30.0, 30.0, 40.0)))

    assert lost(5.0) == []
    assert [each[:2] for each in lost(7.0)] == [("composition", 0)]


def test_lack_of_structure_is_reported_at_the_second_excess_that_shows_it() -> None:
    run = [row._replace(participation_ratio=6.0) for row in rows(100)]
    for step, excess in ((9, 0.02), (19, 0.3), (29, 0.02), (39, 0.02), (49, 0.02)):
        run = change(run, range(step, step + 1), excess=excess)
    assert raised(run) == [("no structure", None, 39, 29)]


def test_level_stays_as_it_is_while_its_figures_are_unknown() -> None:
    unknown = {"participation_ratio": NAN}
    run = change(change(rows(100), range(50, 100), participation_ratio=0.7, opnorm_B=0.2), range(60, 65), **unknown)
    assert [each[1:] for each in raised(run) if each[0] == "dimensional collapse"] == [(None, 74, 50)]
    assert raised(change(rows(100), range(50, 100), **unknown)) == []


def test_components_are_judged_only_after_rows_enough_to_seed_means() -> None:
    run = [row._replace(n_rows=1, pi=(1.0, 0.0, 0.0, 0.0)) for row in rows(60)]
    assert {each[2:] for each in raised(run) if each[0] == "dead component"} == {(34, 15)}


@pytest.mark.parametrize("figures", [{"pi": (), "n": ()}, {"pi": (0.5, 0.5)}])
def test_reading_without_a_figure_for_each_component_is_refused(figures: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^`pi` and `n` of a reading must have one figure for each component"):
        observe(AlarmState(D=8), STEADY._replace(**figures))


def test_rows_read_back_raise_the_same_alarms() -> None:
    run = change(change(rows(200), range(60, 100), n=GONE), range(150, 200), trace_T=0.02)
    live, at_once = follow(run[:77])
    live, later = follow(run[77:], live)
    again, read_back = follow([Reading(*row) for row in run])
    assert at_once + later == read_back
    assert len(read_back) > 2
    assert (again.window, again.sums, again.squares) == (live.window, live.sums, live.squares)


def test_comparison_depends_on_the_window_alone() -> None:
    whole, _ = follow(rows(300))
    last, _ = follow(rows(300)[-WINDOW - 2 :])  # two more, for the first change over two rows
    assert (whole.window, whole.sums, whole.squares) == (last.window, last.sums, last.squares)


def test_comparison_begins_anew_if_K_changes() -> None:
    other = STEADY._replace(pi=(0.5, 0.5), n=(60.0, 40.0))
    run = rows(60) + [other._replace(step=step) for step in range(60, 120)]
    assert raised(run) == []
    assert ("composition", 1, 121, 120) in raised(
        run + [other._replace(step=step, n=(100.0, 0.0)) for step in range(120, 125)]
    )


def test_alarm_is_one_line() -> None:
    alarm = Alarm(kind="composition", component=3, step=61, since=60, figures={"pi": 0.25, "deviation": -7.123})
    assert str(alarm) == "composition (component 3) changed at step 60: pi 0.25, deviation -7.12"
    alarm = Alarm(kind="collapse", component=None, step=61, since=42, figures={"trace_T": 0.0123})
    assert str(alarm) == "collapse since step 42: trace_T 0.0123"


def test_state_can_be_observed_again() -> None:
    run = change(rows(80), range(50, 80), n=GONE, pi=(0.333, 0.333, 0.001, 0.333))
    old, _ = follow(run[:51])
    first, second = follow(run[51:], old), follow(run[51:], old)
    assert first[1] == second[1] != []
    assert first[0].levels == second[0].levels
