"""A disk that fails: training goes on, and what was logged is written when it works again."""

import errno
import gc
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixture_torch.readers import read_scores

from mixture_torch import backlog
from tests.wrapper.conftest import Disk
from tests.wrapper.recording import HEADER, broken, log, places, process, recorder, row, run, said, stats
from tests.wrapper.samples import contents

FAULTS = {
    "full": ("write", errno.ENOSPC, "No space left on device"),
    "read-only": ("open", errno.EROFS, "Read-only file system"),
    "permission": ("open", errno.EACCES, "Permission denied"),
    "input/output": ("write", errno.EIO, "Input/output error"),
    "quota": ("write", errno.EDQUOT, "Disk quota exceeded"),
}
faults = pytest.mark.parametrize(("call", "code", "cause"), FAULTS.values(), ids=FAULTS.keys())
SCORES: list[dict[str, Any]] = [{}, {"store_scores": True}, {"store_scores": True, "scores_mode": "per_step"}]
scores = pytest.mark.parametrize("options", SCORES, ids=str)


def warning(log_dir: Path, cause: str) -> str:
    return (
        f"`{log_dir}` could not be written ({cause}): rows are kept in memory and tried again at every `log_step` and "
        "`flush`."
    )


def missing(log_dir: Path, cause: str, *, rows: int, entries: int) -> str:
    return (
        f"`{log_dir}` could not be written ({cause}): {rows} rows and {entries} entries of responsibilities are kept "
        "in memory, and tried again at `log_step`, `flush` and `close`."
    )


def vanished(log_dir: Path, options: dict[str, Any]) -> list[str]:
    names = ["mixture.csv", "mixture_scores.pt"] if options == SCORES[1] else ["mixture.csv"]
    return [f"`{log_dir / name}` was moved or deleted; a new one is begun." for name in names]


def assert_holds(log_dir: Path, *steps: int, options: dict[str, Any]) -> None:
    """Checks that these rows and no others are there, whole and in order, and so are their responsibilities."""
    assert (log_dir / "mixture.csv").read_bytes() == HEADER + b"".join(map(row, steps))
    if options:
        assert [entry["step"] for entry in read_scores(log_dir)] == list(steps)


# Told once, and made good


@faults
@scores
def test_fault_from_the_start_is_warned_about_once_and_made_good(
    tmp_path: Path, call: str, code: int, cause: str, options: dict[str, Any]
) -> None:
    one = recorder(tmp_path / "run", **options)
    with said() as messages:
        with broken(call, code):
            log(one, 0, 1, 2)
            one.flush()
        log(one, 3)
        one.close()
    assert messages == [warning(tmp_path / "run", cause)]
    assert_holds(tmp_path / "run", 0, 1, 2, 3, options=options)


@scores
@pytest.mark.parametrize("finish", ["log_step", "flush", "close", "collect"])
def test_fault_in_the_middle_is_made_good_by_every_call(tmp_path: Path, finish: str, options: dict[str, Any]) -> None:
    one = recorder(tmp_path, **options)
    log(one, 0)
    with said() as messages, broken("write"):
        log(one, 1, 2)
    assert messages == [warning(tmp_path, "No space left on device")]
    with said() as messages:
        if finish == "log_step":
            log(one, 3)
        elif finish == "collect":
            del one
            gc.collect()
        else:
            getattr(one, finish)()
    assert messages == []
    assert_holds(tmp_path, *range(4 if finish == "log_step" else 3), options=options)


def test_interpreter_exit_makes_a_fault_good(tmp_path: Path) -> None:
    script = """
import warnings
warnings.simplefilter("ignore")
one = recorder(Path(sys.argv[1]), store_scores=True)
with broken("write"):
    log(one, 0, 1)
"""
    assert run(script, tmp_path) == ("", "", 0)
    assert_holds(tmp_path, 0, 1, options=SCORES[1])


def test_later_fault_is_warned_about_again(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    with said() as messages:
        for step in (0, 10):
            with broken("write"):
                log(one, step, step + 1)
            log(one, step + 2)
        one.close()
    assert messages == [warning(tmp_path, "No space left on device")] * 2
    assert_holds(tmp_path, 0, 1, 2, 10, 11, 12, options={})


@scores
@pytest.mark.parametrize("room", [0, 5, len(HEADER), len(HEADER) + 10, 3000, 4500])
def test_disk_that_is_full_at_any_byte_tears_nothing(
    tmp_path: Path, disk_with_room_for: Disk, room: int, options: dict[str, Any]
) -> None:
    one = recorder(tmp_path, **options)
    with said():
        with disk_with_room_for(room):
            log(one, *range(40), N=40)
            one.flush()
        for path in tmp_path.glob("mixture.csv"):
            assert path.read_bytes() in [b"", *(HEADER + b"".join(map(row, range(n))) for n in range(41))]
        log(one, 40, N=40)
        one.close()
    assert_holds(tmp_path, *range(41), options=options)


def test_entry_that_was_written_is_not_written_again_with_its_row(tmp_path: Path) -> None:
    one = recorder(tmp_path, store_scores=True)
    log(one, 0)
    write = os.write

    def rows_fail(fd: int, data: bytes) -> int:
        if bytes(data) in (row(1), row(2)):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    with pytest.MonkeyPatch.context() as patch, said():
        patch.setattr(os, "write", rows_fail)
        log(one, 1, 2)
        one.flush()
    assert [entry["step"] for entry in read_scores(tmp_path)] == [0, 1]
    one.close()
    assert_holds(tmp_path, 0, 1, 2, options=SCORES[1])


@scores
def test_folder_that_is_deleted_is_made_anew(tmp_path: Path, options: dict[str, Any]) -> None:
    one = recorder(tmp_path / "run", **options)
    log(one, 0)
    one.flush()
    shutil.rmtree(tmp_path / "run")
    with said() as messages:
        log(one, 1)
        one.close()
    assert messages == vanished(tmp_path / "run", options)
    assert_holds(tmp_path / "run", 1, options=options)


@scores
def test_folder_that_is_moved_keeps_its_rows_and_is_made_anew(tmp_path: Path, options: dict[str, Any]) -> None:
    one = recorder(tmp_path / "run", **options)
    log(one, 0)
    (tmp_path / "run").rename(tmp_path / "moved")
    with said() as messages:
        log(one, 1)
        one.close()
    assert messages == vanished(tmp_path / "run", options)
    assert_holds(tmp_path / "moved", 0, options=options)
    assert_holds(tmp_path / "run", 1, options=options)


def test_rows_wait_where_another_process_has_the_place_of_a_moved_folder(tmp_path: Path) -> None:
    log(one := recorder(tmp_path / "run"), 0)
    (tmp_path / "run").rename(tmp_path / "moved")
    script = "log(one := recorder(Path(sys.argv[1])), 1); print('open', flush=True); sys.stdin.read(); one.close()"
    with process(script, tmp_path / "run") as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.warns(UserWarning, match=f"which process {other.pid} on .* has open"):
            log(one, 2)
        other.communicate(timeout=60)
    with said():
        one.close()
    assert_holds(tmp_path / "moved", 0, options={})
    assert_holds(tmp_path / "run", 1, 2, options={})


@scores
def test_folder_that_is_replaced_by_a_file_is_a_fault(tmp_path: Path, options: dict[str, Any]) -> None:
    one = recorder(tmp_path / "run", **options)
    log(one, 0)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file")
    with said() as messages:
        log(one, 1, 2)
        one.flush()
        (tmp_path / "run").unlink()
        log(one, 3)
        one.close()
    assert messages == [warning(tmp_path / "run", "File exists"), *vanished(tmp_path / "run", options)]
    assert_holds(tmp_path / "run", 1, 2, 3, options=options)


@pytest.mark.parametrize(("name", "cause"), [("file/run", "Not a directory"), ("x" * 300, "File name too long")])
def test_folder_that_cannot_be_made_is_a_fault(tmp_path: Path, name: str, cause: str) -> None:
    (tmp_path / "file").write_text("")
    one = recorder(tmp_path / name)
    with said() as messages:
        log(one, 0)
        one.close()
        del one
        gc.collect()
    assert messages[:2] == [warning(tmp_path / name, cause), missing(tmp_path / name, cause, rows=1, entries=0)]
    assert [message.endswith("are lost.") for message in messages] == [False, False, True]


def test_log_exchanged_for_a_foreign_one_is_a_fault(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    log(one, 0)
    (tmp_path / "mixture.csv").write_bytes(b"step,loss\n0,1.5\n")
    with said() as messages:
        log(one, 1, 2)
        one.flush()
    assert (tmp_path / "mixture.csv").read_bytes() == b"step,loss\n0,1.5\n"
    assert [message.split(" (`")[0] for message in messages] == [f"`{tmp_path}` could not be written"]
    (tmp_path / "mixture.csv").unlink()
    one.close()
    assert_holds(tmp_path, 1, 2, options={})


def test_rows_of_two_recorders_keep_their_order(tmp_path: Path) -> None:
    one, other = recorder(tmp_path), recorder(tmp_path, store_scores=True)
    with said():
        log(one, 0)
        with broken("write"):
            log(one, 1)
            log(other, 2)
            log(one, 3)
            one.close()
        log(other, 4)
        other.close()
    assert places(tmp_path) == [(0, step) for step in range(5)]


def test_row_refused_after_a_fault_is_kept(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    with said() as messages:
        with broken("open"):
            log(one, 0)
        (tmp_path / "mixture.csv").write_bytes(b"foreign\n")
        log(one, 1)
        (tmp_path / "mixture.csv").unlink()
        one.close()
    assert messages == [warning(tmp_path, "No space left on device")]
    assert_holds(tmp_path, 0, 1, options={})


def test_warnings_that_are_errors_lose_no_row(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log(one, 5)
        with pytest.raises(UserWarning, match="got step 0 of epoch 0 after step 5"):
            log(one, 0)
        with broken("write"), pytest.raises(UserWarning, match="could not be written"):
            log(one, 6)
        log(one, 7)
        one.close()
    assert_holds(tmp_path, 5, 0, 6, 7, options={})


# What close says


def test_close_says_how_much_could_not_be_written(tmp_path: Path) -> None:
    one = recorder(tmp_path, store_scores=True)
    log(one, 0)
    with broken("write"):
        with said():
            log(one, 1, 2)
        with said() as messages:
            one.close()
    assert messages == [missing(tmp_path, "No space left on device", rows=2, entries=2)]
    assert not (tmp_path / "mixture.lock").exists()


@pytest.mark.parametrize("later", ["log_step", "flush", "close"])
def test_rows_that_close_could_not_write_are_written_later(tmp_path: Path, later: str) -> None:
    one = recorder(tmp_path, store_scores=True)
    with said(), broken("write"):
        log(one, 0, 1)
        one.close()
    with said() as messages:
        if later == "log_step":
            log(one, 2)
        else:
            getattr(one, later)()
    assert messages == []
    assert_holds(tmp_path, *range(3 if later == "log_step" else 2), options=SCORES[1])
    assert (tmp_path / "mixture.lock").exists() is (later == "log_step")
    one.close()


def test_files_that_close_could_not_complete_are_completed_later(tmp_path: Path) -> None:
    one = recorder(tmp_path, store_scores=True)
    log(one, 0)
    with said() as messages, broken("fsync", errno.EIO):
        one.close()
    assert messages == [missing(tmp_path, "Input/output error", rows=0, entries=0)]
    one.close()
    assert [entry["step"] for entry in torch.load(tmp_path / "mixture_scores.pt")] == [0]
    assert not (tmp_path / "mixture.lock").exists()


def test_flush_that_fails_is_warned_about_once(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    with said() as messages, broken("fsync", errno.EIO):
        for step in range(3):
            log(one, step)
            one.flush()
    assert messages == [warning(tmp_path, "Input/output error")]
    one.close()


def test_collected_recorder_says_what_is_lost(tmp_path: Path) -> None:
    one = recorder(tmp_path, store_scores=True)
    with said() as messages, broken("write"):
        log(one, 0, 1)
        del one
        gc.collect()
    cause = "could not be written (No space left on device)"
    assert messages[1:] == [f"`{tmp_path}` {cause}: 2 rows and 2 entries of responsibilities are lost."]


def test_interpreter_exit_says_what_is_lost_and_raises_nothing(tmp_path: Path) -> None:
    script = """
import atexit, warnings
one = recorder(Path(sys.argv[1]), strict=True)
log(one, 0)
def fail(*_):
    raise OSError(28, "No space left on device")
os.write = fail
try:
    log(one, 1)
except OSError as error:
    print(error.strerror)
"""
    out, err, status = run(script, tmp_path)
    assert (out, status) == ("No space left on device\n", 0)
    assert "1 rows and 0 entries of responsibilities are lost" in err
    assert "Traceback" not in err


# strict


def test_strict_raises_what_the_disk_says(tmp_path: Path) -> None:
    one = recorder(tmp_path, strict=True)
    log(one, 0)
    with said() as messages, broken("write"):
        for step in (1, 2):
            with pytest.raises(OSError, match="No space left on device"):
                log(one, step)
        for call in (one.flush, one.close):
            with pytest.raises(OSError, match="No space left on device"):
                call()
    assert messages == []


@scores
def test_strict_keeps_the_rows_for_the_next_attempt(tmp_path: Path, options: dict[str, Any]) -> None:
    one = recorder(tmp_path, strict=True, **options)
    with broken("write"):
        for step in range(3):
            with pytest.raises(OSError, match="No space left on device"):
                log(one, step)
    log(one, 3)
    one.close()
    assert_holds(tmp_path, 0, 1, 2, 3, options=options)


def test_strict_close_gives_the_lock_up_all_the_same(tmp_path: Path) -> None:
    one = recorder(tmp_path, strict=True)
    log(one, 0)
    with broken("fsync", errno.EIO), pytest.raises(OSError, match="Input/output error"):
        one.close()
    assert not (tmp_path / "mixture.lock").exists()


# Memory


def test_responsibilities_that_cannot_be_written_are_kept_up_to_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "MOST_KEPT", 3 * 40 * 3 * 4)  # three entries
    one = recorder(tmp_path, store_scores=True)
    with said() as messages, broken("write"):
        log(one, *range(5), N=40)
    with said() as messages:
        one.close()
    assert messages == [f"`{tmp_path}` lacks 2 entries of responsibilities, for which memory had no room."]
    assert places(tmp_path) == [(0, step) for step in range(5)]
    assert [entry["step"] for entry in read_scores(tmp_path)] == [0, 1, 2]


def test_close_counts_what_was_dropped_among_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "MOST_KEPT", 3 * 40 * 3 * 4)
    one = recorder(tmp_path, store_scores=True)
    with said() as messages, broken("write"):
        log(one, *range(5), N=40)
        one.close()
    assert "5 rows and 3 entries of responsibilities are kept in memory" in messages[-1]
    assert messages[-1].endswith("; it lacks 2 entries of responsibilities, for which memory had no room.")


def test_memory_for_responsibilities_is_free_again_when_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "MOST_KEPT", 3 * 40 * 3 * 4)
    one = recorder(tmp_path, store_scores=True)
    with said():
        for start in range(0, 12, 4):
            with broken("write"):
                log(one, *range(start, start + 3), N=40)
            log(one, start + 3, N=40)
        one.close()
    assert [entry["step"] for entry in read_scores(tmp_path)] == list(range(12))


def test_responsibilities_are_kept_as_they_were(tmp_path: Path) -> None:
    one = recorder(tmp_path, store_scores=True)
    given = stats()
    with said(), broken("write"):
        one.record(given, None, step=0, epoch=0)
        list(one.arrivals())
    given["R"].zero_()
    one.close()
    assert read_scores(tmp_path)[0]["responsibilities"].tolist() == stats()["R"].tolist()


# Interrupts


def interrupting(call: str, count: int, *, behind: bool) -> Callable[..., Any]:
    """A call of `os` that is interrupted the n-th time, before or behind what it does."""
    original, calls = getattr(os, call), iter(range(10**6))

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        now = next(calls) == count
        result = None if now and not behind else original(*arguments, **keywords)
        if now:
            raise KeyboardInterrupt
        return result

    return interrupted


@scores
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace", "ftruncate"])
def test_interrupt_at_any_call_loses_nothing_and_doubles_nothing(
    tmp_path: Path, call: str, behind: bool, options: dict[str, Any]
) -> None:
    for count in range(8):
        folder = tmp_path / str(count)
        with said():
            log(one := recorder(folder, **options), 3, 4, 5)
            one.close()
            one = recorder(folder, **options)
            one.resumed()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, call, interrupting(call, count, behind=behind))
                logged = [step for step in range(4, 7) if goes_through(log, one, step) and goes_through(one.flush)]
                goes_through(one.close)
            one.close()
        assert_records(folder, {3, *logged}, among={3, 4, 5, 6}, options=options)
        assert "mixture.lock" not in contents(folder)


def goes_through(action: Callable[..., None], *arguments: Any) -> bool:
    try:
        action(*arguments)
    except KeyboardInterrupt:
        return False
    return True


def assert_records(log_dir: Path, at_least: set[int], *, among: set[int], options: dict[str, Any]) -> None:
    """Checks that these steps are there in order, each once; others may be, whose `log` was interrupted."""
    found = [step for _, step in places(log_dir)]
    assert at_least <= set(found) <= among
    assert found == sorted(set(found))
    if options:
        assert [entry["step"] for entry in read_scores(log_dir)] == found


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
@scores
def test_interrupts_at_any_instant_lose_nothing_and_double_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    armed: list[bool] = []

    def interrupt(*_: object) -> None:
        if armed:
            armed.clear()
            raise KeyboardInterrupt

    def log_armed(step: int) -> None:
        signal.setitimer(signal.ITIMER_REAL, 1e-5 + 1e-6 * (step * 7 % 400))
        armed.append(True)
        log(one, step)
        armed.clear()

    one = recorder(tmp_path, **options)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with said():
            logged = {step for step in range(400) if goes_through(log_armed, step)}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    one.close()
    assert len(logged) < 390
    assert_records(tmp_path, logged, among=set(range(400)), options=options)
