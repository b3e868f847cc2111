"""What a run records again after a checkpoint: as if it had never been interrupted, and nothing is lost."""

import itertools
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mixture_torch.readers import read_log, read_scores
from mixture_torch.recorder import Recorder

from tests.wrapper.recording import (
    HEADER,
    broken,
    in_child,
    log,
    log_later,
    places,
    process,
    recorder,
    row,
    said,
    settle,
    stats,
)
from tests.wrapper.samples import contents

SCORES: list[dict[str, Any]] = [{}, {"store_scores": True}, {"store_scores": True, "scores_mode": "per_step"}]
scores = pytest.mark.parametrize("options", SCORES, ids=str)


def resumed(log_dir: Path, **options: Any) -> Recorder:
    """A recorder that goes on from a checkpoint."""
    one = recorder(log_dir, **options)
    one.resumed()
    return one


def old(log_dir: Path, *steps: int | tuple[int, int], **options: Any) -> None:
    """Leaves the records of an earlier run, which have the value 1."""
    one = recorder(log_dir, **options)
    log(one, *steps, value=1.0)
    one.close()


def entries(log_dir: Path) -> list[tuple[int, int, float]]:
    """Epoch, step and value of all entries."""
    return [_plain(entry) for entry in read_scores(log_dir)]


def _plain(entry: Any) -> tuple[int, int, float]:
    return entry["epoch"], entry["step"], float(entry["responsibilities"][0, 0]) - 1.0


# Rows


def test_resumed_run_moves_the_rows_that_it_records_again(tmp_path: Path) -> None:
    old(tmp_path, 0, 1, 2, 3)
    with said() as messages:
        log(one := resumed(tmp_path), 2, 3)
        one.close()
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + row(0, 1) + row(1, 1) + row(2) + row(3)
    assert (tmp_path / "mixture.superseded-1.csv").read_bytes() == HEADER + row(2, 1) + row(3, 1)
    assert messages == [
        f"`{tmp_path}` goes on from step 2 of epoch 0: 2 rows and 0 entries of responsibilities from there on were "
        "moved to `mixture.superseded-1.csv`."
    ]


def test_resumed_run_moves_rows_wherever_they_stand(tmp_path: Path) -> None:
    rows = [(0, 0), (1, 5), (0, 1), (2, 0), (0, 9), (1, 1)]  # of several runs
    (tmp_path / "mixture.csv").write_bytes(HEADER + b"".join(map(row, rows)))
    with said() as messages:
        log(one := resumed(tmp_path), (1, 1))
        one.close()
    assert places(tmp_path) == [(0, 0), (0, 1), (0, 9), (1, 1)]
    assert (tmp_path / "mixture.superseded-1.csv").read_bytes() == HEADER + row((1, 5)) + row((2, 0)) + row((1, 1))
    assert len(messages) == 1


def test_resumed_run_keeps_other_rows_byte_for_byte(tmp_path: Path) -> None:
    kept = b"0,0,8,0.50,0.5,2.0,1\r\ndamaged\n 1,0,8,1e-3,nan,2,1\n"
    (tmp_path / "mixture.csv").write_bytes(HEADER + row(7) + kept)
    with said():
        log(one := resumed(tmp_path), 2)
        one.close()
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + kept + row(2)


def test_resumed_run_that_records_nothing_again_is_silent(tmp_path: Path) -> None:
    old(tmp_path, 0, 1)
    with said() as messages:
        log(one := resumed(tmp_path), 2)
        one.close()
    assert set(contents(tmp_path)) == {"mixture.csv"}
    assert messages == []


def test_resumed_run_in_a_new_folder_is_silent(tmp_path: Path) -> None:
    with said() as messages:
        log(one := resumed(tmp_path / "run", store_scores=True), 5)
        one.close()
    assert set(contents(tmp_path / "run")) == {"mixture.csv", "mixture_scores.pt"}
    assert messages == []


def test_resumed_run_keeps_the_file_whose_end_it_cuts(tmp_path: Path) -> None:
    old(tmp_path, 0, 1, 2)
    before = (tmp_path / "mixture.csv").stat().st_ino
    with said():
        log(one := resumed(tmp_path), 1)
        one.close()
    assert (tmp_path / "mixture.csv").stat().st_ino == before


@pytest.mark.parametrize("kind", ["symlink", "hard link"])
def test_resumed_run_goes_on_in_a_file_with_two_names(tmp_path: Path, kind: str) -> None:
    (tmp_path / "real").mkdir()
    for name in ("mixture.csv", "mixture_scores.pt"):
        (tmp_path / "real" / name).touch()
        (tmp_path / name).symlink_to(tmp_path / "real" / name)
    with said():
        one = recorder(tmp_path, store_scores=True)
        log(one, 0, 1, 5, 2, value=1.0)
        if kind == "hard link":
            for name in ("mixture.csv", "mixture_scores.pt"):
                (tmp_path / name).unlink()
                (tmp_path / name).hardlink_to(tmp_path / "real" / name)
        one.resumed()  # in the middle, so that the files are written anew
        log(one, 3, 4, 5)
        one.close()
    assert places(tmp_path) == [(0, step) for step in (0, 1, 2, 3, 4, 5)]
    assert [entry["step"] for entry in torch.load(tmp_path / "mixture_scores.pt")] == [0, 1, 2, 3, 4, 5]
    assert (tmp_path / "mixture.csv").is_symlink() == (kind == "symlink")


def test_resumed_run_drops_a_torn_row_first(tmp_path: Path) -> None:
    (tmp_path / "mixture.csv").write_bytes(HEADER + row(0) + row(1) + row(2)[:7])
    with said() as messages:
        log(one := resumed(tmp_path), 1)
        one.close()
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + row(0) + row(1)
    assert [message.split(": ")[0].split("` ")[1][:7] for message in messages] == ["ended i", "goes on"]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_log_of_a_killed_and_resumed_run_is_that_of_an_uninterrupted_one(tmp_path: Path) -> None:
    script = """
one = recorder(Path(sys.argv[1]), store_scores=True)
for step in range(8):
    log(one, (step // 3, step), value=float(step))
    if step == 5:
        one.flush()
os.kill(os.getpid(), 9)
"""
    with process(script, tmp_path / "killed") as killed:
        killed.wait(60)
    for one, start in ((resumed(tmp_path / "killed", store_scores=True), 4), (recorder(tmp_path / "whole"), 0)):
        with said():
            for step in range(start, 12):
                log(one, (step // 3, step), value=float(step))
            one.close()
    found, expected = (tmp_path / name / "mixture.csv" for name in ("killed", "whole"))
    assert found.read_bytes() == expected.read_bytes()
    assert entries(tmp_path / "killed") == [(step // 3, step, float(step)) for step in range(12)]


def test_run_resumed_over_and_over_keeps_every_record(tmp_path: Path) -> None:
    for value in range(4):
        with said():
            log(one := resumed(tmp_path, store_scores=True), 0, 1, value=float(value))
            one.close()
    for number in (1, 2, 3):
        moved = (tmp_path / f"mixture.superseded-{number}.csv").read_bytes()
        assert moved == HEADER + row(0, number - 1) + row(1, number - 1)
        listed = torch.load(tmp_path / f"mixture_scores.superseded-{number}.pt")
        assert [_plain(entry) for entry in listed] == [(0, 0, number - 1), (0, 1, number - 1)]


@pytest.mark.parametrize(
    "taken", ["mixture.superseded-1.csv", "mixture_scores.superseded-1.pt", "mixture_scores.superseded-1"]
)
def test_superseded_files_take_a_number_that_none_has(tmp_path: Path, taken: str) -> None:
    old(tmp_path, 0)
    (tmp_path / taken).mkdir()
    with said():
        log(one := resumed(tmp_path), 0)
        one.close()
    assert (tmp_path / "mixture.superseded-2.csv").read_bytes() == HEADER + row(0, 1)


def test_only_the_first_row_after_a_checkpoint_supersedes(tmp_path: Path) -> None:
    one = resumed(tmp_path)
    log(one, 0, 1)
    with pytest.warns(UserWarning, match="got step 0 of epoch 0 after step 1"):
        log(one, 0)
    one.close()
    assert [step for _, step in places(tmp_path)] == [0, 1, 0]


@scores
def test_rollback_in_the_same_process_supersedes(tmp_path: Path, options: dict[str, Any]) -> None:
    one = recorder(tmp_path, **options)
    log(one, 0, 1, 2, value=1.0)
    one.flush()
    log(one, 3, value=1.0)
    one.resumed()
    with said() as messages:
        log(one, 2, 3)
        one.close()
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + row(0, 1) + row(1, 1) + row(2) + row(3)
    assert (tmp_path / "mixture.superseded-1.csv").read_bytes() == HEADER + row(2, 1) + row(3, 1)
    assert len(messages) == 1
    if options:
        assert entries(tmp_path) == [(0, 0, 1), (0, 1, 1), (0, 2, 0), (0, 3, 0)]


def test_rows_logged_before_a_checkpoint_is_loaded_are_written_before(tmp_path: Path) -> None:
    one = recorder(tmp_path)
    for step in (5, 6, 2):
        if step == 2:
            one.resumed()
        log_later(one, step)
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER
    with said():
        settle(one)
        assert (tmp_path / "mixture.csv").read_bytes() == HEADER + row(5, 5) + row(6, 6)
        list(one.arrivals())
        one.close()
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + row(2, 2)
    assert (tmp_path / "mixture.superseded-1.csv").read_bytes() == HEADER + row(5, 5) + row(6, 6)


# Scores


@pytest.mark.parametrize("stored", SCORES[1:], ids=str)
@scores
def test_scores_of_either_mode_are_superseded_whatever_is_stored_now(
    tmp_path: Path, stored: dict[str, Any], options: dict[str, Any]
) -> None:
    old(tmp_path, 0, 1, 2, **stored)
    with pytest.warns(UserWarning, match="2 rows and 2 entries of responsibilities from there on were moved to"):
        log(one := resumed(tmp_path, **options), 1)
    one.close()
    assert sorted(entries(tmp_path)) == [(0, 0, 1)] + [(0, 1, 0)] * bool(options)
    if stored == SCORES[1]:
        moved = torch.load(tmp_path / "mixture_scores.superseded-1.pt")
    else:
        paths = sorted((tmp_path / "mixture_scores.superseded-1").iterdir())
        assert [path.name for path in paths] == ["step_000001.pt", "step_000002.pt"]
        moved = [torch.load(path) for path in paths]
    assert [_plain(entry) for entry in moved] == [(0, 1, 1), (0, 2, 1)]


def test_superseded_scores_are_named_in_the_warning(tmp_path: Path) -> None:
    old(tmp_path, 0, **SCORES[1])
    old(tmp_path, 1, **SCORES[2])
    with said() as messages:
        log(one := resumed(tmp_path), 0)
        one.close()
    files = ["mixture.superseded-1.csv", "mixture_scores.superseded-1.pt", "mixture_scores.superseded-1"]
    assert [message.split(" moved to ")[1] for message in messages] == [" and ".join(f"`{f}`" for f in files) + "."]


def test_shards_of_earlier_epochs_stay_where_steps_restart(tmp_path: Path) -> None:
    old(tmp_path, (0, 0), (0, 1), (0, 7), (1, 2), (1, 3), (2, 4), **SCORES[2])
    with said():
        log(one := resumed(tmp_path, **SCORES[2]), (1, 3))
        one.close()
    assert entries(tmp_path) == [(0, 0, 1), (0, 1, 1), (1, 2, 1), (1, 3, 0), (0, 7, 1)]
    moved = [_plain(torch.load(path)) for path in sorted((tmp_path / "mixture_scores.superseded-1").iterdir())]
    assert moved == [(1, 3, 1), (2, 4, 1)]


def test_shards_of_later_epochs_are_found_by_the_log(tmp_path: Path) -> None:
    old(tmp_path, (0, 8), (1, 2), (1, 9), **SCORES[2])
    with said():
        log(one := resumed(tmp_path, **SCORES[2]), (0, 9))
        one.close()
    assert entries(tmp_path) == [(0, 8, 1), (0, 9, 0)]


def test_shards_before_the_step_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old(tmp_path, *range(50), **SCORES[2])
    read: list[str] = []

    def load(path: Path, **options: Any) -> Any:
        read.append(path.name)
        return original(path, **options)

    original = torch.load
    monkeypatch.setattr(torch, "load", load)
    with said():
        log(one := resumed(tmp_path, **SCORES[2]), 48)
        one.close()
    assert read == ["step_000048.pt", "step_000049.pt"]


def test_damaged_shard_goes_with_those_beside_it(tmp_path: Path) -> None:
    old(tmp_path, 0, 1, 2, **SCORES[2])
    (tmp_path / "mixture_scores" / "step_000002.pt").write_bytes(b"")
    with said():
        log(one := resumed(tmp_path, **SCORES[2]), 1)
        one.close()
    assert entries(tmp_path) == [(0, 0, 1), (0, 1, 0)]
    assert (tmp_path / "mixture_scores.superseded-1" / "step_000002.pt").read_bytes() == b""


def test_foreign_scores_that_are_not_in_use_are_left_with_a_warning(tmp_path: Path) -> None:
    old(tmp_path, 0)
    (tmp_path / "mixture_scores.pt").write_bytes(b"foreign")
    with said() as messages:
        log(one := resumed(tmp_path), 0)
        one.flush()
        one.close()
    assert (tmp_path / "mixture_scores.pt").read_bytes() == b"foreign"
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + row(0)
    assert [message.endswith("It was left as it is.") for message in messages] == [True, False]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_fault_in_scores_that_are_not_in_use_leaves_no_file_open(tmp_path: Path) -> None:
    old(tmp_path, 0, 1, **SCORES[1])
    one = resumed(tmp_path)
    with said(), broken("replace"):
        log(one, 1)
        before = len(os.listdir("/proc/self/fd"))
        log(one, 2, 3)
        after = len(os.listdir("/proc/self/fd"))
    with said():
        one.close()
    assert after == before
    assert places(tmp_path) == [(0, 0), (0, 1), (0, 2), (0, 3)]


# Crashes and faults in between


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@scores
@pytest.mark.parametrize("call", ["replace", "ftruncate", "fsync", "write"])
def test_crash_at_any_call_leaves_every_record_somewhere(tmp_path: Path, call: str, options: dict[str, Any]) -> None:
    rows = [0, 5, 1, 6, 2]  # of two runs, so that the log is replaced; `ftruncate` needs a tail
    if call == "ftruncate":
        rows.sort()
    made = tmp_path / "made"
    with said():
        old(made, *rows, **options)
    count = 0
    while _crashes(made, tmp_path / str(count), call, count, options):
        count += 1
    assert count >= 1


def _crashes(made: Path, run: Path, call: str, count: int, options: dict[str, Any]) -> bool:
    """Resumes at step 2 and crashes at a call; says whether there was that call. Checks what is left, and the next."""
    original, calls = getattr(os, call), itertools.count()

    def crash(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == count:
            if call == "write":
                original(arguments[0], arguments[1][:3])
            os._exit(9)
        return original(*arguments, **keywords)

    def resume() -> None:
        setattr(os, call, crash)  # in a child, which does not come back
        log(resumed(run, **options), 2)

    shutil.copytree(made, run)
    crashed = in_child(resume) == 9
    lines = {line for path in run.glob("mixture*.csv") for line in path.read_bytes().splitlines(keepends=True)}
    assert {row(step, 1) for step in (0, 1, 2, 5, 6)} <= lines
    with said():
        log(one := resumed(run, **options), 2)
        one.close()
    assert (run / "mixture.csv").read_bytes() == HEADER + row(0, 1) + row(1, 1) + row(2)
    if options:
        assert entries(run) == [(0, 0, 1), (0, 1, 1), (0, 2, 0)]
    return crashed


@scores
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_fault_while_superseding_is_made_good_by_the_next_call(
    tmp_path: Path, call: str, options: dict[str, Any]
) -> None:
    with said():
        old(tmp_path, 0, 5, 1, 6, 2, **options)
        one = resumed(tmp_path, **options)
        with broken(call):
            log(one, 2, 3)
        log(one, 4)
        one.close()
    assert places(tmp_path) == [(0, step) for step in (0, 1, 2, 3, 4)]
    assert (tmp_path / "mixture.superseded-1.csv").read_bytes() == HEADER + row(5, 1) + row(6, 1) + row(2, 1)
    assert not (tmp_path / "mixture.superseded-2.csv").exists()
    if options:
        assert entries(tmp_path) == [(0, 0, 1), (0, 1, 1), (0, 2, 0), (0, 3, 0), (0, 4, 0)]


def test_refused_run_has_still_to_supersede(tmp_path: Path) -> None:
    old(tmp_path, 0, 1)
    moved = tmp_path / "moved"
    os.replace(tmp_path / "mixture.csv", moved)
    (tmp_path / "mixture.csv").write_bytes(b"foreign\n")
    one = resumed(tmp_path)
    with pytest.raises(ValueError, match="must begin with"):
        log(one, 0)
    os.replace(moved, tmp_path / "mixture.csv")
    with said():
        log(one, 0)
        one.close()
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + row(0)


@pytest.mark.parametrize("R", [torch.ones(2, 3, 4), torch.ones(3), torch.eye(3).to_sparse(), [[1.0]]], ids=str)
def test_responsibilities_that_are_no_matrix_are_refused_at_once(R: Any, tmp_path: Path) -> None:
    one = recorder(tmp_path / "run", store_scores=True)
    with pytest.raises(ValueError, match=r"^`stats` must hold R as a dense tensor \(N, K\), got "):
        one.record({**stats(), "R": R}, None, step=0, epoch=0)
    assert not (tmp_path / "run").exists()
    log(one, 1)
    one.close()
    assert read_log(tmp_path / "run")["step"].tolist() == [1]
