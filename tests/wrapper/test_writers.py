"""What the writers leave on the disk, whatever happens to them."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from mixture_torch.disk import GrowingFile, write_atomically
from mixture_torch.readers import read_log, read_scores
from mixture_torch.scan import Scan
from mixture_torch.scores import AppendScores, PerStepScores
from mixture_torch.writers import CsvWriter
from torch import Tensor

from tests.wrapper.conftest import Disk

HEADER = b"step,epoch,K,pi_min,pi_max,trace_B,opnorm_B\n"
FIGURES = (0.1, 0.5, 2.0, 1.0)
ROW = b"0,0,8,0.1,0.5,2,1\n"


def R(value: float, *shape: int) -> Tensor:
    return torch.full(shape or (3, 2), value)


def steps(log_dir: Path) -> list[int]:
    return [entry["step"] for entry in read_scores(log_dir)]


def listed(log_dir: Path) -> list[int]:
    return [entry["step"] for entry in torch.load(log_dir / "mixture_scores.pt")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, *steps: int) -> None:
    """Appends an entry for each step, and closes the file."""
    writer = AppendScores(folder)
    writer.open()
    for step in steps:
        writer.append(step, 0, R(0.0, 1, 1))
    writer.close()


def leave(folder: Path, *steps: int, flushed: bool = False) -> Path:
    """Leaves a folder as a process does that is killed after these steps, and returns the scores in it."""
    with tempfile.TemporaryDirectory() as alive:
        writer = AppendScores(alive)
        writer.open()
        for step in steps:
            writer.append(step, 0, R(0.0, 1, 1))
        if flushed:
            writer.flush()
        shutil.copytree(alive, folder, dirs_exist_ok=True)
        writer.close()
    return folder / "mixture_scores.pt"


def damage(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


# mixture.csv


def test_csv_writer_makes_nothing_before_the_first_row(tmp_path: Path) -> None:
    writer = CsvWriter(tmp_path / "run")
    writer.flush()
    writer.close()
    assert not (tmp_path / "run").exists()


def test_csv_row_is_in_the_file_when_append_returns(tmp_path: Path) -> None:
    writer = CsvWriter(tmp_path / "run")
    writer.append(0, 0, 8, FIGURES)
    assert (tmp_path / "run" / "mixture.csv").read_bytes() == HEADER + ROW
    writer.close()


def test_csv_figures_have_nine_significant_digits(tmp_path: Path) -> None:
    writer = CsvWriter(tmp_path)
    writer.append(12, 3, 8, (1 / 3, 1e-30 / 3, 2e20 / 3, float("nan")))
    writer.close()
    row = (tmp_path / "mixture.csv").read_bytes()[len(HEADER) :]
    assert row == b"12,3,8,0.333333333,3.33333333e-31,6.66666667e+19,nan\n"


def test_csv_writer_appends_to_a_file_of_ours(tmp_path: Path) -> None:
    (tmp_path / "mixture.csv").write_bytes(HEADER + ROW)
    writer = CsvWriter(tmp_path)
    writer.append(1, 0, 8, FIGURES)
    writer.close()
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + ROW + b"1" + ROW[1:]


def test_csv_writer_gives_an_empty_file_its_header(tmp_path: Path) -> None:
    (tmp_path / "mixture.csv").touch()
    writer = CsvWriter(tmp_path)
    writer.append(0, 0, 8, FIGURES)
    writer.close()
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + ROW


@pytest.mark.parametrize("foreign", [b"step,loss\n1,2\n", b"x", HEADER[:-1] + b",median_xBx\n", b"\x80\xff\n"])
def test_csv_writer_leaves_a_foreign_file_alone(tmp_path: Path, foreign: bytes) -> None:
    (tmp_path / "mixture.csv").write_bytes(foreign)
    with pytest.raises(ValueError, match=r"must begin with `step,epoch,K,.*opnorm_B`, got `.*`; move the file away"):
        CsvWriter(tmp_path).append(0, 0, 8, FIGURES)
    assert contents(tmp_path) == {"mixture.csv": foreign}


@pytest.mark.parametrize("size", range(1, len(HEADER + ROW)))
def test_csv_writer_drops_what_a_crash_tore(tmp_path: Path, size: int) -> None:
    (tmp_path / "mixture.csv").write_bytes((HEADER + ROW)[:size])
    writer = CsvWriter(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        writer.append(0, 0, 8, FIGURES)
        writer.append(1, 0, 8, FIGURES)
    writer.close()
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + ROW + b"1" + ROW[1:]
    assert len(caught) == (size != len(HEADER))


@pytest.mark.parametrize("rows", range(3))
def test_csv_writer_drops_the_zeros_of_a_power_cut(tmp_path: Path, rows: int) -> None:
    synced = HEADER + ROW * (rows - 1) if rows else b""
    (tmp_path / "mixture.csv").write_bytes(synced + bytes(len(HEADER + ROW)))
    writer = CsvWriter(tmp_path)
    with pytest.warns(UserWarning, match="bytes of an unfinished write"):
        writer.append(0, 0, 8, FIGURES)
    writer.close()
    assert (tmp_path / "mixture.csv").read_bytes() == (synced or HEADER) + ROW


def test_csv_writer_goes_on_after_close(tmp_path: Path) -> None:
    writer = CsvWriter(tmp_path)
    for step in range(3):
        writer.append(step, 0, 8, FIGURES)
        writer.close()
        writer.close()
    assert read_log(tmp_path)["step"].tolist() == [0, 1, 2]


def test_csv_row_that_does_not_fit_leaves_the_file_as_it_was(tmp_path: Path, disk_with_room_for: Disk) -> None:
    writer = CsvWriter(tmp_path)
    writer.append(0, 0, 8, FIGURES)
    with disk_with_room_for(len(HEADER + ROW) + 5), pytest.raises(OSError, match="too large"):
        writer.append(1, 0, 8, FIGURES)
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + ROW
    writer.append(2, 0, 8, FIGURES)
    writer.close()
    assert read_log(tmp_path)["step"].tolist() == [0, 2]


def test_csv_header_that_does_not_fit_is_written_later(tmp_path: Path, disk_with_room_for: Disk) -> None:
    writer = CsvWriter(tmp_path)
    with disk_with_room_for(5), pytest.raises(OSError, match="too large"):
        writer.append(0, 0, 8, FIGURES)
    writer.append(0, 0, 8, FIGURES)
    writer.close()
    assert (tmp_path / "mixture.csv").read_bytes() == HEADER + ROW


def test_csv_writer_refuses_a_wrong_number_of_figures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="values to unpack"):
        CsvWriter(tmp_path / "run").append(0, 0, 8, (1.0, 2.0))
    assert not (tmp_path / "run").exists()


def test_csv_writer_follows_no_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    writer = CsvWriter("run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    writer.append(0, 0, 8, FIGURES)
    writer.close()
    assert list(contents(tmp_path)) == ["run/mixture.csv"]


def test_csv_writer_begins_anew_where_the_folder_was_deleted(tmp_path: Path) -> None:
    writer = CsvWriter(tmp_path / "run")
    writer.append(1, 0, 8, FIGURES)
    shutil.rmtree(tmp_path / "run")
    with pytest.warns(UserWarning, match="was moved or deleted"):
        writer.append(0, 0, 8, FIGURES)
    writer.close()
    assert contents(tmp_path / "run") == {"mixture.csv": HEADER + ROW}


# mixture_scores.pt


def test_append_scores_make_nothing_before_the_first_entry(tmp_path: Path) -> None:
    writer = AppendScores(tmp_path / "run")
    writer.flush()
    writer.close()
    assert writer.supersede((0, 0), 1) == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("finish", [AppendScores.flush, AppendScores.close])
def test_append_scores_load_with_plain_torch(tmp_path: Path, finish: Callable[[AppendScores], None]) -> None:
    writer = AppendScores(tmp_path)
    writer.append(7, 1, R(0.25))
    finish(writer)
    (entry,) = torch.load(tmp_path / "mixture_scores.pt")
    assert list(entry) == ["step", "epoch", "responsibilities"]
    assert (entry["step"], entry["epoch"]) == (7, 1)
    torch.testing.assert_close(entry["responsibilities"], R(0.25), rtol=0, atol=0)
    assert list(contents(tmp_path)) == ["mixture_scores.pt"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_append_scores_store_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    writer = AppendScores(tmp_path)
    writer.append(0, 0, R(1.0).to(dtype).requires_grad_(dtype.is_floating_point))
    writer.close()
    stored = torch.load(tmp_path / "mixture_scores.pt")[0]["responsibilities"]
    assert stored.dtype == torch.float32
    assert not stored.requires_grad


def test_append_scores_store_a_view_without_what_it_views(tmp_path: Path) -> None:
    writer = AppendScores(tmp_path)
    writer.append(0, 0, torch.arange(2_000_000.0).reshape(2, 1_000_000).T[::400_000])
    writer.close()
    assert (tmp_path / "mixture_scores.pt").stat().st_size < 10_000
    expected = [[0.0, 1e6], [4e5, 1.4e6], [8e5, 1.8e6]]
    assert torch.load(tmp_path / "mixture_scores.pt")[0]["responsibilities"].tolist() == expected


def test_append_scores_do_not_depend_on_the_default_device(tmp_path: Path) -> None:
    scores = R(0.25)
    with torch.device("meta"):
        writer = AppendScores(tmp_path)
        writer.append(0, 0, scores)
        writer.flush()
        writer.append(1, 0, scores)
        writer.close()
        assert [entry["responsibilities"].device.type for entry in read_scores(tmp_path)] == ["cpu", "cpu"]


def test_append_scores_write_the_same_whatever_came_before(tmp_path: Path) -> None:
    writer = AppendScores(tmp_path)
    writer.append(0, 0, R(0.0))
    before = (tmp_path / "mixture_scores.pt").read_bytes()
    sizes = [len(before)]
    for step in range(1, 30):
        writer.append(step, 0, R(0.0))
        sizes.append((tmp_path / "mixture_scores.pt").stat().st_size)
    assert len({after - before for before, after in pairwise(sizes)}) == 1
    assert (tmp_path / "mixture_scores.pt").read_bytes().startswith(before)
    writer.close()


def test_append_scores_of_the_same_entries_are_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "at_once", *range(6))
    killed = leave(tmp_path / "killed", 0, 1, 2)
    killed.write_bytes(killed.read_bytes() + leave(tmp_path / "torn", 3).read_bytes()[512:600])
    with pytest.warns(UserWarning, match="ended in 88 bytes"):
        write(tmp_path / "killed", 3)
    for step in (4, 5):
        write(tmp_path / "killed", step)
    assert contents(tmp_path / "killed") == contents(tmp_path / "at_once")


def test_append_scores_say_where_the_last_entry_ends(tmp_path: Path) -> None:
    writer = AppendScores(tmp_path)
    writer.append(0, 0, R(0.0))
    size = (tmp_path / "mixture_scores.pt").stat().st_size
    writer.flush()
    assert writer.end == size
    writer.close()


def test_append_scores_flush_without_news_does_no_work(tmp_path: Path) -> None:
    writer = AppendScores(tmp_path)
    writer.append(0, 0, R(0.0))
    writer.flush()
    before = (tmp_path / "mixture_scores.pt").stat()
    writer.flush()
    writer.close()
    assert (tmp_path / "mixture_scores.pt").stat() == before


def test_append_scores_complete_the_file_of_a_killed_process(tmp_path: Path) -> None:
    leave(tmp_path, 0)
    write(tmp_path)
    assert listed(tmp_path) == [0]


@pytest.mark.parametrize("flushed", [False, True])
def test_append_scores_go_on_behind_a_killed_process(tmp_path: Path, flushed: bool) -> None:
    leave(tmp_path, 0, 1, flushed=flushed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(tmp_path, 2)
    assert listed(tmp_path) == steps(tmp_path) == [0, 1, 2]


def test_append_scores_drop_a_torn_record_at_every_byte(tmp_path: Path) -> None:
    whole = leave(tmp_path, 0).stat().st_size
    path = leave(tmp_path, 0, 1)
    data = path.read_bytes()
    for size in range(whole, len(data)):
        path.write_bytes(data[:size])
        assert steps(tmp_path) == [0]
        assert path.read_bytes() == data[:size]


@pytest.mark.parametrize("kept", [1, 3, 12, 13, 191, 192, 200, 255])
def test_append_scores_go_on_behind_a_torn_record_with_one_warning(tmp_path: Path, kept: int) -> None:
    whole = leave(tmp_path, 0).stat().st_size
    path = leave(tmp_path, 0, 1)
    path.write_bytes(path.read_bytes()[: whole + kept])
    writer = AppendScores(tmp_path)
    with pytest.warns(UserWarning, match=f"ended in {kept} bytes of an unfinished write") as caught:
        writer.append(2, 0, R(0.0))
    writer.close()
    assert len(caught) == 1
    assert listed(tmp_path) == [0, 2]


@pytest.mark.filterwarnings("ignore:.*were left out")
def test_append_scores_begin_anew_behind_a_torn_header_at_every_byte(tmp_path: Path) -> None:
    path = leave(tmp_path, 0)
    data = path.read_bytes()
    for size in range(1, 512):
        path.write_bytes(data[:size])
        assert steps(tmp_path) == []
        with pytest.warns(UserWarning, match=f"ended in {size} bytes"):
            write(tmp_path, 7)
        assert listed(tmp_path) == [7]


def test_append_scores_lose_nothing_with_a_torn_tail_at_every_byte(tmp_path: Path) -> None:
    whole = leave(tmp_path, 0).stat().st_size
    path = leave(tmp_path, 0, flushed=True)
    data = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in range(whole, len(data)):
            path.write_bytes(data[:size])
            assert steps(tmp_path) == [0]
            write(tmp_path)
            assert path.read_bytes() == data


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("place", [0, 100, 191, 192, 195], ids=lambda place: f"byte-{place}")
def test_append_scores_skip_a_damaged_record_with_a_warning(tmp_path: Path, place: int, flushed: bool) -> None:
    start = leave(tmp_path, 0).stat().st_size
    path = leave(tmp_path, 0, 1, 2, flushed=flushed)
    damage(path, start + place)
    with pytest.warns(
        UserWarning, match=rf"`.*mixture_scores.pt` is damaged: skipped 256 bytes at {start}\."
    ) as caught:
        assert steps(tmp_path) == [0, 2]
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="is damaged: skipped 256 bytes") as caught:
        write(tmp_path, 3)
    assert len(caught) == 1
    assert listed(tmp_path) == [0, 2, 3]


def test_append_scores_leave_the_bytes_of_a_damaged_record(tmp_path: Path) -> None:
    start = leave(tmp_path, 0).stat().st_size
    path = leave(tmp_path, 0, 1, 2)
    damage(path, start + 192)
    before = path.read_bytes()
    with pytest.warns(UserWarning, match="is damaged"):
        write(tmp_path, 3)
    assert path.read_bytes().startswith(before)


def test_append_scores_keep_a_damaged_last_record_that_was_flushed(tmp_path: Path) -> None:
    start = leave(tmp_path, 0).stat().st_size
    path = leave(tmp_path, 0, 1, flushed=True)
    damage(path, start + 192)
    before = path.read_bytes()[: start + 256]
    with pytest.warns(UserWarning, match="is damaged: skipped 256 bytes"):
        write(tmp_path, 2)
    assert path.read_bytes().startswith(before)
    assert listed(tmp_path) == [0, 2]


def test_append_scores_read_around_damage_at_every_byte(tmp_path: Path) -> None:
    start = leave(tmp_path, 0).stat().st_size
    path = leave(tmp_path, 0, 1, 2)
    for place in range(start, start + 196):
        damage(path, place)
        with pytest.warns(UserWarning, match="is damaged: skipped 256 bytes"):
            assert steps(tmp_path) == [0, 2]
        damage(path, place)  # undone


def test_append_scores_find_the_records_behind_a_hole(tmp_path: Path) -> None:
    path = leave(tmp_path, *range(9))
    data = path.read_bytes()
    path.write_bytes(data[:1000] + bytes(800) + data[1800:])
    with pytest.warns(UserWarning, match="is damaged: skipped 1024 bytes at 1024"):
        write(tmp_path, 9)
    assert listed(tmp_path) == [0, 1, 6, 7, 8, 9]


@pytest.mark.parametrize("places", [(0,), (300,), (600,), (0, 511, 512)], ids=str)
def test_append_scores_mend_a_damaged_header(tmp_path: Path, places: tuple[int, ...]) -> None:
    path = leave(tmp_path, 0, 1, flushed=True)
    for place in places:
        damage(path, place)
    with pytest.warns(UserWarning, match="is damaged: skipped"):
        write(tmp_path, 2)
    assert listed(tmp_path) == ([0, 1, 2] if max(places) < 512 else [1, 2])


@pytest.mark.parametrize("flushed_before", [(), (0,), (0, 1)], ids=str)
def test_append_scores_take_the_zeros_of_a_power_cut_for_a_torn_record(
    tmp_path: Path, flushed_before: tuple[int, ...]
) -> None:
    with leave(tmp_path, *flushed_before).open("ab") as file:
        file.write(bytes(4096))
    assert steps(tmp_path) == list(flushed_before)
    with pytest.warns(UserWarning, match="ended in 4096 bytes"):
        write(tmp_path, 5)
    assert listed(tmp_path) == [*flushed_before, 5]


def test_append_scores_begin_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "mixture_scores.pt").touch()
    assert steps(tmp_path) == []
    write(tmp_path, 0)
    assert listed(tmp_path) == [0]


def test_append_scores_begin_anew_where_the_folder_was_deleted(tmp_path: Path) -> None:
    writer = AppendScores(tmp_path / "run")
    writer.append(0, 0, R(0.0))
    writer.flush()
    shutil.rmtree(tmp_path / "run")
    writer.flush()
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="was moved or deleted"):
        writer.append(1, 0, R(0.0))
    writer.close()
    assert listed(tmp_path / "run") == [1]


def test_append_scores_lose_nothing_where_the_file_was_exchanged(tmp_path: Path) -> None:
    write(tmp_path / "other", 10, 11)
    writer = AppendScores(tmp_path / "run")
    writer.append(0, 0, R(0.0))
    (tmp_path / "other" / "mixture_scores.pt").rename(tmp_path / "run" / "mixture_scores.pt")
    writer.append(1, 0, R(0.0))
    writer.close()
    assert listed(tmp_path / "run") == [10, 11, 1]


def test_append_scores_go_on_after_close(tmp_path: Path) -> None:
    writer = AppendScores(tmp_path)
    for step in range(3):
        writer.append(step, 0, R(0.0))
        writer.close()
        writer.close()
    assert listed(tmp_path) == [0, 1, 2]


def test_append_scores_read_nothing_again_after_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []

    class Noted(Scan):
        def __init__(self, path: Path, *, start: int = 0) -> None:
            super().__init__(path, start=start)
            starts.append(start)

    monkeypatch.setattr("mixture_torch.scores.Scan", Noted)
    writer = AppendScores(tmp_path)
    for step in range(3):
        writer.append(step, 0, R(0.0))
        writer.close()
    assert starts == [768, 1024]


def test_append_scores_of_two_writers_in_one_folder_are_all_kept(tmp_path: Path) -> None:
    first, second = AppendScores(tmp_path), AppendScores(tmp_path)
    first.append(0, 0, R(0.0))
    second.append(1, 0, R(0.0))
    first.close()
    second.append(2, 0, R(0.0))
    assert steps(tmp_path) == [0, 1, 2]
    first.append(3, 0, R(0.0))
    second.close()
    first.close()
    assert listed(tmp_path) == [0, 1, 2, 3]


@pytest.mark.parametrize("legacy", [False, True])
def test_append_scores_go_on_behind_a_list_that_somebody_saved(tmp_path: Path, legacy: bool) -> None:
    write(tmp_path / "expected", 0, 1, 2)
    write(tmp_path, 0, 1)
    path = tmp_path / "mixture_scores.pt"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=not legacy)
    assert steps(tmp_path) == [0, 1]
    write(tmp_path, 2)
    assert path.read_bytes() == (tmp_path / "expected" / "mixture_scores.pt").read_bytes()


def test_append_scores_take_over_entries_of_one_storage(tmp_path: Path) -> None:
    both = torch.arange(12.0).reshape(2, 2, 3)
    entries = [{"step": step, "epoch": 0, "responsibilities": both[step].T.requires_grad_()} for step in range(2)]
    torch.save(entries, tmp_path / "mixture_scores.pt")
    write(tmp_path)
    found = [entry["responsibilities"].tolist() for entry in torch.load(tmp_path / "mixture_scores.pt")]
    assert found == [both[0].T.tolist(), both[1].T.tolist()]


@pytest.mark.parametrize("entries", [[], None], ids=["saved", "superseded"])
def test_append_scores_go_on_behind_an_empty_list(tmp_path: Path, entries: list[object] | None) -> None:
    if entries is None:
        write(tmp_path, 0)
        AppendScores(tmp_path).supersede((0, 0), 1)
    else:
        torch.save(entries, tmp_path / "mixture_scores.pt")
    assert steps(tmp_path) == listed(tmp_path) == []
    write(tmp_path, 1)
    assert listed(tmp_path) == [1]


FOREIGN = {
    "text": b"not a checkpoint",
    "short": b"mix",
    "zip": b"PK\3\4" + bytes(range(256)) * 20,
    "state_dict": {"weight": torch.ones(2)},
    "other_list": [{"step": 1, "R": torch.ones(2, 2)}],
    "float64": [{"step": 1, "epoch": 0, "responsibilities": torch.ones(2, 2, dtype=torch.float64)}],
    "vector": [{"step": 1, "epoch": 0, "responsibilities": torch.ones(2)}],
    "long_step": [{"step": 2**63, "epoch": 0, "responsibilities": torch.ones(2, 2)}],
}


@pytest.mark.parametrize("method", ["append", "open", "supersede"])
@pytest.mark.parametrize("value", FOREIGN.values(), ids=FOREIGN)
def test_append_scores_leave_a_foreign_file_alone(tmp_path: Path, value: object, method: str) -> None:
    path = tmp_path / "mixture_scores.pt"
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        torch.save(value, path)
    before = contents(tmp_path)
    writer = AppendScores(tmp_path)
    arguments: dict[str, tuple[object, ...]] = {"append": (0, 0, R(0.0)), "supersede": ((0, 0), 1)}
    with pytest.raises(ValueError, match=r"mixture_scores.pt` must hold a list of entries .* move the file away"):
        getattr(writer, method)(*arguments.get(method, ()))
    writer.close()
    assert contents(tmp_path) == before


def test_append_scores_flush_that_does_not_fit_costs_no_entry(tmp_path: Path, disk_with_room_for: Disk) -> None:
    writer = AppendScores(tmp_path)
    writer.append(0, 0, R(0.0, 1000, 8))
    before = contents(tmp_path)
    with disk_with_room_for(len(before["mixture_scores.pt"]) + 400), pytest.raises(OSError, match="too large"):
        writer.flush()
    assert contents(tmp_path) == before
    writer.append(1, 0, R(0.0))
    writer.close()
    assert listed(tmp_path) == [0, 1]


def test_append_scores_entry_that_does_not_fit_costs_no_other(tmp_path: Path, disk_with_room_for: Disk) -> None:
    writer = AppendScores(tmp_path)
    writer.append(0, 0, R(0.0))
    before = contents(tmp_path)
    with disk_with_room_for(10_000), pytest.raises(OSError, match="too large"):
        writer.append(1, 0, R(0.0, 1000, 8))
    assert contents(tmp_path) == before
    writer.append(2, 0, R(0.0))
    writer.close()
    assert steps(tmp_path) == [0, 2]


def test_append_scores_know_of_an_entry_whose_append_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = GrowingFile.append

    def interrupted(file: GrowingFile, data: bytes) -> None:
        append(file, data)
        raise KeyboardInterrupt

    writer = AppendScores(tmp_path)
    writer.append(0, 0, R(0.0))
    with monkeypatch.context() as patch:
        patch.setattr(GrowingFile, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.append(1, 0, R(0.0))
    writer.append(2, 0, R(0.0))
    writer.close()
    assert listed(tmp_path) == [0, 1, 2]


# mixture_scores.superseded-1.pt

POSITIONS = [(0, 5), (0, 6), (1, 0), (0, 6), (1, 1), (0, 7), (1, 2)]  # (epoch, step), of runs one behind the other


def write_positions(folder: Path, positions: list[tuple[int, int]]) -> AppendScores:
    writer = AppendScores(folder)
    for epoch, step in positions:
        writer.append(step, epoch, R(epoch + step / 8, 5, 3))
    writer.flush()
    return writer


@pytest.mark.parametrize("cut", [(0, 0), (0, 6), (0, 7), (1, 0), (1, 2), (1, 3), (2, 0)], ids=str)
def test_supersede_moves_what_is_at_or_behind_the_position(tmp_path: Path, cut: tuple[int, int]) -> None:
    moved = [position for position in POSITIONS if position >= cut]
    kept = [position for position in POSITIONS if position < cut]
    assert write_positions(tmp_path / "run", POSITIONS).supersede(cut, 3) == len(moved)
    write_positions(tmp_path / "kept", kept).close()
    write_positions(tmp_path / "moved", moved).close()
    expected = {"mixture_scores.superseded-3.pt": contents(tmp_path / "moved")["mixture_scores.pt"]} if moved else {}
    if kept:
        expected |= contents(tmp_path / "kept")
    else:
        assert torch.load(tmp_path / "run" / "mixture_scores.pt") == []
        (tmp_path / "run" / "mixture_scores.pt").unlink()
    assert contents(tmp_path / "run") == expected


@pytest.mark.parametrize("cut", [(0, 6), (1, 2)], ids=["anywhere", "at_the_end"])
def test_append_scores_go_on_behind_what_was_superseded(tmp_path: Path, cut: tuple[int, int]) -> None:
    writer = write_positions(tmp_path / "run", POSITIONS)
    writer.supersede(cut, 1)
    writer.append(9, 9, R(9.0))
    writer.close()
    kept = [position for position in POSITIONS if position < cut]
    found = torch.load(tmp_path / "run" / "mixture_scores.pt")
    assert [(entry["epoch"], entry["step"]) for entry in found] == [*kept, (9, 9)]


def test_supersede_makes_a_resumed_file_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    write(tmp_path / "whole", *range(8))
    leave(tmp_path / "resumed", *range(6))
    resumed = AppendScores(tmp_path / "resumed")
    assert resumed.supersede((0, 4), 1) == 2
    for step in range(4, 8):
        resumed.append(step, 0, R(0.0, 1, 1))
    resumed.close()
    assert contents(tmp_path / "resumed")["mixture_scores.pt"] == contents(tmp_path / "whole")["mixture_scores.pt"]


@pytest.mark.parametrize("cut", [(0, 6), (1, 2)], ids=["anywhere", "at_the_end"])
def test_supersede_that_breaks_off_costs_no_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: tuple[int, int]
) -> None:
    writer = write_positions(tmp_path, POSITIONS)
    replace = os.replace

    def fail(old: Path, new: Path) -> None:
        if new.name == "mixture_scores.pt":
            raise OSError("no power")
        replace(old, new)

    def fail_to_cut(file: GrowingFile, size: int) -> None:
        raise OSError("no power")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        patch.setattr(GrowingFile, "cut", fail_to_cut)
        with pytest.raises(OSError, match="no power"):
            writer.supersede(cut, 1)
    writer.append(9, 9, R(9.0))
    writer.close()
    found = torch.load(tmp_path / "mixture_scores.pt")
    assert [(entry["epoch"], entry["step"]) for entry in found] == [*POSITIONS, (9, 9)]


# mixture_scores/step_000123.pt


def test_per_step_scores_make_nothing_before_the_first_entry(tmp_path: Path) -> None:
    assert PerStepScores(tmp_path / "run").supersede((0, 0), 1, steps={0}) == 0
    assert not (tmp_path / "run").exists()


def test_per_step_scores_are_one_entry_a_file(tmp_path: Path) -> None:
    writer = PerStepScores(tmp_path)
    writer.append(123, 4, R(0.5))
    assert list(contents(tmp_path)) == ["mixture_scores/step_000123.pt"]
    entry = torch.load(tmp_path / "mixture_scores" / "step_000123.pt")
    assert (entry["step"], entry["epoch"]) == (123, 4)
    torch.testing.assert_close(entry["responsibilities"], R(0.5), rtol=0, atol=0)


def test_per_step_scores_warn_once_where_they_replace(tmp_path: Path) -> None:
    PerStepScores(tmp_path).append(1, 0, R(0.0))
    PerStepScores(tmp_path).append(2, 0, R(0.0))
    writer = PerStepScores(tmp_path)
    writer.append(0, 9, R(0.0))
    with pytest.warns(UserWarning, match="was there already and has been replaced"):
        writer.append(1, 9, R(0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.append(2, 9, R(0.0))
    assert [entry["epoch"] for entry in read_scores(tmp_path)] == [9, 9, 9]


def test_per_step_scores_that_do_not_fit_leave_the_old_file(tmp_path: Path, disk_with_room_for: Disk) -> None:
    writer = PerStepScores(tmp_path)
    writer.append(0, 0, R(0.0))
    before = contents(tmp_path)
    with disk_with_room_for(10_000), pytest.raises(OSError, match="too large"):
        writer.append(0, 0, R(0.0, 1000, 8))
    assert contents(tmp_path) == before


# whole files


@pytest.mark.parametrize("durable", [False, True])
def test_write_atomically_replaces_the_content(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "folder" / "config.yaml"
    write_atomically(path, b"K: 8\n", durable=durable)
    write_atomically(path, b"K: 12\n", durable=durable)
    assert contents(tmp_path) == {"folder/config.yaml": b"K: 12\n"}


def test_write_atomically_leaves_no_temporary_file_behind_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError("read-only")

    write_atomically(tmp_path / "config.yaml", b"K: 8\n")
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(PermissionError, match="read-only"):
        write_atomically(tmp_path / "config.yaml", b"K: 12\n")
    assert contents(tmp_path) == {"config.yaml": b"K: 8\n"}


def test_write_atomically_keeps_the_permissions_of_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_atomically(tmp_path / "config.yaml", b"K: 8\n")
    assert (tmp_path / "config.yaml").stat().st_mode == (tmp_path / "plain").stat().st_mode


# a killed process


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a process that logged five steps, flushed after the second, and was killed."""
    folder = tmp_path_factory.mktemp("killed")
    script = """if True:
        import os, signal, sys, torch
        from mixture_torch.scores import AppendScores
        from mixture_torch.writers import CsvWriter
        rows, scores = CsvWriter(sys.argv[1]), AppendScores(sys.argv[1])
        for step in range(5):
            rows.append(step, 0, 8, (0.1, 0.5, 2.0, 1.0))
            scores.append(step, 0, torch.full((3, 2), float(step)))
            if step == 1:
                scores.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    process = subprocess.run([sys.executable, "-c", script, str(folder)], timeout=60, check=False)
    assert process.returncode == -signal.SIGKILL
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_csv_rows_outlive_a_kill(killed_run: Path) -> None:
    assert read_log(killed_run)["step"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_append_scores_outlive_a_kill(killed_run: Path) -> None:
    assert [entry["responsibilities"].mean().item() for entry in read_scores(killed_run)] == [0, 1, 2, 3, 4]


def test_append_scores_set_aside_what_stands_behind_the_end(tmp_path: Path) -> None:
    write(tmp_path, 0, 1)
    path = tmp_path / "mixture_scores.pt"
    whole = path.read_bytes()
    path.write_bytes(whole * 2)
    with pytest.warns(
        UserWarning, match=rf"had {len(whole)} bytes behind its end; they were moved to `.*foreign-1.pt`"
    ):
        write(tmp_path, 2)
    assert listed(tmp_path) == [0, 1, 2]
    assert (tmp_path / "mixture_scores.foreign-1.pt").read_bytes() == whole


def test_per_step_scores_leave_a_file_that_is_no_entry(tmp_path: Path) -> None:
    path = tmp_path / "mixture_scores" / "step_000001.pt"
    path.parent.mkdir()
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"step_000001.pt` must hold one entry"):
        PerStepScores(tmp_path).append(1, 0, R(0.0))
    assert path.read_bytes() == b"mine"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_append_scores_refuse_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mixture_scores.pt")
    with pytest.raises(ValueError, match=r"mixture_scores.pt` must hold"):
        AppendScores(tmp_path).open()
