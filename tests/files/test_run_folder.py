"""A run folder: whose it is, the order of its rows, a disk that fails, and what a resumed run sets aside."""

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mixture_torch import read_scores
from mixture_torch.files import run_folder
from tests.files.recording import HEADER, Writer, broken, line, places, process, run, said
from tests.wrapper.samples import contents

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
MODES = [None, "append", "per_step"]
modes = pytest.mark.parametrize("mode", MODES)
NO_SPACE = "could not be written (No space left on device)"
LOG_AND_WAIT = """
one = Writer(Path(sys.argv[1]), "append")
one.log(0)
print("open", flush=True)
sys.stdin.read()
one.close()
"""


def entries(folder: Path) -> list[tuple[int, int, float]]:
    """Epoch, step and value of all entries."""
    return [plain(entry) for entry in read_scores(folder)]


def plain(entry: Any) -> tuple[int, int, float]:
    return entry["epoch"], entry["step"], float(entry["responsibilities"][0, 0]) - 1.0


def assert_holds(folder: Path, *steps: int, mode: str | None) -> None:
    """Checks that these rows and no others are there, in order, and so are their responsibilities."""
    assert (folder / "mixture.csv").read_bytes() == HEADER + b"".join(map(line, steps))
    if mode:
        assert [entry["step"] for entry in read_scores(folder)] == list(steps)


# Another process


@pytest.mark.parametrize("end", ["closed", "killed"])
def test_folder_of_another_process_is_refused_until_that_has_ended(tmp_path: Path, end: str) -> None:
    with process(LOG_AND_WAIT, tmp_path) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=rf"^`log_dir` is in use: process {other.pid} on .* writes to"):
            Writer(tmp_path).log(1)
        assert contents(tmp_path) == before
        other.kill() if end == "killed" else other.communicate(timeout=60)
    one = Writer(tmp_path)
    one.log(1)
    one.close()
    assert places(tmp_path) == [(0, 0), (0, 1)]


@needs_fork
def test_forked_child_leaves_the_folder_and_the_rows_of_its_parent(tmp_path: Path) -> None:
    script = """
import warnings
warnings.simplefilter("ignore")
def fork(leave):
    child = os.fork()
    if child == 0:
        leave()
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
one = Writer(Path(sys.argv[1]), "append")
one.log(0)
before = {path.name: path.read_bytes() for path in Path(sys.argv[1]).iterdir()}
def is_refused():
    try:
        one.log(5)
    except ValueError as error:
        assert f"process {os.getppid()} on" in str(error)
for leave in (one.close, one.flush, lambda: None, is_refused):
    fork(leave)
print(before == {path.name: path.read_bytes() for path in Path(sys.argv[1]).iterdir()})
with broken("write"):
    one.log(1)
    fork(one.close)
fork(one.flush)
one.close()
"""
    assert run(script, tmp_path) == ("0\n0\n0\n0\nTrue\n0\n0\n", "", 0)
    assert_holds(tmp_path, 0, 1, mode="append")


# Files that are not ours


@pytest.mark.parametrize("name", ["mixture.csv", "mixture_scores.pt"])
def test_refused_folder_is_left_as_it_is_and_the_row_is_not_written_later(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"step,loss\n0,1.5\n")
    one = Writer(tmp_path, "append")
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{name}` (begins with|is not)"):
            one.log(0)
    one.close()
    assert contents(tmp_path) == {name: b"step,loss\n0,1.5\n"}
    (tmp_path / name).unlink()
    one.log(1)
    one.close()
    assert places(tmp_path) == [(0, 1)]


def test_foreign_scores_mean_nothing_to_a_run_that_stores_none(tmp_path: Path) -> None:
    (tmp_path / "mixture_scores.pt").write_bytes(b"foreign")
    (one := Writer(tmp_path)).log(0)
    with pytest.raises(ValueError, match=r"mixture_scores.pt` is not"):
        Writer(tmp_path, "append").log(1)
    with said() as messages:
        one.log(2)
        one.close()
    assert messages == []
    assert contents(tmp_path) == {"mixture_scores.pt": b"foreign", "mixture.csv": HEADER + line(0) + line(2)}


# Several users in one process


@pytest.mark.parametrize("path", ["run", "link"])
def test_two_users_share_a_folder_by_whatever_path_until_the_last_one_leaves(tmp_path: Path, path: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    one, other = Writer(tmp_path / "run", "append"), Writer(tmp_path / path, "append")
    lock = tmp_path / "run" / "mixture.lock"
    with said() as messages:
        for step in range(0, 6, 2):
            one.log(step)
            other.log(step + 1)
        one.close()
        assert lock.read_bytes()
        other.log(6)
        other.close()
    assert not lock.read_bytes()
    assert [message.split("` ")[1] for message in messages] == [
        "is open in this process already; both estimators write to it."
    ]
    assert_holds(tmp_path / "run", *range(7), mode="append")


# The order of rows


def test_rows_that_go_back_are_kept_with_one_warning_each_time(tmp_path: Path) -> None:
    (tmp_path / "mixture.csv").write_bytes(HEADER + line((3, 40)))
    one = Writer(tmp_path)
    for last in ("epoch 3, step 40", "epoch 0, step 2"):
        with pytest.warns(UserWarning, match=f"has rows up to {last}; step 1 of epoch 0 is appended") as caught:
            one.log(1, 0, 2, 1, 2)
        assert [warning.filename for warning in caught] == [one.log.__code__.co_filename]
        one.close()
    assert len(places(tmp_path)) == 11


def test_row_of_the_step_before_is_kept_with_a_warning(tmp_path: Path) -> None:
    one = Writer(tmp_path)
    with pytest.warns(UserWarning, match="has rows up to epoch 0, step 1; step 1 of epoch 0 is appended"):
        one.log(1, 1)
    one.close()
    assert places(tmp_path) == [(0, 1)] * 2


# A disk that fails


@modes
@pytest.mark.parametrize(
    ("call", "code", "cause"),
    [
        ("write", errno.ENOSPC, "No space left on device"),
        ("open", errno.EROFS, "Read-only file system"),
        ("write", errno.EDQUOT, "Disk quota exceeded"),
    ],
)
def test_fault_is_warned_about_once_and_made_good(
    tmp_path: Path, call: str, code: int, cause: str, mode: str | None
) -> None:
    one = Writer(tmp_path / "run", mode)
    with said() as messages:
        for start in (0, 4):
            with broken(call, code):
                one.log(start, start + 1, start + 2)
                one.flush()
            one.log(start + 3)
            one.close()
    kept = "rows are kept in memory and tried again at every `log_step` and `flush`."
    assert messages == [f"`{tmp_path / 'run'}` could not be written ({cause}): {kept}"] * 2
    assert_holds(tmp_path / "run", *range(8), mode=mode)


@pytest.mark.parametrize("later", ["log", "flush", "close"])
def test_close_says_what_is_missing_and_later_calls_write_it(tmp_path: Path, later: str) -> None:
    one = Writer(tmp_path, "append")
    with said() as messages, broken("write"):
        one.log(0, 1)
        one.close()
    assert messages[1:] == [
        f"`{tmp_path}` {NO_SPACE}: 2 rows and 2 entries of responsibilities are kept in memory, and tried again at "
        "`log_step`, `flush` and `close`."
    ]
    with said() as messages:
        one.log(2) if later == "log" else getattr(one, later)()
    assert messages == []
    assert_holds(tmp_path, *range(3 if later == "log" else 2), mode="append")
    assert bool((tmp_path / "mixture.lock").read_bytes()) is (later == "log")
    one.close()


@modes
def test_strict_raises_what_the_disk_says_and_keeps_the_rows(tmp_path: Path, mode: str | None) -> None:
    one = Writer(tmp_path, mode, strict=True)
    with said() as messages, broken("write"):
        for use in (lambda: one.log(0), lambda: one.log(1), one.flush, one.close):
            with pytest.raises(OSError, match="No space left on device"):
                use()
    one.log(2)
    one.close()
    assert messages == []
    assert_holds(tmp_path, 0, 1, 2, mode=mode)


def test_warnings_that_are_errors_lose_no_row(tmp_path: Path) -> None:
    one = Writer(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.log(5)
        with pytest.raises(UserWarning, match="has rows up to epoch 0, step 5; step 0"):
            one.log(0)
        with broken("write"), pytest.raises(UserWarning, match="could not be written"):
            one.log(6)
        one.log(7)
        one.close()
    assert_holds(tmp_path, 5, 0, 6, 7, mode=None)


def test_responsibilities_wait_up_to_a_bound_which_is_free_again_when_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "MOST_KEPT", 3 * 40 * 3 * 4)  # three entries
    one = Writer(tmp_path, "append")
    for start in (0, 10):
        with said(), broken("write"):
            one.log(*range(start, start + 5), N=40)
        with said() as messages:
            one.close()
        assert messages == [f"`{tmp_path}` lacks 2 entries of responsibilities, because more than 1 GiB was waiting."]
    assert [step for _, step in places(tmp_path)] == [*range(5), *range(10, 15)]
    assert [entry["step"] for entry in read_scores(tmp_path)] == [0, 1, 2, 10, 11, 12]


# Superseding


@pytest.mark.parametrize("stored", MODES[1:])
@modes
def test_resumed_run_sets_scores_of_either_mode_aside(tmp_path: Path, stored: str, mode: str | None) -> None:
    (one := Writer(tmp_path, stored)).log(0, 1, 2, value=1.0)
    one.close()
    names = ["mixture.superseded-1.csv", f"mixture_scores.superseded-1{'.pt' if stored == 'append' else ''}"]
    with said() as messages:
        (one := Writer(tmp_path, mode, resumes=True)).log(1, 2)
        one.close()
    assert messages == [
        f"`{tmp_path}` is resumed at step 1 of epoch 0: 2 later rows and 2 entries of responsibilities were moved to "
        f"`{names[0]}` and `{names[1]}`."
    ]
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + line(0, 1) + line(1) + line(2)
    assert (tmp_path / "mixture.superseded-1.csv").read_bytes() == HEADER + line(1, 1) + line(2, 1)
    assert sorted(entries(tmp_path)) == [(0, 0, 1), *([(0, 1, 0), (0, 2, 0)] if mode else [])]
    aside = tmp_path / names[1]
    moved = torch.load(aside) if aside.is_file() else [torch.load(path) for path in sorted(aside.iterdir())]
    assert [plain(entry) for entry in moved] == [(0, 1, 1), (0, 2, 1)]


@pytest.mark.parametrize("folder", ["new", "with earlier rows"])
def test_resumed_run_that_records_nothing_again_is_silent(tmp_path: Path, folder: str) -> None:
    if folder != "new":
        (one := Writer(tmp_path)).log(0, 1)
        one.close()
    with said() as messages:
        (one := Writer(tmp_path, "append", resumes=True)).log(2)
        one.close()
    assert set(contents(tmp_path)) == {"mixture.csv", "mixture_scores.pt"}
    assert messages == []
