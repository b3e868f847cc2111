"""What the writers leave on the disk, whatever happens to them."""

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
from torch import Tensor

from mixture_torch.disk import write_atomically
from mixture_torch.readers import read_log, read_scores
from mixture_torch.writers import AppendScores, CsvWriter, PerStepScores
from tests.wrapper.conftest import Disk

HEADER = b"step,epoch,K,pi_min,pi_max,trace_B,opnorm_B\n"
FIGURES = (0.1, 0.5, 2.0, 1.0)
ROW = b"0,0,8,0.1,0.5,2,1\n"


def R(value: float, *shape: int) -> Tensor:
    return torch.full(shape or (3, 2), value)


def steps(log_dir: Path) -> list[int]:
    return [entry["step"] for entry in read_scores(log_dir)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leave_journal(folder: Path, *steps: int) -> Path:
    """Leaves a folder as a process does that is killed after these steps, and returns the journal in it."""
    with tempfile.TemporaryDirectory() as alive:
        writer = AppendScores(alive)
        for step in steps:
            writer.append(step, 0, R(0.0, 1, 1))
        shutil.copytree(alive, folder, dirs_exist_ok=True)
        writer.close()
    return folder / "mixture_scores.journal"


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
    writer.append(0, 0, 8, FIGURES)
    writer.close()
    assert contents(tmp_path / "run") == {"mixture.csv": HEADER + ROW}


# mixture_scores.pt and its journal


def test_append_scores_make_nothing_before_the_first_entry(tmp_path: Path) -> None:
    writer = AppendScores(tmp_path / "run")
    writer.flush()
    writer.close()
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
    writer.append(0, 0, torch.zeros(1_000_000, 2)[::400_000])
    writer.close()
    assert (tmp_path / "mixture_scores.pt").stat().st_size < 10_000


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
    writer.flush()
    listed = (tmp_path / "mixture_scores.pt").read_bytes()
    sizes = []
    for step in range(1, 30):
        writer.append(step, 0, R(0.0))
        sizes.append((tmp_path / "mixture_scores.journal").stat().st_size)
    assert len({after - before for before, after in pairwise(sizes)}) == 1
    assert (tmp_path / "mixture_scores.pt").read_bytes() == listed
    writer.close()


def test_append_scores_flush_without_news_does_no_work(tmp_path: Path) -> None:
    writer = AppendScores(tmp_path)
    writer.append(0, 0, R(0.0))
    writer.flush()
    before = (tmp_path / "mixture_scores.pt").stat()
    writer.flush()
    writer.close()
    assert (tmp_path / "mixture_scores.pt").stat() == before


def test_append_scores_merge_the_journal_of_a_killed_process(tmp_path: Path) -> None:
    leave_journal(tmp_path, 0)
    AppendScores(tmp_path).flush()
    assert [entry["step"] for entry in torch.load(tmp_path / "mixture_scores.pt")] == [0]


def test_append_scores_drop_a_torn_record_at_every_byte(tmp_path: Path) -> None:
    whole = leave_journal(tmp_path, 0).stat().st_size
    journal = leave_journal(tmp_path, 0, 1)
    data = journal.read_bytes()
    for size in range(whole, len(data)):
        journal.write_bytes(data[:size])
        assert steps(tmp_path) == [0]
        assert journal.read_bytes() == data[:size]


@pytest.mark.parametrize("kept", [1, 3, 12, 13, 500])
def test_append_scores_go_on_behind_a_torn_record_with_one_warning(tmp_path: Path, kept: int) -> None:
    whole = leave_journal(tmp_path, 0).stat().st_size
    journal = leave_journal(tmp_path, 0, 1)
    journal.write_bytes(journal.read_bytes()[: whole + kept])
    writer = AppendScores(tmp_path)
    with pytest.warns(UserWarning, match=f"ended in {kept} bytes of an unfinished write") as caught:
        writer.append(2, 0, R(0.0))
    writer.close()
    assert len(caught) == 1
    assert [entry["step"] for entry in torch.load(tmp_path / "mixture_scores.pt")] == [0, 2]


def test_append_scores_begin_a_torn_journal_anew_at_every_byte_of_its_header(tmp_path: Path) -> None:
    journal = leave_journal(tmp_path, 0)
    header = journal.read_bytes()[:24]
    for size in range(1, len(header)):
        journal.write_bytes(header[:size])
        writer = AppendScores(tmp_path)
        with pytest.warns(UserWarning, match=f"ended in {size} bytes"):
            writer.append(size, 0, R(0.0, 1, 1))
        writer.close()
    assert steps(tmp_path) == list(range(1, len(header)))


def test_append_scores_skip_a_damaged_record_with_a_warning(tmp_path: Path) -> None:
    middle = leave_journal(tmp_path, 0).stat().st_size + 100
    journal = leave_journal(tmp_path, 0, 1, 2)
    data = bytearray(journal.read_bytes())
    data[middle] ^= 1
    journal.write_bytes(data)
    with pytest.warns(UserWarning, match="is damaged: skipped"):
        AppendScores(tmp_path).flush()
    assert steps(tmp_path) == [0, 2]


def test_append_scores_take_the_zeros_of_a_power_cut_for_a_torn_record(tmp_path: Path) -> None:
    with leave_journal(tmp_path, 0).open("ab") as file:
        file.write(bytes(4096))
    with pytest.warns(UserWarning, match="ended in 4096 bytes"):
        AppendScores(tmp_path).flush()
    assert steps(tmp_path) == [0]


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("after", [0, 2])
def test_append_scores_survive_a_crash_between_the_list_and_the_journal(
    tmp_path: Path, before: int, after: int
) -> None:
    journal = tmp_path / "mixture_scores.journal"
    writer = AppendScores(tmp_path)
    scores = R(float("nan"))  # the same entry every time, so that nothing but its place tells it apart
    for _ in range(before):
        writer.append(0, 0, scores)
    writer.flush()
    for _ in range(3):
        writer.append(0, 0, scores)
    unmerged = journal.read_bytes()
    writer.flush()
    journal.write_bytes(unmerged)  # as if the process had died before it removed the journal
    assert len(read_scores(tmp_path)) == before + 3
    resumed = AppendScores(tmp_path)
    for _ in range(after):
        resumed.append(0, 0, scores)
    assert len(read_scores(tmp_path)) == before + 3 + after
    resumed.close()
    assert len(torch.load(tmp_path / "mixture_scores.pt")) == before + 3 + after


def test_append_scores_lose_nothing_where_the_list_was_taken_away(tmp_path: Path) -> None:
    writer = AppendScores(tmp_path)
    writer.append(0, 0, R(0.0))
    writer.flush()
    writer.append(1, 0, R(0.0))
    (tmp_path / "mixture_scores.pt").unlink()
    writer.close()
    assert steps(tmp_path) == [1]


def test_append_scores_lose_nothing_where_the_list_was_exchanged(tmp_path: Path) -> None:
    other = AppendScores(tmp_path / "other")
    for step in range(10, 15):
        other.append(step, 0, R(0.0))
    other.close()
    writer = AppendScores(tmp_path / "run")
    writer.append(0, 0, R(0.0))
    (tmp_path / "other" / "mixture_scores.pt").rename(tmp_path / "run" / "mixture_scores.pt")
    writer.close()
    assert steps(tmp_path / "run") == [10, 11, 12, 13, 14, 0]


def test_append_scores_go_on_after_close(tmp_path: Path) -> None:
    writer = AppendScores(tmp_path)
    for step in range(3):
        writer.append(step, 0, R(0.0))
        writer.close()
        writer.close()
    assert [entry["step"] for entry in torch.load(tmp_path / "mixture_scores.pt")] == [0, 1, 2]


def test_append_scores_of_two_writers_in_one_folder_are_all_kept(tmp_path: Path) -> None:
    first, second = AppendScores(tmp_path), AppendScores(tmp_path)
    first.append(0, 0, R(0.0))
    second.append(1, 0, R(0.0))
    first.close()  # and with it the journal that the second has open
    second.append(2, 0, R(0.0))
    assert steps(tmp_path) == [0, 1, 2]
    first.append(3, 0, R(0.0))
    second.close()
    first.close()
    assert [entry["step"] for entry in torch.load(tmp_path / "mixture_scores.pt")] == [0, 1, 2, 3]


FOREIGN = {
    "text": b"not a checkpoint",
    "empty": b"",
    "state_dict": {"weight": torch.ones(2)},
    "other_list": [{"step": 1, "R": torch.ones(2, 2)}],
    "float64": [{"step": 1, "epoch": 0, "responsibilities": torch.ones(2, 2, dtype=torch.float64)}],
}


@pytest.mark.parametrize("value", FOREIGN.values(), ids=FOREIGN)
def test_append_scores_leave_a_foreign_list_alone(tmp_path: Path, value: object) -> None:
    path = tmp_path / "mixture_scores.pt"
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        torch.save(value, path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"mixture_scores.pt` must hold a list of entries .* move the file away"):
        AppendScores(tmp_path).append(0, 0, R(0.0))
    assert contents(tmp_path) == before


def test_append_scores_leave_a_foreign_journal_alone(tmp_path: Path) -> None:
    (tmp_path / "mixture_scores.journal").write_bytes(b"Dear diary,\n")
    with pytest.raises(ValueError, match=r"mixture_scores.journal` must hold a journal .* move the file away"):
        AppendScores(tmp_path).append(0, 0, R(0.0))
    assert contents(tmp_path) == {"mixture_scores.journal": b"Dear diary,\n"}


def test_append_scores_keep_in_the_journal_what_a_flush_cannot_write(tmp_path: Path, disk_with_room_for: Disk) -> None:
    writer = AppendScores(tmp_path)
    writer.append(0, 0, R(0.0, 1000, 8))
    with disk_with_room_for(10_000), pytest.raises(OSError, match="too large"):
        writer.flush()
    assert list(contents(tmp_path)) == ["mixture_scores.journal"]
    writer.append(1, 0, R(0.0))
    writer.close()
    assert [entry["step"] for entry in torch.load(tmp_path / "mixture_scores.pt")] == [0, 1]


def test_append_scores_entry_that_does_not_fit_leaves_the_journal_as_it_was(
    tmp_path: Path, disk_with_room_for: Disk
) -> None:
    writer = AppendScores(tmp_path)
    writer.append(0, 0, R(0.0))
    before = contents(tmp_path)
    with disk_with_room_for(10_000), pytest.raises(OSError, match="too large"):
        writer.append(1, 0, R(0.0, 1000, 8))
    assert contents(tmp_path) == before
    writer.append(2, 0, R(0.0))
    writer.close()
    assert steps(tmp_path) == [0, 2]


# mixture_scores/step_000123.pt


def test_per_step_scores_make_nothing_before_the_first_entry(tmp_path: Path) -> None:
    writer = PerStepScores(tmp_path / "run")
    writer.flush()
    writer.close()
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
        from mixture_torch.writers import AppendScores, CsvWriter
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
