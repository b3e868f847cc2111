"""The log: what is written, what is read, and what becomes of damaged and torn rows."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixture_torch import read_log
from mixture_torch.files.log import NOWHERE, RowsFile, position_of
from tests.files.recording import HEADER
from tests.wrapper.samples import contents

COLUMNS = HEADER.decode().strip().split(",")
FIGURES = (0.1, 0.5, 2.0, 1.0)
ROW = b"0,0,8,0.1,0.5,2,1\n"
NEXT = b"1" + ROW[1:]


def opened(folder: Path, say: Callable[[str], None] = print) -> RowsFile:
    return RowsFile(folder / "mixture.csv", HEADER[:-1], say=say)


def log(folder: Path, *steps: int) -> list[str]:
    """Appends rows and returns what was said."""
    messages: list[str] = []
    file = opened(folder, messages.append)
    for step in steps:
        file.open()
        file.append_row(step, 0, 8, *FIGURES)
    file.close()
    return messages


# Writing


def test_row_is_in_the_file_at_once_with_nine_digits(tmp_path: Path) -> None:
    file = opened(tmp_path / "run")
    file.sync()
    assert not (tmp_path / "run").exists()
    file.open()
    file.append_row(12, 3, 8, 1 / 3, 1e-30 / 3, 2e20 / 3, float("nan"))
    rows = (tmp_path / "run" / "mixture.csv").read_bytes()
    assert rows == HEADER + b"12,3,8,0.333333333,3.33333333e-31,6.66666667e+19,nan\n"
    file.close()


@pytest.mark.parametrize("before", [None, b"", HEADER, HEADER[:-1], HEADER + ROW])
def test_log_goes_on_in_a_file_of_ours(tmp_path: Path, before: bytes | None) -> None:
    if before is not None:
        (tmp_path / "mixture.csv").write_bytes(before)
    log(tmp_path, 1)
    assert (tmp_path / "mixture.csv").read_bytes() == (HEADER + ROW if before == HEADER + ROW else HEADER) + NEXT


@pytest.mark.parametrize("foreign", [b"step,loss\n1,2\n", b"x", HEADER[:-1] + b",median_xBx\n", b"\x80\xff\n"])
def test_foreign_log_is_left_alone(tmp_path: Path, foreign: bytes) -> None:
    (tmp_path / "mixture.csv").write_bytes(foreign)
    for use in (lambda: log(tmp_path, 0), lambda: read_log(tmp_path)):
        with pytest.raises(ValueError, match=r"begins with `.*` instead of `step,epoch,K,.*`; move the file away"):
            use()
    assert contents(tmp_path) == {"mixture.csv": foreign}


def test_log_with_other_line_ends_keeps_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mixture.csv"
    path.write_bytes((HEADER + ROW).replace(b"\n", b"\r\n"))
    assert read_log(tmp_path)["opnorm_B"].tolist() == [1.0]
    assert log(tmp_path, 1, 2) == []
    assert path.read_bytes() == (HEADER + ROW + NEXT + b"2" + ROW[1:]).replace(b"\n", b"\r\n")
    file = opened(tmp_path)
    assert file.supersede((0, 1), 1) == 2
    file.close()
    assert path.read_bytes() == (HEADER + ROW).replace(b"\n", b"\r\n")
    assert (tmp_path / "mixture.superseded-1.csv").read_bytes().count(b"\r\n") == 3
    path.unlink()
    file.open()
    file.append_row(0, 0, 8, *FIGURES)
    file.close()
    assert path.read_bytes() == HEADER + ROW


# Torn rows


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", range(1, len(HEADER + ROW)))
def test_torn_file_goes_on_behind_its_last_whole_row_and_loses_no_byte(tmp_path: Path, size: int, end: bytes) -> None:
    header, row = HEADER[:-1] + end, ROW[:-1]  # whole, if an editor removed its line end
    left, path, aside = (header + row)[:size], tmp_path / "mixture.csv", tmp_path / "mixture.superseded-1.csv"
    path.write_bytes(left)
    assert read_log(tmp_path)["step"].tolist() == []
    messages = log(tmp_path, 0, 1)
    torn, end = left[len(header) :], end if size >= len(header) else b"\n"
    assert path.read_bytes() == (HEADER + ROW + NEXT).replace(b"\n", end)
    assert (aside.read_bytes() if aside.exists() else b"") == (header + torn if torn else b"")
    if torn:
        assert messages == [
            f"The last row of `{path}` has no line end and may be cut short; it was moved to `{aside.name}`."
        ]
    assert len(messages) == (size != len(header))


def test_torn_row_takes_a_number_that_no_file_has_and_is_moved_once(tmp_path: Path) -> None:
    (tmp_path / "mixture.csv").write_bytes(HEADER + ROW + b"1,0,8,0.1")
    (tmp_path / "mixture.superseded-1.csv").write_bytes(b"earlier")
    opened(tmp_path).open()
    opened(tmp_path).open()
    assert (tmp_path / "mixture.superseded-2.csv").read_bytes() == HEADER + b"1,0,8,0.1"
    assert not (tmp_path / "mixture.superseded-3.csv").exists()


# Superseding

POSITIONS = [(0, 0), (1, 5), (0, 1), (2, 0), (0, 9), (1, 1)]  # of several runs


@pytest.mark.parametrize("position", [(0, 0), (0, 9), (1, 1), (1, 2), (3, 0)])
def test_supersede_moves_rows_at_or_behind_a_position_wherever_they_stand(
    tmp_path: Path, position: tuple[int, int]
) -> None:
    file = opened(tmp_path)
    file.open()
    for epoch, step in POSITIONS:
        file.append_row(step, epoch, 8, *FIGURES)
    moved = [at for at in POSITIONS if at >= position]
    kept = [at for at in POSITIONS if at < position]
    assert file.supersede(position, 3) == len(moved)
    file.open()
    assert position_of(file.last) == (kept[-1] if kept else NOWHERE)
    file.append_row(7, 7, 8, *FIGURES)
    file.close()
    log = read_log(tmp_path)
    assert list(zip(log["epoch"], log["step"], strict=True)) == [*kept, (7, 7)]
    aside = tmp_path / "mixture.superseded-3.csv"
    assert aside.exists() == bool(moved)
    if moved:
        assert aside.read_bytes().count(b"\n") == len(moved) + 1


def test_supersede_keeps_other_rows_byte_for_byte(tmp_path: Path) -> None:
    kept = b"0,0,8,0.50,0.5,2.0,1\r\ndamaged\n 1,0,8,1e-3,nan,2,1\n"
    (tmp_path / "mixture.csv").write_bytes(HEADER + b"7" + ROW[1:] + kept)
    file = opened(tmp_path)
    assert file.supersede((0, 2), 1) == 1
    file.close()
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + kept


# Reading


def int64() -> st.SearchStrategy[int]:
    return st.integers(0, 2**63 - 1)


@given(st.lists(st.tuples(int64(), int64(), int64(), *[st.floats(width=32)] * 4)))
def test_read_log_gives_back_what_was_appended(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[float, ...]]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    file = opened(folder)
    file.open()
    for step, epoch, K, *figures in rows:
        file.append_row(int(step), int(epoch), int(K), *figures)
    file.close()
    found = read_log(folder)
    assert list(found) == COLUMNS
    for column, name in enumerate(COLUMNS):
        expected = np.array([row[column] for row in rows], dtype=np.int64 if column < 3 else np.float32)
        assert found[name].dtype == (np.int64 if column < 3 else np.float64)
        np.testing.assert_array_equal(found[name].astype(expected.dtype), expected)  # nine digits tell all float32


def test_read_log_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no `mixture.csv`; was a step logged\?"):
        read_log(tmp_path)


@pytest.mark.parametrize("row", ["1,2,3", "1,0,8,0.1,0.5,2,x", "1,0,8,0.1,0.5,2,1,1", "1.5,0,8,0,0,0,0", "\x80"])
def test_read_log_says_which_row_is_damaged(tmp_path: Path, row: str) -> None:
    (tmp_path / "mixture.csv").write_bytes(HEADER + ROW + row.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"`.*mixture.csv` has a row that is not 7 numbers: .*row") as caught:
        read_log(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_log_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mixture.csv")
    for use in (lambda: log(tmp_path, 0), lambda: read_log(tmp_path)):
        with pytest.raises(ValueError, match=r"mixture.csv` is not a file"):
            use()
