"""One file per step: what is in it, what it replaces, and which are set aside."""

import os
from pathlib import Path

import pytest
import torch

from mixture_torch import read_log, read_scores
from mixture_torch.files.shards import ShardFolder, load_entry, score_entry
from tests.files.recording import said
from tests.wrapper.samples import contents, estimator, log_steps

R = torch.full((3, 2), 0.5)


def write(folder: Path, *positions: tuple[int, int], say: list[str] | None = None) -> ShardFolder:
    """Writes an entry for each (epoch, step)."""
    shards = ShardFolder(folder / "mixture_scores", load_entry, say=[].append if say is None else say.append)
    for epoch, step in positions:
        shards.write(score_entry(step, epoch, R))
    return shards


def found(folder: Path) -> list[tuple[int, int]]:
    return [(entry["epoch"], entry["step"]) for entry in read_scores(folder)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shard_is_one_entry_that_torch_loads(tmp_path: Path, dtype: torch.dtype) -> None:
    view = torch.arange(2_000_000.0, dtype=dtype).reshape(2, 1_000_000).T[::400_000].requires_grad_()
    write(tmp_path).write(score_entry(123, 4, view))
    assert list(contents(tmp_path)) == ["mixture_scores/step_000123.pt"]
    path = tmp_path / "mixture_scores" / "step_000123.pt"
    assert path.stat().st_size < 10_000  # without what it is a view of
    entry = torch.load(path)
    assert (entry["step"], entry["epoch"], entry["responsibilities"].dtype) == (123, 4, torch.float32)
    assert entry["responsibilities"].tolist() == view.tolist()


def test_shards_that_are_replaced_are_warned_about_once(tmp_path: Path) -> None:
    write(tmp_path, (0, 1), (0, 2))
    messages: list[str] = []
    write(tmp_path, (9, 0), (9, 1), (9, 2), say=messages)
    assert messages == [
        f"`{tmp_path / 'mixture_scores' / 'step_000001.pt'}` existed and was replaced; later steps replace their files "
        "without a warning."
    ]
    assert found(tmp_path) == [(9, 0), (9, 1), (9, 2)]


def test_shard_leaves_a_file_that_is_no_entry(tmp_path: Path) -> None:
    path = tmp_path / "mixture_scores" / "step_000001.pt"
    path.parent.mkdir()
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"step_000001.pt` is not one entry of responsibilities; move the file away"):
        write(tmp_path, (0, 1))
    assert path.read_bytes() == b"mine"


def test_killed_processes_leave_one_temporary_shard_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(SystemExit))
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process cleans nothing up
        for step in range(3):
            with pytest.raises(SystemExit):
                write(tmp_path, (0, step))
    assert len(contents(tmp_path)) == 1
    write(tmp_path, (0, 7))
    assert list(contents(tmp_path)) == ["mixture_scores/step_000007.pt"]


def test_read_scores_orders_shards_by_step_and_leaves_out_damaged_ones(tmp_path: Path) -> None:
    write(tmp_path, (0, 999_999), (0, 1_000_000), (0, 5), (0, 6))
    (tmp_path / "mixture_scores" / "step_000006.pt").write_bytes(b"?")
    with said() as messages:
        assert found(tmp_path) == [(0, 5), (0, 999_999), (0, 1_000_000)]
    assert [message.endswith("The file was left out.") for message in messages] == [True]


@pytest.mark.parametrize(
    ("position", "steps", "kept"),
    [
        ((1, 3), set(), [(0, 0), (1, 2), (0, 7)]),
        ((0, 9), {3, 4}, [(0, 0), (0, 7)]),  # later epochs may have smaller steps, which the log knows
        ((9, 0), set(), [(0, 0), (1, 2), (1, 3), (2, 4), (0, 7)]),
    ],
)
def test_supersede_moves_shards_at_or_behind_a_position(
    tmp_path: Path, position: tuple[int, int], steps: set[int], kept: list[tuple[int, int]]
) -> None:
    everything = [(0, 0), (1, 2), (1, 3), (2, 4), (0, 7)]
    shards = write(tmp_path, *everything)
    before = contents(tmp_path)
    count = shards.supersede(position, 3, steps=steps | {2} if steps else steps)
    assert (count, found(tmp_path)) == (5 - len(kept), kept)
    assert sorted(contents(tmp_path).values()) == sorted(before.values())
    aside = tmp_path / "mixture_scores.superseded-3"
    assert len(list(aside.glob("*"))) == count


def test_supersede_reads_no_shard_before_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, read, load = write(tmp_path, *((0, step) for step in range(50))), [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **options: (read.append(path.name), load(path, **options))[1])
    assert shards.supersede((0, 48), 1, steps=set()) == 2
    assert read == ["step_000048.pt", "step_000049.pt"]


def test_rows_go_on_when_a_foreign_shard_is_moved_away(tmp_path: Path) -> None:
    path = tmp_path / "mixture_scores" / "step_000001.pt"
    path.parent.mkdir()
    path.write_bytes(b"foreign")
    with said(), estimator(log_dir=tmp_path, store_scores=True, scores_mode="per_step") as wrapper:
        log_steps(wrapper, 3)
        path.rename(tmp_path / "elsewhere")
    assert read_log(tmp_path)["step"].tolist() == [0, 1, 2]
    assert found(tmp_path) == [(0, 0), (0, 1), (0, 2)]
