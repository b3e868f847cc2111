"""What is in the run folder, and on which rank."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from mixture_torch import read_log, read_scores
from tests.tolerances import FLOAT64, relative_error
from tests.wrapper.samples import contents, estimator, log_steps, mixture

HEADER = "step,epoch,K,pi_min,pi_max,trace_B,opnorm_B"


def test_csv_begins_with_the_header_of_the_specification(tmp_path: Path) -> None:
    with estimator(log_dir=tmp_path) as wrapper:
        log_steps(wrapper)
    assert (tmp_path / "mixture.csv").read_bytes().startswith(f"{HEADER}\n".encode())


def test_csv_has_one_row_a_step(tmp_path: Path) -> None:
    with estimator(log_dir=tmp_path) as wrapper:
        log_steps(wrapper, 5, epoch=2)
    rows = [line.split(",")[:3] for line in (tmp_path / "mixture.csv").read_text().splitlines()[1:]]
    assert rows == [[str(step), "2", "3"] for step in range(5)]


def test_csv_row_is_in_the_file_when_log_step_returns(tmp_path: Path) -> None:
    wrapper = estimator(log_dir=tmp_path)
    for step in range(3):
        wrapper.update(mixture()[0])
        wrapper.log_step(step=step, epoch=0)
        assert read_log(tmp_path)["step"].tolist() == list(range(step + 1))


def test_csv_figures_are_those_of_the_stats_with_nine_digits(tmp_path: Path) -> None:
    with estimator(log_dir=tmp_path) as wrapper:
        found = log_steps(wrapper)
    rows = [line.split(",")[3:] for line in (tmp_path / "mixture.csv").read_text().splitlines()[1:]]
    figures = [[s["pi"].min(), s["pi"].max(), s["trace_B"], s["opnorm_B"]] for s in found]
    assert rows == [[f"{float(figure):.9g}" for figure in row] for row in figures]


def test_csv_gives_float32_back_to_the_bit(tmp_path: Path) -> None:
    with estimator(log_dir=tmp_path) as wrapper:
        found = log_steps(wrapper)
    assert read_log(tmp_path)["trace_B"].astype("float32").tolist() == [float(stats["trace_B"]) for stats in found]


def test_csv_row_is_of_the_stats_that_are_given(tmp_path: Path) -> None:
    with estimator(log_dir=tmp_path) as wrapper:
        first = wrapper.update(mixture()[0])
        wrapper.update(mixture(seed=1)[0] * 3)
        wrapper.log_step(step=0, epoch=0, stats=first)
        wrapper.log_step(step=1, epoch=0, stats=dict(first))
        wrapper.log_step(step=2, epoch=0)
    trace_B = [float(first["trace_B"])] * 2 + [float(wrapper.stats["trace_B"])]
    assert relative_error(torch.tensor(read_log(tmp_path)["trace_B"]), torch.tensor(trace_B)) < 1e-8


def test_log_step_takes_integers_of_any_kind(tmp_path: Path) -> None:
    with estimator(log_dir=tmp_path) as wrapper:
        stats = wrapper.update(mixture()[0])
        wrapper.log_step(step=torch.tensor(7), epoch=stats["R"].sum().long().numpy()[()], stats=stats)  # type: ignore[arg-type]
    assert (read_log(tmp_path)["step"].tolist(), read_log(tmp_path)["epoch"].tolist()) == ([7], [60])


@pytest.mark.parametrize("scores_mode", ["append", "per_step"])
def test_scores_are_the_responsibilities_of_every_step(tmp_path: Path, scores_mode: str) -> None:
    with estimator(log_dir=tmp_path, store_scores=True, scores_mode=scores_mode) as wrapper:
        found = log_steps(wrapper, epoch=4)
    entries = [(entry["step"], entry["epoch"], entry["responsibilities"].tolist()) for entry in read_scores(tmp_path)]
    assert entries == [(step, 4, stats["R"].tolist()) for step, stats in enumerate(found)]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"mixture.csv"}),
        ({"store_scores": True}, {"mixture.csv", "mixture_scores.pt"}),
        (
            {"store_scores": True, "scores_mode": "per_step"},
            {"mixture.csv", *(f"mixture_scores/step_00000{step}.pt" for step in range(3))},
        ),
    ],
)
def test_run_folder_holds_nothing_else(tmp_path: Path, options: dict[str, Any], names: set[str]) -> None:
    with estimator(log_dir=tmp_path / "new" / "run", **options) as wrapper:
        log_steps(wrapper)
    assert set(contents(tmp_path / "new" / "run")) == names


def test_folder_is_not_made_before_the_first_row(tmp_path: Path) -> None:
    with estimator(log_dir=tmp_path / "run", store_scores=True) as wrapper:
        wrapper.update(mixture()[0])
        wrapper.flush()
    assert not (tmp_path / "run").exists()


def test_estimator_without_a_folder_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with estimator() as wrapper:
        log_steps(wrapper)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("as_text", [True, False])
def test_folder_is_taken_as_path_and_as_text(tmp_path: Path, as_text: bool) -> None:
    with estimator(log_dir=str(tmp_path) if as_text else tmp_path) as wrapper:
        log_steps(wrapper)
    assert len(read_log(tmp_path)["step"]) == 3


@pytest.mark.parametrize("store_scores", [True, False])
def test_other_ranks_write_nothing(tmp_path: Path, store_scores: bool) -> None:
    with estimator(log_dir=tmp_path / "run", store_scores=store_scores, is_main=False) as wrapper:
        log_steps(wrapper)
        wrapper.flush()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("finish", ["flush", "close", "collect"])
def test_other_ranks_leave_the_files_of_the_main_rank(tmp_path: Path, finish: str) -> None:
    main = estimator(log_dir=tmp_path, store_scores=True, is_main=True)
    other = estimator(log_dir=tmp_path, store_scores=True, is_main=False)
    log_steps(main)
    log_steps(other)
    before = contents(tmp_path)
    if finish == "collect":
        del other
        gc.collect()
    else:
        getattr(other, finish)()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("rank", "writes"), [("0", True), ("1", False), ("", True), (None, True)])
def test_main_rank_is_that_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str | None, writes: bool
) -> None:
    with estimator(log_dir=tmp_path / "run") as wrapper:
        # After the estimator is made: it is decided at the first write.
        monkeypatch.delenv("RANK", raising=False) if rank is None else monkeypatch.setenv("RANK", rank)
        log_steps(wrapper)
    assert (tmp_path / "run").exists() is writes


def test_is_main_outweighs_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with estimator(log_dir=tmp_path, is_main=True) as wrapper:
        log_steps(wrapper)
    assert len(read_log(tmp_path)["step"]) == 3


def test_wrong_batch_leaves_the_files_as_they_are(tmp_path: Path) -> None:
    wrapper = estimator(log_dir=tmp_path, store_scores=True)
    log_steps(wrapper)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="embeddings"):
        wrapper.update(mixture()[0][0])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["mixture.csv", "mixture_scores.pt"])
def test_foreign_files_are_left_as_they_are(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"step,loss\n0,1.5\n")
    wrapper = estimator(log_dir=tmp_path, store_scores=True)
    wrapper.update(mixture()[0])
    with pytest.raises(ValueError, match=rf"{name}` must "):
        wrapper.log_step(step=0, epoch=0)
    assert (tmp_path / name).read_bytes() == b"step,loss\n0,1.5\n"


def test_figures_of_one_component_are_those_of_no_spread_between(tmp_path: Path) -> None:
    with estimator(K=1, log_dir=tmp_path) as wrapper:
        log_steps(wrapper, 1)
    row = {key: float(column[0]) for key, column in read_log(tmp_path).items()}
    assert (row["pi_min"], row["pi_max"]) == (1.0, 1.0)
    assert max(row["trace_B"], row["opnorm_B"]) < FLOAT64
