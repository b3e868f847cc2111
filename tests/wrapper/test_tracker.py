"""The function or object that a user gives as `tracker`: what it gets, and that nothing it does ends a run."""

import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixture_core.alarms import Alarm
from mixture_torch import MixtureRuntimeConfig, MixtureStats, read_snapshots
from tests.wrapper.samples import assert_says, bits, contents, estimator, mixture

NAN_ROWS = torch.full((5, 4), torch.nan)


class Everything:
    """A tracker that keeps all that it gets."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str]] = []
        self.alarms: list[Alarm] = []
        self.snapshots: list[dict[str, Any]] = []

    def __call__(self, scalars: dict[str, float], step: int) -> None:
        self.rows.append((step, repr(scalars)))

    def alarm(self, alarm: Alarm) -> None:
        self.alarms.append(alarm)

    def snapshot(self, entry: dict[str, Any]) -> None:
        self.snapshots.append(entry)


def run(wrapper: MixtureStats, steps: range = range(4), *, K: int = 3) -> list[tuple[int, str]]:
    """Updates and logs; returns the scalars of each step."""
    scalars = []
    for step in steps:
        stats = wrapper.update(mixture(60, K=K if step < 60 else K - 1, D=6, seed=step)[0])
        wrapper.log_step(step=step, epoch=0)
        scalars.append((step, repr(stats.scalars())))
    return scalars


@pytest.mark.filterwarnings("ignore:.* rows were ignored")
def test_tracker_gets_the_scalars_of_each_row_in_order() -> None:
    tracker = Everything()
    wrapper = MixtureStats.from_config(MixtureRuntimeConfig(K=3, enabled=True), tracker=tracker)
    expected = []
    for step, x in enumerate([mixture()[0], mixture(seed=1)[0], NAN_ROWS, mixture(seed=2)[0]]):
        stats = wrapper.update(x, step=step)
        stats = wrapper.update(x, step=step)
        wrapper.log_step(step=7 * step, epoch=0)
        expected.append((7 * step, repr(stats.scalars())))
    assert tracker.rows == expected


@pytest.mark.parametrize(
    ("options", "stats"), [({"extra": False}, None), ({}, {"pi": torch.tensor([0.25, 0.75]), "B": torch.eye(2)})]
)
def test_tracker_gets_the_four_figures_of_a_row_that_has_no_more(options: dict[str, Any], stats: Any) -> None:
    sent: list[dict[str, float]] = []
    wrapper = estimator(tracker=lambda scalars, step: sent.append(scalars), **options)
    wrapper.update(mixture()[0])
    wrapper.log_step(step=0, epoch=0, stats=stats)
    assert [list(scalars) for scalars in sent] == [["pi_min", "pi_max", "trace_B", "opnorm_B"]]


def test_tracker_gets_the_same_with_and_without_a_folder(tmp_path: Path) -> None:
    trackers, told = (Everything(), Everything()), []
    for log_dir, tracker in zip((tmp_path, None), trackers, strict=True):
        with estimator(log_dir=log_dir, tracker=tracker, on_alarm=told.append, snapshot_every=20) as wrapper:
            rows = run(wrapper, range(64))
        assert tracker.rows == rows
    assert trackers[0].alarms
    assert trackers[0].alarms == trackers[1].alarms
    assert told == trackers[0].alarms + trackers[1].alarms
    written = [repr(bits(entry)) for entry in read_snapshots(tmp_path)]
    assert [[repr(bits(entry)) for entry in tracker.snapshots] for tracker in trackers] == [written, written]


def fail(*_: Any) -> None:
    raise RuntimeError("no\n\x1b[31mnetwork.")


class Nasty:
    """A tracker whose every part raises, is of the wrong kind, or spoils what it gets."""

    alarm = "not a function"

    def __call__(self, scalars: dict[str, float], step: int) -> object:
        scalars.clear()
        return Nasty()

    def __bool__(self) -> bool:
        raise ZeroDivisionError

    def __getattr__(self, name: str) -> Any:
        raise OSError(f"no {name}")

    def __repr__(self) -> str:
        raise ValueError


class Spoiling(Everything):
    """A tracker that writes to what it gets."""

    def snapshot(self, entry: dict[str, Any]) -> None:
        for value in entry.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
        entry.clear()


def trained(folder: Path, tracker: Any) -> tuple[list[str], dict[str, bytes]]:
    """The warnings and the files of a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with estimator(log_dir=folder, on_alarm=lambda _: None, tracker=tracker) as wrapper:
            run(wrapper, range(32))
            wrapper.flush()
            run(wrapper, range(32, 64))
            wrapper.flush()
    return [str(one.message) for one in caught], contents(folder)


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the same run without a tracker."""
    said, files = trained(tmp_path_factory.mktemp("without"), None)
    assert said == []
    return files


@pytest.mark.parametrize(
    ("tracker", "said"),
    [
        (fail, ["The tracker raised RuntimeError at step 0: no ?[31mnetwork. Training goes on."]),
        (Nasty(), ["raised OSError at step 31: no snapshot. ", "raised TypeError at step 61: 'str' object is not"]),
        (Spoiling(), []),
        (lambda scalars, step: time.sleep(1.1 * (step in (3, 5))), ["Training waited 1.1 s for the tracker at step 3"]),
        (lambda: None, ["The tracker raised TypeError at step 0: "]),
    ],
    ids=["raising", "nasty", "spoiling", "slow", "without arguments"],
)
def test_tracker_ends_no_run_changes_no_file_and_warns_once(
    tracker: Any, said: list[str], without: dict[str, bytes], tmp_path: Path
) -> None:
    found, files = trained(tmp_path, tracker)
    assert len(found) == len(said)
    assert all(part in text for part, text in zip(said, found, strict=True))
    assert files == without


def test_tracker_may_wait_for_a_thread_that_logs(tmp_path: Path) -> None:
    ended = []

    def track(scalars: dict[str, float], step: int) -> None:
        thread = threading.Thread(target=run, args=[estimator(log_dir=tmp_path / str(step))], daemon=True)
        thread.start()
        thread.join(timeout=10)
        ended.append(not thread.is_alive())

    run(estimator(log_dir=tmp_path, tracker=track), range(2))
    assert ended == [True, True]


def test_tracker_gets_rows_that_a_resumed_run_repeats_again() -> None:
    tracker = Everything()
    wrapper = estimator(tracker=tracker)
    run(wrapper, range(2))
    state_dict = wrapper.state_dict()
    expected = run(wrapper, range(2, 5))
    resumed = estimator(tracker=tracker)
    resumed.load_state_dict(state_dict)
    assert run(resumed, range(2, 5)) == expected
    assert tracker.rows[2:] == expected + expected


@pytest.mark.parametrize("options", [{"enabled": False}, {"is_main": False}], ids=str)
def test_tracker_is_not_called(options: dict[str, Any]) -> None:
    wrapper = estimator(tracker=fail, **options)
    wrapper.update(mixture()[0])
    wrapper.log_step(step=0, epoch=0)
    wrapper.close()


@pytest.mark.parametrize("value", ["wandb", 5, [print]])
@pytest.mark.parametrize("make", [estimator, lambda **options: MixtureStats(K=2, enabled=False, **options)])
def test_tracker_must_be_a_function(make: Callable[..., MixtureStats], value: Any) -> None:
    with pytest.raises(TypeError) as error:
        make(tracker=value)
    assert_says(error.value, "tracker", "a function of scalars and a step, or None, got ")
