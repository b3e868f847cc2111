"""Whose the run folder is: one process's, all of its estimators', and no child's."""

import gc
import os
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mixture_torch.readers import read_log, read_scores

from tests.wrapper.recording import HEADER, in_child, log, log_later, places, process, recorder, row, run, said, stats
from tests.wrapper.samples import contents

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
needs_kill = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
SCORES: list[dict[str, Any]] = [{}, {"store_scores": True}, {"store_scores": True, "scores_mode": "per_step"}]
scores = pytest.mark.parametrize("options", SCORES, ids=str)
LOG_AND_WAIT = """
one = recorder(Path(sys.argv[1]), store_scores=True)
log(one, 0)
print("open", flush=True)
sys.stdin.read()
one.close()
"""

# Another process


def test_folder_of_another_process_is_refused(tmp_path: Path) -> None:
    with process(LOG_AND_WAIT, tmp_path) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        before = contents(tmp_path)
        with pytest.raises(
            ValueError, match=rf"^`log_dir` must .*, which process {other.pid} on .* has open; end that"
        ):
            log(recorder(tmp_path), 1)
        assert contents(tmp_path) == before
        other.communicate(timeout=60)
    assert places(tmp_path) == [(0, 0)]


def test_folder_is_free_when_the_other_process_has_closed_it(tmp_path: Path) -> None:
    run(LOG_AND_WAIT, tmp_path)
    log(one := recorder(tmp_path), 1)
    one.close()
    assert places(tmp_path) == [(0, 0), (0, 1)]


@needs_kill
def test_folder_is_free_when_the_other_process_was_killed(tmp_path: Path) -> None:
    with process(LOG_AND_WAIT, tmp_path) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        other.send_signal(signal.SIGKILL)
    assert (tmp_path / "mixture.lock").exists()
    log(one := recorder(tmp_path), 1)
    one.close()
    assert places(tmp_path) == [(0, 0), (0, 1)]


@scores
def test_lock_is_there_while_the_folder_is_open(tmp_path: Path, options: dict[str, Any]) -> None:
    log(one := recorder(tmp_path, **options), 0)
    assert (tmp_path / "mixture.lock").exists()
    one.flush()
    assert (tmp_path / "mixture.lock").exists()
    one.close()
    assert not (tmp_path / "mixture.lock").exists()


@pytest.mark.parametrize("name", ["mixture.csv", "mixture_scores.pt"])
def test_refused_folder_is_left_as_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"step,loss\n0,1.5\n")
    one = recorder(tmp_path, store_scores=True)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{name}` must "):
            log(one, 0)
    one.close()
    assert contents(tmp_path) == {name: b"step,loss\n0,1.5\n"}


def test_refused_row_is_not_written_later(tmp_path: Path) -> None:
    (tmp_path / "mixture.csv").write_bytes(b"step,loss\n0,1.5\n")
    one = recorder(tmp_path)
    with pytest.raises(ValueError, match="must begin with"):
        log(one, 0)
    (tmp_path / "mixture.csv").unlink()
    log(one, 1)
    one.close()
    assert places(tmp_path) == [(0, 1)]


def test_foreign_scores_mean_nothing_to_who_stores_none(tmp_path: Path) -> None:
    (tmp_path / "mixture_scores.pt").write_bytes(b"foreign")
    with said() as messages:
        log(one := recorder(tmp_path), 0)
        one.close()
    assert contents(tmp_path) == {"mixture_scores.pt": b"foreign", "mixture.csv": HEADER + row(0)}
    assert messages == []


# The same process


def test_two_recorders_write_to_one_folder_in_turn(tmp_path: Path) -> None:
    one, other = recorder(tmp_path, store_scores=True), recorder(tmp_path, store_scores=True)
    with said() as messages:
        for step in range(0, 6, 2):
            log(one, step)
            log(other, step + 1)
        one.close()
        other.close()
    assert messages == [f"`{tmp_path}` is open in this process already; both write to it."]
    assert places(tmp_path) == [(0, step) for step in range(6)]
    assert [entry["step"] for entry in read_scores(tmp_path)] == list(range(6))


def test_two_recorders_share_a_folder_by_whatever_path(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    log(one := recorder(tmp_path / "run"), 0)
    with pytest.warns(UserWarning, match="is open in this process already"):
        log(other := recorder(tmp_path / "link"), 1)
    one.close()
    other.close()
    assert places(tmp_path / "run") == [(0, 0), (0, 1)]


@pytest.mark.parametrize("leave", ["close", "collect"])
def test_shared_folder_is_closed_by_the_last_user(tmp_path: Path, leave: str) -> None:
    log(one := recorder(tmp_path), 0)
    with pytest.warns(UserWarning, match="is open in this process already"):
        log(other := recorder(tmp_path), 1)
    if leave == "close":
        one.close()
    del one
    gc.collect()
    assert (tmp_path / "mixture.lock").exists()
    log(other, 2)
    if leave == "close":
        other.close()
    del other
    gc.collect()
    assert not (tmp_path / "mixture.lock").exists()


def test_shared_folder_is_complete_when_one_user_flushes(tmp_path: Path) -> None:
    log(one := recorder(tmp_path, store_scores=True), 0)
    with pytest.warns(UserWarning, match="is open in this process already"):
        log(other := recorder(tmp_path, store_scores=True, scores_mode="per_step"), 1)
    other.flush()
    assert (tmp_path / "mixture_scores.pt").exists()
    one.close()
    other.close()


def test_user_who_stores_more_is_refused_alone(tmp_path: Path) -> None:
    (tmp_path / "mixture_scores.pt").write_bytes(b"foreign")
    log(one := recorder(tmp_path), 0)
    with pytest.raises(ValueError, match=r"mixture_scores.pt` must "):
        log(recorder(tmp_path, store_scores=True), 1)
    with said() as messages:
        log(one, 2)
        one.flush()
        one.close()
    assert messages == []
    assert places(tmp_path) == [(0, 0), (0, 2)]


def test_collected_user_needs_no_one_else_to_be_warned(tmp_path: Path) -> None:
    log(recorder(tmp_path), 0)  # a cell that is run twice: the first one is gone by the time the second one writes
    gc.collect()
    with said() as messages:
        log(one := recorder(tmp_path), 1)
        one.close()
    assert messages == []


def test_folder_is_refused_when_a_row_is_logged_and_not_when_it_comes(tmp_path: Path) -> None:
    (tmp_path / "mixture.csv").write_bytes(b"step,loss\n0,1.5\n")
    with pytest.raises(ValueError, match="must begin with"):
        log_later(recorder(tmp_path), 0)


def test_user_collected_in_the_middle_of_anothers_write_takes_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(fd: int, data: bytes) -> int:
        others.clear()
        gc.collect()
        return original(fd, data)

    original, others = os.write, [recorder(tmp_path, store_scores=True)]
    log(one := recorder(tmp_path, store_scores=True), 0)
    log_later(others[0], 2)
    monkeypatch.setattr(os, "write", write)
    with pytest.warns(UserWarning, match="is open in this process already"):
        log(one, 1)
    one.close()
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + row(0) + row(1) + row(2, 2)
    assert [entry["step"] for entry in read_scores(tmp_path)] == [0, 1, 2]


def test_warning_that_is_an_error_comes_when_the_row_is_written(tmp_path: Path) -> None:
    log(first := recorder(tmp_path), 0)
    first.close()
    with (tmp_path / "mixture.csv").open("ab") as file:
        file.write(b"1,0,3,0.2")
    one = recorder(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="ended in 9 bytes of an unfinished write"):
            log(one, 1)
    one.close()
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + row(0) + row(1)


# The order of rows


def test_rows_that_go_back_are_kept_with_one_warning(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    with said() as messages:
        log(one, 0, 1, 2, 1, 0, 0)
        one.close()
    assert [message.split("; ")[0] for message in messages] == [
        f"`{tmp_path}` got step 1 of epoch 0 after step 2 of epoch 0, and keeps both, as it will others"
    ]
    assert [step for _, step in places(tmp_path)] == [0, 1, 2, 1, 0, 0]


def test_rows_behind_those_of_an_earlier_run_are_warned_about(tmp_path: Path) -> None:
    (tmp_path / "mixture.csv").write_bytes(HEADER + row((3, 40)))
    one = recorder(tmp_path)
    with pytest.warns(UserWarning, match="got step 0 of epoch 0 after step 40 of epoch 3"):
        log(one, 0)
    one.close()
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + row((3, 40)) + row(0)


def test_rows_that_go_back_are_warned_about_at_each_opening(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    for _ in range(2):
        with pytest.warns(UserWarning, match="got step 0 of epoch 0 after step 1 of epoch 0"):
            log(one, 0, 1, 0, 1)
        one.close()


def test_step_that_restarts_each_epoch_is_ordinary(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    with said() as messages:
        log(one, *((epoch, step) for epoch in range(3) for step in range(3)))
        one.close()
    assert messages == []


def test_row_behind_a_damaged_one_is_written(tmp_path: Path) -> None:
    (tmp_path / "mixture.csv").write_bytes(HEADER + b"damaged\n")
    log(one := recorder(tmp_path), 0)
    one.close()
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + b"damaged\n" + row(0)


def test_warning_points_at_the_line_that_logged(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    log(one, 1)
    one.record(stats(), None, step=0, epoch=0)
    with pytest.warns(UserWarning, match="got step 0") as caught:
        list(one.arrivals())
    assert caught[0].filename == __file__
    one.close()


# A forked child

FORK = """
def fork(leave):
    child = os.fork()
    if child == 0:
        leave()
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

one = recorder(Path(sys.argv[1]), store_scores=True)
"""


@needs_fork
def test_forked_child_that_exits_changes_nothing(tmp_path: Path) -> None:
    script = """
log(one, 0)
before = {path.name: path.read_bytes() for path in Path(sys.argv[1]).iterdir()}
for leave in (one.close, one.flush, lambda: None, lambda: globals().pop("one") and None):
    fork(leave)
print(before == {path.name: path.read_bytes() for path in Path(sys.argv[1]).iterdir()})
log(one, 1)
one.close()
"""
    assert run(FORK + script, tmp_path) == ("0\n" * 4 + "True\n", "", 0)
    assert places(tmp_path) == [(0, 0), (0, 1)]
    assert [entry["step"] for entry in read_scores(tmp_path)] == [0, 1]


@needs_fork
def test_forked_child_that_logs_is_refused_as_another_process(tmp_path: Path) -> None:
    def child() -> None:
        with pytest.raises(ValueError, match=rf"process {os.getppid()} on .* has open"):
            log(one, 1)

    log(one := recorder(tmp_path), 0)
    assert in_child(child) == 0
    log(one, 2)
    one.close()
    assert places(tmp_path) == [(0, 0), (0, 2)]


@needs_fork
def test_forked_child_may_log_where_its_parent_has_closed(tmp_path: Path) -> None:
    def child() -> None:
        log(one, 1)
        one.close()

    log(one := recorder(tmp_path), 0)
    one.close()
    assert in_child(child) == 0
    log(one, 2)
    one.close()
    assert places(tmp_path) == [(0, 0), (0, 1), (0, 2)]


@needs_fork
def test_forked_child_writes_none_of_its_parents_rows(tmp_path: Path) -> None:
    script = """
import warnings
warnings.simplefilter("ignore")
with broken("write"):
    log(one, 0, 1)
    fork(one.close)
fork(one.flush)
fork(lambda: None)
one.close()
"""
    assert run(FORK + script, tmp_path) == ("0\n0\n0\n", "", 0)
    assert places(tmp_path) == [(0, 0), (0, 1)]
    assert [entry["step"] for entry in read_scores(tmp_path)] == [0, 1]


@needs_fork
def test_forked_child_that_outlives_its_parent_locks_nobody_out(tmp_path: Path) -> None:
    script = """
log(one, 0)
if os.fork() == 0:
    sys.stdin.read()  # until the test is done
    os._exit(0)
print("logged", flush=True)
os.kill(os.getpid(), 9)
"""
    with process(FORK + script, tmp_path) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "logged\n"
        parent.wait(60)
        log(one := recorder(tmp_path), 1)
        one.close()
    assert places(tmp_path) == [(0, 0), (0, 1)]


def test_threads_take_turns(tmp_path: Path) -> None:
    def work(_: int) -> None:
        one = recorder(tmp_path, store_scores=True)
        log(one, *range(30))
        one.close()

    with said(), ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert sorted(read_log(tmp_path)["step"].tolist()) == sorted([*range(30)] * 4)
    assert len(read_scores(tmp_path)) == 120
