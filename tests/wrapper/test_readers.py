"""What the readers give back of what the writers were given."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from mixture_torch.readers import ScoreEntry, read_log, read_scores
from mixture_torch.scores import AppendScores, PerStepScores
from mixture_torch.writers import CsvWriter

COLUMNS = ["step", "epoch", "K", "pi_min", "pi_max", "trace_B", "opnorm_B"]
FIGURES = (0.1, 0.5, 2.0, 1.0)


def int64() -> st.SearchStrategy[int]:
    return st.integers(0, 2**63 - 1)


def float32() -> st.SearchStrategy[float]:
    return st.floats(width=32)


@st.composite
def entries(draw: st.DrawFn) -> ScoreEntry:
    shape = draw(array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=3))
    R = torch.from_numpy(draw(arrays(np.float32, shape, elements=float32())))
    return {"step": draw(st.integers(0, 5)), "epoch": draw(st.integers(0, 2)), "responsibilities": R}


def bits(found: Sequence[ScoreEntry]) -> list[tuple[int, int, torch.dtype, torch.Size, bytes]]:
    """Everything about entries, NaN and signed zeros included, in a form that `==` compares."""
    return [
        (entry["step"], entry["epoch"], R.dtype, R.shape, R.numpy().tobytes())
        for entry in found
        for R in [entry["responsibilities"]]
    ]


def snapshot(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def snapshot_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: data for path, (data, _) in snapshot(folder).items()}


def write_at_once(folder: Path, entries: list[ScoreEntry]) -> Path:
    writer = AppendScores(folder)
    for entry in entries:
        writer.append(**entry)
    writer.close()
    return folder


# read_log


@given(st.lists(st.tuples(int64(), int64(), int64(), float32(), float32(), float32(), float32())))
def test_read_log_gives_back_what_was_appended(rows: list[tuple[float, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        writer = CsvWriter(folder)
        writer.append(0, 0, 8, FIGURES)
        for step, epoch, K, *figures in rows:
            writer.append(int(step), int(epoch), int(K), figures)
        writer.close()
        log = read_log(folder)
    assert list(log) == COLUMNS
    for column, name in enumerate(COLUMNS):
        expected = np.array([row[column] for row in rows], dtype=np.int64 if column < 3 else np.float32)
        # Nine significant digits tell every float32 from its neighbours.
        np.testing.assert_array_equal(log[name][1:].astype(expected.dtype), expected)


@pytest.mark.parametrize("text", ["", ",".join(COLUMNS), ",".join(COLUMNS) + "\n"])
def test_read_log_without_rows_gives_empty_columns(tmp_path: Path, text: str) -> None:
    (tmp_path / "mixture.csv").write_text(text)
    log = read_log(tmp_path)
    assert {name: (column.dtype, column.shape) for name, column in log.items()} == {
        name: (np.dtype(np.int64 if name in ("step", "epoch", "K") else np.float64), (0,)) for name in COLUMNS
    }


def test_read_log_leaves_out_a_torn_last_line(tmp_path: Path) -> None:
    (tmp_path / "mixture.csv").write_text(",".join(COLUMNS) + "\n0,0,8,0.1,0.5,2,1\n1,0,8,0.1,0.5,2,1")
    before = snapshot(tmp_path)
    assert read_log(str(tmp_path))["step"].tolist() == [0]
    assert snapshot(tmp_path) == before


def test_read_log_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must hold `mixture.csv`, got `.*` without one; was a step logged\?"):
        read_log(tmp_path)


def test_read_log_says_what_is_foreign(tmp_path: Path) -> None:
    (tmp_path / "mixture.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match=r"must begin with `step,epoch,K,.*`, got `step,loss`"):
        read_log(tmp_path)


@pytest.mark.parametrize("row", ["1,2,3", "1,0,8,0.1,0.5,2,x", "1,0,8,0.1,0.5,2,1,1", "1.5,0,8,0,0,0,0", "\x80"])
def test_read_log_says_which_row_is_damaged(tmp_path: Path, row: str) -> None:
    (tmp_path / "mixture.csv").write_text(",".join(COLUMNS) + "\n0,0,8,0.1,0.5,2,1\n" + row + "\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"`.*mixture.csv` must hold 7 numbers a row, got another: .*row") as caught:
        read_log(tmp_path)
    assert "\n" not in str(caught.value)


# read_scores


@given(st.lists(st.one_of(entries(), st.sampled_from(["flush", "close", "reopen", "kill"])), max_size=10))
def test_read_scores_gives_back_what_was_appended(actions: list[ScoreEntry | str]) -> None:
    appended: list[ScoreEntry] = []
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "0"
        writers = [AppendScores(folder)]
        for action in actions:
            if isinstance(action, dict):
                writers[-1].append(**action)
                appended.append(action)
            elif action == "flush":
                writers[-1].flush()
                if appended:
                    assert bits(torch.load(folder / "mixture_scores.pt")) == bits(appended)
            elif action == "close":
                writers[-1].close()
            elif action == "reopen":
                writers[-1].close()
                writers.append(AppendScores(folder))
            elif folder.exists():  # a kill leaves the files as they are at this instant
                folder = shutil.copytree(folder, Path(root) / str(len(writers)))
                writers.append(AppendScores(folder))
                writers[-1].open()
            if appended:
                assert bits(read_scores(folder)) == bits(appended)
        for writer in writers:
            writer.close()
        if appended:
            assert bits(torch.load(folder / "mixture_scores.pt")) == bits(appended)
            assert snapshot_bytes(folder) == snapshot_bytes(write_at_once(Path(root) / "at_once", appended))


@given(st.lists(entries(), min_size=1, max_size=4), st.booleans(), st.floats(0, 1))
def test_read_scores_gives_back_what_a_crash_has_left(written: list[ScoreEntry], flushed: bool, share: float) -> None:
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "mixture_scores.pt"
        writer, ends = AppendScores(root), []
        for entry in written:
            writer.append(**entry)
            ends.append(path.stat().st_size)
        if flushed:
            writer.flush()
        size = round(share * path.stat().st_size)
        left = [entry for entry, end in zip(written, ends, strict=True) if end <= size]
        killed = Path(root) / "killed"
        killed.mkdir()
        (killed / "mixture_scores.pt").write_bytes(path.read_bytes()[:size])
        writer.close()
        assert bits(read_scores(killed)) == bits(left)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said of what was torn
            resumed = AppendScores(killed)
            resumed.append(**written[0])
        resumed.close()
        assert bits(torch.load(killed / "mixture_scores.pt")) == bits([*left, written[0]])


@given(st.lists(entries(), min_size=1, unique_by=lambda entry: entry["step"]))
def test_read_scores_gives_shards_in_the_order_of_their_steps(shards: list[ScoreEntry]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        writer = PerStepScores(folder)
        for shard in shards:
            writer.append(**shard)
        found = read_scores(folder)
    assert bits(found) == bits(sorted(shards, key=lambda entry: entry["step"]))


def test_read_scores_orders_steps_as_numbers(tmp_path: Path) -> None:
    writer = PerStepScores(tmp_path)
    for step in (999_999, 1_000_000, 5):
        writer.append(step, 0, torch.zeros(1, 1))
    assert [entry["step"] for entry in read_scores(tmp_path)] == [5, 999_999, 1_000_000]


def test_read_scores_gives_the_list_before_the_shards(tmp_path: Path) -> None:
    appended, per_step = AppendScores(tmp_path), PerStepScores(tmp_path)
    per_step.append(0, 0, torch.zeros(1, 1))
    appended.append(7, 0, torch.zeros(1, 1))
    assert [entry["step"] for entry in read_scores(tmp_path)] == [7, 0]
    appended.close()


def test_read_scores_leaves_torn_files_as_they_are(tmp_path: Path) -> None:
    writer = AppendScores(tmp_path)
    writer.append(0, 0, torch.zeros(1, 1))
    writer.flush()
    writer.append(1, 0, torch.zeros(1, 1))
    writer.append(2, 0, torch.zeros(1, 1))
    path = tmp_path / "mixture_scores.pt"
    path.write_bytes(path.read_bytes()[:-1])
    before = snapshot(tmp_path)
    assert [entry["step"] for entry in read_scores(str(tmp_path))] == [0, 1]
    assert snapshot(tmp_path) == before
    writer.close()


@pytest.mark.parametrize("damage", [False, True])
def test_read_scores_changes_no_file(tmp_path: Path, damage: bool) -> None:
    writer = AppendScores(tmp_path)
    for step in range(3):
        writer.append(step, 0, torch.zeros(1, 1))
    writer.close()
    path = tmp_path / "mixture_scores.pt"
    if damage:
        data = path.read_bytes()
        path.write_bytes(data[:800] + bytes(100) + data[900:])
    before = snapshot(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said of the damage
        assert [entry["step"] for entry in read_scores(tmp_path)] == ([0, 2] if damage else [0, 1, 2])
    assert snapshot(tmp_path) == before


def test_read_scores_gives_tensors_of_their_own(tmp_path: Path) -> None:
    writer = AppendScores(tmp_path)
    writer.append(0, 0, torch.zeros(2, 2))
    writer.close()
    read_scores(tmp_path)[0]["responsibilities"].add_(1)
    assert not read_scores(tmp_path)[0]["responsibilities"].any()


def test_read_scores_of_an_empty_list_is_empty(tmp_path: Path) -> None:
    torch.save([], tmp_path / "mixture_scores.pt")
    assert read_scores(tmp_path) == []


def test_read_scores_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must hold `mixture_scores.pt` or .* was `store_scores` on\?"):
        read_scores(tmp_path)


@pytest.mark.parametrize("content", [b"not a checkpoint", b"PK\3\4" + bytes(range(256)) * 20], ids=["text", "zip"])
def test_read_scores_says_what_is_foreign(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mixture_scores.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"scores.pt` must hold .*, got something else; move the file away"):
        read_scores(tmp_path)


def test_read_scores_leaves_a_damaged_shard_out(tmp_path: Path) -> None:
    for step in range(3):
        PerStepScores(tmp_path).append(step, 0, torch.zeros(2, 2))
    (tmp_path / "mixture_scores" / "step_000001.pt").write_bytes(b"?")
    with pytest.warns(UserWarning, match=r"step_000001.pt` must hold one entry .* It was left out."):
        assert [entry["step"] for entry in read_scores(tmp_path)] == [0, 2]


def test_read_scores_says_what_stands_behind_the_end(tmp_path: Path) -> None:
    writer = AppendScores(tmp_path)
    writer.append(0, 0, torch.zeros(2, 2))
    writer.close()
    path = tmp_path / "mixture_scores.pt"
    path.write_bytes(path.read_bytes() * 2)
    with pytest.warns(UserWarning, match=rf"has {path.stat().st_size // 2} bytes behind its end; they were left out"):
        assert len(read_scores(tmp_path)) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize(("name", "read"), [("mixture.csv", read_log), ("mixture_scores.pt", read_scores)])
def test_reading_a_pipe_is_refused(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}` must "):
        read(tmp_path)
