"""`mixture_extra.csv`: what is written and read, another K, and what a resumed run sets aside."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from mixture_torch import read_extra, read_log
from mixture_torch.files.extra import extra_header
from tests.files.recording import HEADER, Place, Writer, broken, extra_line, line, said
from tests.wrapper.samples import contents

NAME = "mixture_extra.csv"
SCALARS = "step,epoch,n_rows,n_ignored,n_relocated,trace_T,share_B,participation_ratio,se_trace_B,alignment"


def writer(folder: Path, K: int | None = 2, *, resumes: bool = False) -> Writer:
    one = Writer(folder, resumes=resumes)
    one.K = K
    return one


def log(folder: Path, *places: Place | int, K: int | None = 2, value: float = 0.0, resumes: bool = False) -> list[str]:
    """Logs rows, closes the files, and returns what was said."""
    with said() as messages:
        (one := writer(folder, K, resumes=resumes)).log(*places, value=value)
        one.close()
    return messages


def lines(*places: Place | int, K: int = 2, value: float = 0.0) -> bytes:
    return b"".join(extra_line(place, K, value) for place in places)


def header(K: int = 2) -> bytes:
    return extra_header(K) + b"\n"


def test_header_has_three_columns_per_component() -> None:
    assert extra_header(2).decode() == f"{SCALARS},pi_0,pi_1,n_0,n_1,rel_0,rel_1"


def test_row_is_in_both_files_at_once_and_read_as_one_array_per_column(tmp_path: Path) -> None:
    (one := writer(tmp_path, 3)).log(0, (1, 7), value=1 / 3)
    extra, columns = read_extra(tmp_path), [*SCALARS.split(","), "pi", "n", "rel"]
    assert (tmp_path / NAME).read_bytes() == header(3) + lines(0, (1, 7), K=3, value=1 / 3)
    one.close()
    assert list(extra) == columns
    assert [extra[name].dtype for name in columns] == [np.dtype(np.int64)] * 5 + [np.dtype(np.float64)] * 8
    assert [extra[name].shape for name in columns] == [(2,)] * 10 + [(2, 3)] * 3
    assert (extra["step"].tolist(), extra["epoch"].tolist(), extra["n_rows"].tolist()) == ([0, 7], [0, 1], [64, 64])
    assert extra["pi"].tolist() == [[0.25, 1.25, 2.25]] * 2
    assert extra["n"].tolist() == [[16, 17, 18]] * 2
    assert extra["rel"].tolist() == [[0.333333333] * 3] * 2


def test_row_without_extra_leaves_the_file_alone(tmp_path: Path) -> None:
    log(tmp_path, 0, K=None)
    assert set(contents(tmp_path)) == {"mixture.csv"}
    log(tmp_path, 1)
    log(tmp_path, 2, K=None)
    assert (tmp_path / NAME).read_bytes() == header() + lines(1)
    assert read_log(tmp_path)["step"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("header_only", [False, True])
def test_file_of_another_K_is_moved_as_a_whole_with_one_warning(tmp_path: Path, header_only: bool) -> None:
    before = header(3) + (b"" if header_only else lines(0, 1, K=3) + b"2,0,6")
    (tmp_path / NAME).write_bytes(before)
    (tmp_path / "mixture_extra.superseded-1.csv").write_bytes(b"earlier")
    assert log(tmp_path, 5, 6) == [
        f"`{tmp_path / NAME}` has the columns of another K; it was moved to `mixture_extra.superseded-2.csv`."
    ]
    assert (tmp_path / "mixture_extra.superseded-2.csv").read_bytes() == before
    assert (tmp_path / NAME).read_bytes() == header() + lines(5, 6)
    assert (tmp_path / "mixture.csv").read_bytes().count(b"\n") == 3


def test_two_users_of_different_K_do_not_move_the_file_at_each_step(tmp_path: Path) -> None:
    one, other = writer(tmp_path), writer(tmp_path, 3)
    with said() as messages:
        for step in (0, 2):
            one.log(step)
            other.log(step + 1)
        one.close()
        other.close()
    assert messages[1:] == [
        f"`{tmp_path / NAME}` has rows of another K, so rows of K=3 are left out; use another `log_dir`.",
        f"`{tmp_path / 'mixture.csv'}` changes from K=2 to K=3 at step 1 of epoch 0; use another `log_dir`.",
    ]
    assert (tmp_path / NAME).read_bytes() == header() + lines(0, 2)
    assert read_log(tmp_path)["step"].tolist() == [0, 1, 2, 3]
    with said() as messages:
        other.log(4)  # alone
        other.close()
    assert (tmp_path / NAME).read_bytes() == header(3) + lines(4, K=3)


@pytest.mark.parametrize(
    "foreign", [b"step,loss\n1,2\n", b"x", header()[:-1] + b",median_xBx\n", header(3)[:-7] + b"\n"]
)
def test_foreign_file_is_refused_and_left_alone(tmp_path: Path, foreign: bytes) -> None:
    (tmp_path / NAME).write_bytes(foreign)
    for use in (lambda: writer(tmp_path).log(0), lambda: read_extra(tmp_path)):
        with pytest.raises(ValueError, match=rf"{NAME}` begins with `.*` instead of `step,epoch,n_rows,.*; move the"):
            use()
    assert contents(tmp_path) == {NAME: foreign}


@pytest.mark.parametrize("K", [1, 2, 11])
def test_torn_file_goes_on_behind_its_last_whole_row_and_loses_no_byte(tmp_path: Path, K: int) -> None:
    whole, path, aside = header(K) + lines(0, K=K), tmp_path / NAME, tmp_path / "mixture_extra.superseded-1.csv"
    for size in range(1, len(whole), 1 if K == 2 else 7):
        path.write_bytes(whole[:size])
        assert read_extra(tmp_path)["step"].tolist() == []
        log(tmp_path, 1, K=K)
        torn = whole[len(header(K)) : size]
        assert path.read_bytes() == header(K) + lines(1, K=K)
        assert (aside.read_bytes() if aside.exists() else b"") == (header(K) + torn if torn else b"")
        aside.unlink(missing_ok=True)
        (tmp_path / "mixture.csv").unlink()


def test_line_ends_of_a_file_are_kept(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes((header() + lines(0)).replace(b"\n", b"\r\n"))
    log(tmp_path, 1)
    assert (tmp_path / NAME).read_bytes() == (header() + lines(0, 1)).replace(b"\n", b"\r\n")
    assert read_extra(tmp_path)["step"].tolist() == [0, 1]


@pytest.mark.parametrize("K", [2, None])
def test_resumed_run_sets_rows_aside_under_the_number_of_the_log(tmp_path: Path, K: int | None) -> None:
    log(tmp_path, 0, 1, 2, value=1.0)
    for name in ("mixture.superseded-1.csv", "mixture_extra.superseded-2.csv"):
        (tmp_path / name).write_bytes(b"earlier")
    (tmp_path / NAME).write_bytes(header() + lines(0, 1, 2, value=1.0) + b"3,0,6")  # torn: takes a number of its own
    messages = log(tmp_path, 1, K=K, resumes=True)
    assert messages[1:2] == [
        f"`{tmp_path}` is resumed at step 1 of epoch 0: 2 later rows and 0 entries of responsibilities were moved to "
        "`mixture.superseded-3.csv` and `mixture_extra.superseded-3.csv`."
    ]
    assert (tmp_path / "mixture_extra.superseded-1.csv").read_bytes() == header() + b"3,0,6"
    assert (tmp_path / "mixture_extra.superseded-3.csv").read_bytes() == header() + lines(1, 2, value=1.0)
    assert (tmp_path / NAME).read_bytes() == header() + lines(0, value=1.0) + (lines(1) if K else b"")


def test_rows_wait_for_a_disk_that_fails_at_this_file_alone(tmp_path: Path) -> None:
    one, write = writer(tmp_path), os.write
    one.log(0)
    with said() as messages, pytest.MonkeyPatch.context() as patch:

        def fails(fd: int, data: bytes) -> int:
            if len(data) > 25:
                write(fd, data[:10])  # a part, as a disk that fills up
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(fd, data)

        patch.setattr(os, "write", fails)
        one.log(1, 2)
    assert len(messages) == 1
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + line(0).replace(b",3,", b",2,")  # which comes last
    with broken("open"):
        one.log(3)
    one.close()
    assert (tmp_path / NAME).read_bytes() == header() + lines(0, 1, 2, 3)
    assert read_log(tmp_path)["step"].tolist() == [0, 1, 2, 3]


def test_read_extra_says_what_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no `mixture_extra.csv`; was `extra` on\?"):
        read_extra(tmp_path)
    (tmp_path / NAME).write_bytes(header() + lines(0) + b"1,0,2\n")
    with pytest.raises(ValueError, match=r"mixture_extra.csv` has a row that is not 16 numbers: "):
        read_extra(tmp_path)
