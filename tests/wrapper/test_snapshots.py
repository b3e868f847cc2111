"""Snapshots of an estimator: when they are taken, what is in them, and what must not end a run."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mixture_core import readings
from mixture_torch import read_snapshots
from tests.wrapper.samples import contents, estimator, mixture


def test_snapshots_come_at_each_flush_or_every_so_many_steps(tmp_path: Path) -> None:
    for every, expected in ((None, [3, 5]), (2, [1, 3, 5])):
        with estimator(log_dir=tmp_path / str(every), snapshot_every=every) as wrapper:
            for step in range(6):
                wrapper.update(mixture(seed=step)[0])
                wrapper.log_step(step=step, epoch=0)
                if step in (3, 5):
                    wrapper.flush()
                    wrapper.flush()
        entries = read_snapshots(tmp_path / str(every))
        assert [entry["step"] for entry in entries] == expected
    m = wrapper.state.moments  # type: ignore[union-attr]
    entry = entries[-1]
    torch.testing.assert_close(entry["spectrum_T"], readings.spectrum(m))
    torch.testing.assert_close(entry["weight"], m.weight)
    torch.testing.assert_close(entry["axes"] @ entry["axes"].mT, torch.eye(2))
    on_plane = entry["plane_mean"].T @ (m.pi[:, None] * entry["plane_mean"])
    torch.testing.assert_close(torch.linalg.eigvalsh(on_plane).flip(0), entry["spectrum_B"][:2])
    assert all((a["axes"] * b["axes"]).sum() > 1.5 for a, b in itertools.pairwise(entries))


def test_one_component_has_no_excess_that_could_raise_an_alarm(tmp_path: Path) -> None:
    with estimator(K=1, log_dir=tmp_path, snapshot_every=100) as wrapper:
        for step in range(100):
            wrapper.update(mixture(seed=step)[0])
            wrapper.log_step(step=step, epoch=0)
    assert math.isnan(read_snapshots(tmp_path)[0]["excess"])


def test_snapshot_that_fails_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr("mixture_torch.journal.snapshot", fail)
    wrapper = estimator(log_dir=tmp_path)
    wrapper.update(mixture()[0])
    wrapper.log_step(step=0, epoch=0)
    with pytest.warns(UserWarning, match="No snapshot could be taken at step 0: did not converge"):
        wrapper.flush()


def test_loaded_state_is_no_snapshot_of_the_row_before(tmp_path: Path) -> None:
    wrapper = estimator(log_dir=tmp_path)
    wrapper.update(mixture()[0])
    state_dict = wrapper.state_dict()
    wrapper.log_step(step=0, epoch=0)
    wrapper.load_state_dict(state_dict)
    wrapper.flush()
    assert not (tmp_path / "mixture_snapshots").exists()


def test_snapshots_come_even_if_not_each_step_is_logged(tmp_path: Path) -> None:
    with estimator(log_dir=tmp_path, snapshot_every=10) as wrapper:
        for step in range(31):
            wrapper.update(mixture(seed=step)[0])
            if step % 5 == 0:
                wrapper.log_step(step=step, epoch=0)
    assert [entry["step"] for entry in read_snapshots(tmp_path)] == [10, 20, 30]


def test_resumed_run_has_the_snapshots_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def run(folder: Path, steps: range, state_dict: dict[str, Any] | None = None) -> dict[str, Any]:
        with estimator(log_dir=folder, snapshot_every=30) as wrapper:
            if state_dict is not None:
                wrapper.load_state_dict(state_dict)
            for step in steps:
                wrapper.update(mixture(seed=step)[0])
                wrapper.log_step(step=step, epoch=0)
            return wrapper.state_dict()

    run(tmp_path / "whole", range(125))
    run(tmp_path / "resumed", range(110, 125), run(tmp_path / "resumed", range(110)))
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def test_copies_for_files_that_fit_no_memory_end_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    wrapper = estimator(log_dir=tmp_path)
    wrapper.update(mixture()[0])
    wrapper.log_step(step=0, epoch=0)
    monkeypatch.setattr("mixture_torch.views.completed", fail)
    with pytest.warns(UserWarning, match="No snapshot could be taken at step 0: no memory"):
        wrapper.flush()
    monkeypatch.setattr("mixture_torch.views.to_state_dict", fail)
    with pytest.warns(UserWarning, match=r"`mixture_last.pt` was not written: no memory"):
        wrapper.close()
    assert not (tmp_path / "mixture.lock").read_bytes()
