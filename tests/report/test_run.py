"""`read_run` takes every folder: whole, torn, foreign, of several runs, with hostile text."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixture_torch import MixtureStats, read_run
from mixture_torch.report.run import read_runs
from tests.report.logs import healthy, write


def train(folder: Path, steps: range, *, K: int = 3, epoch: int = 0) -> None:
    with MixtureStats(K=K, enabled=True, log_dir=folder) as estimator:
        for step in steps:
            estimator.update(torch.randn(128, 8, generator=torch.Generator().manual_seed(step)))
            estimator.log_step(step=step, epoch=epoch)
        estimator.flush()


def test_run_has_all_parts(tmp_path: Path) -> None:
    train(tmp_path, range(5))
    (tmp_path / "config.yaml").write_text("K: 3")
    run = read_run(tmp_path)
    assert run.extra is not None
    assert run.last is not None
    assert (len(run.log["step"]), run.extra["pi"].shape, len(run.snapshots)) == (5, (5, 3), 1)
    assert (run.last["K"], run.D, run.config, run.missing) == (3, 8, "K: 3", ())


def test_every_cut_of_the_files_is_read(tmp_path: Path) -> None:
    train(tmp_path, range(3))
    snapshot = next((tmp_path / "mixture_snapshots").iterdir())
    for path in (tmp_path / "mixture.csv", tmp_path / "mixture_extra.csv", snapshot, tmp_path / "mixture_last.pt"):
        whole = path.read_bytes()
        for size in {*range(0, len(whole), max(1, len(whole) // 20)), len(whole) - 1}:
            path.write_bytes(whole[:size])
            read_run(tmp_path)
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["mixture_extra.csv", "mixture_last.pt", "mixture_snapshots/step_000002.pt"])
def test_foreign_part_is_said_in_one_line(tmp_path: Path, name: str) -> None:
    train(tmp_path, range(3))
    (tmp_path / name).write_bytes(b"\x1b[31m\nsomething else\n")
    run = read_run(tmp_path)
    assert run.missing
    assert all(sentence.isprintable() for sentence in run.missing)


def test_foreign_log_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mixture.csv").write_bytes(b"\x1b]0;title\x07,loss\n1,2\n")
    with pytest.raises(ValueError, match="begins with") as caught:
        read_run(tmp_path)
    assert str(caught.value).isprintable()


def test_folder_with_the_log_alone_says_what_is_missing(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, healthy(3), extra=False))
    assert (run.extra, run.snapshots, run.last, run.D, run.alarms) == (None, (), None, None, ())
    assert [word in " ".join(run.missing) for word in ("mixture_extra.csv", "mixture_snapshots")] == [True, True]


@pytest.mark.filterwarnings("ignore:.* already has rows")
def test_second_run_in_a_folder_is_the_one_that_is_shown(tmp_path: Path) -> None:
    train(tmp_path, range(50))
    train(tmp_path, range(20))
    run = read_run(tmp_path)
    assert run.extra is not None
    assert run.log["step"].tolist() == run.extra["step"].tolist() == list(range(20))
    assert "2 runs: steps go back to 0 in row 51" in run.missing[0]
    assert [entry["step"] for entry in run.snapshots] == [19]


@pytest.mark.filterwarnings("ignore:.* was moved to")
def test_change_of_K_begins_another_run(tmp_path: Path) -> None:
    train(tmp_path, range(10))
    train(tmp_path, range(10, 20), K=5)
    run = read_run(tmp_path)
    assert run.extra is not None
    assert (run.log["K"].tolist(), run.extra["pi"].shape) == ([5] * 10, (10, 5))
    assert "K changes to 5 in row 11" in run.missing[0]


@pytest.mark.filterwarnings("ignore:.* existed and was replaced")
def test_steps_that_begin_anew_in_each_epoch_are_counted_on(tmp_path: Path) -> None:
    for epoch in range(3):
        train(tmp_path, range(4), epoch=epoch)
    run = read_run(tmp_path)
    assert run.extra is not None
    assert run.log["step"].tolist() == run.extra["step"].tolist() == list(range(12))
    assert [entry["step"] for entry in run.snapshots] == [11]
    assert isinstance(run.snapshots[0]["step"], int)  # the page writes it as JSON
    assert "renumbered" in " ".join(run.missing)


def test_names_are_different_and_printable(tmp_path: Path) -> None:
    folders = [tmp_path / part for part in ("a/run", "b/run", "c/\x1b[31m<b>")]
    for folder in folders:
        write(folder, healthy(3), extra=False)
    runs = read_runs(*folders, read_run(folders[0]))
    names = [run.name for run in runs]
    assert len(set(names)) == 4
    assert all(name.isprintable() and not name.startswith("//") for name in names)
    assert [run.name for run in read_runs(*folders[:2])] == ["a/run", "b/run"]


def test_configuration_that_is_no_text_is_read(tmp_path: Path) -> None:
    write(tmp_path, healthy(3), extra=False)
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe" + bytes(300_000))
    config = read_run(tmp_path).config
    assert config is not None
    assert len(config) == 100_000


def test_snapshot_of_other_shapes_is_left_out(tmp_path: Path) -> None:
    train(tmp_path, range(3))
    path = tmp_path / "mixture_snapshots" / "step_000002.pt"
    entry = torch.load(path)
    torch.save({**entry, "axes": torch.zeros(5)}, path)
    run = read_run(tmp_path)
    assert run.snapshots == ()
    assert np.isfinite(run.log["trace_B"]).all()


@pytest.mark.parametrize(
    "figure",
    [
        {"effective_rank": torch.ones(2)},
        {"excess": torch.ones(2)},
        {"excess": 10**400},
        {"weight": torch.ones(3, requires_grad=True)},
        {"plane_mean": torch.ones(3, 2).to_sparse()},
        {"axes": torch.ones(2, 0), "spectrum_T": torch.ones(0), "spectrum_B": torch.ones(0)},
    ],
)
def test_snapshot_without_usable_figures_is_left_out(tmp_path: Path, figure: dict[str, Any]) -> None:
    train(tmp_path, range(3))
    path = tmp_path / "mixture_snapshots" / "step_000002.pt"
    torch.save(torch.load(path) | figure, path)
    assert read_run(tmp_path).snapshots == ()


def test_rows_of_another_run_are_left_out(tmp_path: Path) -> None:
    columns = healthy(60)
    write(tmp_path, columns | {"step": 1000 + columns["step"]})
    write(tmp_path, columns, extra=False)
    run = read_run(tmp_path)
    assert run.extra is None
    assert "`mixture_extra.csv` has no rows of this run." in run.missing


def test_empty_part_has_no_other_K(tmp_path: Path) -> None:
    write(tmp_path, healthy(3))
    (tmp_path / "mixture_extra.csv").write_bytes(b"")
    assert "another K" not in " ".join(read_run(tmp_path).missing)


def test_damaged_counts_raise_no_alarm(tmp_path: Path) -> None:
    columns = healthy(60)
    columns["n"][50, 0] = -1.0
    columns["n_rows"][51] = -5
    assert read_run(write(tmp_path, columns)).alarms == ()


def test_state_before_the_first_update_has_no_width(tmp_path: Path) -> None:
    write(tmp_path, healthy(30))
    torch.save(MixtureStats(K=6, enabled=True).state_dict(), tmp_path / "mixture_last.pt")
    assert read_run(tmp_path).D is None
