"""Snapshots and the last mixture: what is in their files, what a resumed run sets aside, and a disk that fails."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mixture_torch import read_snapshots
from tests.files.recording import Writer, broken, places, said
from tests.wrapper.samples import contents


def snapshot(step: int, epoch: int = 0, value: float = 1.0) -> dict[str, Any]:
    """A snapshot whose tensor is a view of a large one."""
    view = torch.full((1_000_000,), value, dtype=torch.float64)[:4].reshape(2, 2).T
    return {"step": step, "epoch": epoch, "rankme": value, "means": view}


def found(folder: Path) -> list[tuple[int, int, float]]:
    """Epoch, step and value of all snapshots."""
    return [(each["epoch"], each["step"], float(each["means"][1, 1])) for each in read_snapshots(folder)]


def test_snapshot_is_one_small_file_that_torch_loads(tmp_path: Path) -> None:
    (one := Writer(tmp_path)).log(3)
    one.write_snapshot(entry := snapshot(3))
    entry["means"].zero_()  # its owner may change it
    path = tmp_path / "mixture_snapshots" / "step_000003.pt"
    assert path.stat().st_size < 10_000
    loaded = torch.load(path, weights_only=True)
    assert (loaded["step"], loaded["epoch"], loaded["rankme"]) == (3, 0, 1.0)
    assert torch.equal(loaded["means"], torch.ones(2, 2, dtype=torch.float64))
    one.close()


def test_read_snapshots_orders_by_epoch_and_step_and_leaves_out_damaged_ones(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no `mixture_snapshots/"):
        read_snapshots(tmp_path)
    (one := Writer(tmp_path)).log(0)
    for epoch, step in ((1, 2), (0, 1_000_000), (0, 7), (0, 8), (0, 9)):
        one.write_snapshot(snapshot(step, epoch))
    one.close()
    (tmp_path / "mixture_snapshots" / "step_000008.pt").write_bytes(b"?")
    torch.save({"step": 9, "responsibilities": 1}, tmp_path / "mixture_snapshots" / "step_000009.pt")
    with said() as messages:
        assert found(tmp_path) == [(0, 7, 1.0), (0, 1_000_000, 1.0), (1, 2, 1.0)]
    assert [message.split("` ", 1)[1] for message in messages] == [
        "is not a snapshot of a mixture; move the file away or choose another `log_dir`. The file was left out."
    ] * 2


def test_resumed_run_sets_snapshots_aside_under_the_number_of_the_log(tmp_path: Path) -> None:
    (one := Writer(tmp_path)).log(0, 1, 2)
    for step in range(3):
        one.write_snapshot(snapshot(step))
    one.close()
    with said() as messages:
        (one := Writer(tmp_path, resumes=True)).log(1)
        one.write_snapshot(snapshot(1, value=2.0))
        one.close()
    assert messages == [
        f"`{tmp_path}` is resumed at step 1 of epoch 0: 2 later rows and 0 entries of responsibilities were moved to "
        "`mixture.superseded-1.csv` and `mixture_snapshots.superseded-1`."
    ]
    assert found(tmp_path) == [(0, 0, 1.0), (0, 1, 2.0)]
    aside = sorted((tmp_path / "mixture_snapshots.superseded-1").iterdir())
    assert [float(torch.load(path)["rankme"]) for path in aside] == [1.0, 1.0]


def test_snapshots_wait_in_the_order_of_the_rows_and_at_most_16_of_them(tmp_path: Path) -> None:
    one = Writer(tmp_path)
    with said(), broken("write"):
        for step in range(20):
            one.log(step)
            one.write_snapshot(snapshot(step))
        one.resumes = True
        one.log(18)  # sets aside the snapshots that wait before it
        one.write_snapshot(snapshot(18, value=2.0))
    with said():
        one.flush()
    assert found(tmp_path) == [*((0, step, 1.0) for step in range(5, 18)), (0, 18, 2.0)]
    assert len(list((tmp_path / "mixture_snapshots.superseded-1").iterdir())) == 2
    assert [step for _, step in places(tmp_path)] == list(range(19))
    one.close()


def test_close_counts_snapshots_that_wait_alone(tmp_path: Path) -> None:
    (one := Writer(tmp_path)).log(0)
    (tmp_path / "mixture_snapshots").write_bytes(b"in the way")
    with said() as messages:
        one.write_snapshot(snapshot(0))
        one.close(for_good=True)
    assert messages[-1].endswith(": 1 snapshots are lost.")


def test_nothing_is_written_for_a_recorder_without_rows(tmp_path: Path) -> None:
    one = Writer(tmp_path / "run")
    one.write_snapshot(snapshot(0))
    one.close(last={"pi": torch.ones(2)})
    assert not (tmp_path / "run").exists()
    one.log(0)
    one.close()
    before = contents(tmp_path)
    one.write_snapshot(snapshot(0))
    one.close(last={"pi": torch.ones(2)})
    assert contents(tmp_path) == before


def last(folder: Path) -> float:
    return float(torch.load(folder / "mixture_last.pt", weights_only=True)["weight"][0])


def state(value: float) -> dict[str, Any]:
    return {"version": 1, "mode": "ema", "weight": torch.full((3,), value)}


def test_last_mixture_is_replaced_at_each_close_and_never_incomplete(tmp_path: Path) -> None:
    one, replace = Writer(tmp_path), os.replace
    for value in (1.0, 2.0):
        one.log(int(value))
        one.close(last=state(value))
        assert last(tmp_path) == value
        assert not (tmp_path / "mixture.lock").read_bytes()
    one.log(3)
    with pytest.MonkeyPatch.context() as patch:

        def interrupted(*paths: Path) -> None:
            assert last(tmp_path) == 2.0
            patch.setattr(os, "replace", replace)
            raise KeyboardInterrupt

        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.close(last=state(3.0))
    assert last(tmp_path) == 2.0
    one.flush()
    assert last(tmp_path) == 3.0
    assert set(contents(tmp_path)) == {"mixture.csv", "mixture_last.pt"}


@pytest.mark.parametrize("later", ["flush", "close"])
def test_last_mixture_waits_for_a_disk_that_fails(tmp_path: Path, later: str) -> None:
    (one := Writer(tmp_path)).log(0)
    with said() as messages, broken("write"):
        one.close(last=state(1.0))
    assert len(messages) == 1
    assert not (tmp_path / "mixture_last.pt").exists()
    with said() as messages:
        getattr(one, later)()
    assert messages == []
    assert last(tmp_path) == 1.0


@pytest.mark.parametrize("in_the_way", ["mixture_snapshots", "mixture_snapshots/step_000001.pt"])
def test_snapshot_that_cannot_be_written_holds_up_no_rows(tmp_path: Path, in_the_way: str) -> None:
    (foreign := tmp_path / in_the_way).parent.mkdir(exist_ok=True)
    foreign.write_bytes(b"?")
    one = Writer(tmp_path)
    with said() as messages:
        for step in range(3):
            one.log(step)
            one.write_snapshot(snapshot(step))
    assert len(messages) == 1
    assert [step for _, step in places(tmp_path)] == [0, 1, 2]
    foreign.unlink()
    one.close()
    assert found(tmp_path) == [(0, step, 1.0) for step in range(3)]


def test_resumed_run_goes_on_without_snapshots_that_it_may_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one := Writer(tmp_path)).K = 2
    one.log(0)
    one.write_snapshot(snapshot(0))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(torch, "load", refuse)
    rows, snapshots = one.read(before=(0, 1))
    assert ([row["step"] for row in rows], snapshots) == ([0], [])
