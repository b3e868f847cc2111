"""The runs of the failures benchmark do what they say, and the figures of others are what their papers define."""

import math
import shutil
from collections import Counter
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch

from benchmarks.failures import kinds, limits, others, score
from benchmarks.failures.runs import Record
from benchmarks.failures.training import Setting, Training
from mixture_torch import read_log, read_run
from tests.report.logs import healthy, lose, write

SETTING = Setting("SimCLR", "mlp", "digits")


@pytest.fixture
def run(tmp_path: Path) -> Training:
    return Training(SETTING, 0, tmp_path / "run")


def drawn(run: Training, steps: int) -> Counter[int]:
    """How often each class is drawn."""
    return Counter(int(label) for _ in range(steps) for label in run.data.labels[run.draw()])


def test_forked_run_goes_on_as_the_run_itself(run: Training, tmp_path: Path) -> None:
    run.run(12)
    run.estimator.flush()
    shutil.copytree(tmp_path / "run", tmp_path / "fork")
    fork = Training(SETTING, 0, tmp_path / "fork")
    fork.load_state_dict(run.state_dict())
    for one in (run, fork):
        one.run(24)
        one.estimator.close()
    assert fork.figures == run.figures
    logs = [read_log(tmp_path / name) for name in ("run", "fork")]
    assert all(np.array_equal(logs[0][name], logs[1][name]) for name in logs[0])


@pytest.mark.parametrize("n", [1, 3])
def test_classes_that_are_gone_are_not_drawn(run: Training, n: int) -> None:
    run.run(1)
    kinds.classes_gone(n)(run)
    assert len(drawn(run, 6)) == 10 - n
    assert not set(run.gone) & set(drawn(run, 6))
    assert len(run.holders()) == n


def test_one_image_stands_for_its_class(run: Training) -> None:
    kinds.one_image(run)
    rows = torch.cat([run.draw() for _ in range(6)])
    images = [len(rows[run.data.labels[rows] == label].unique()) for label in range(10)]
    assert sorted(images)[0] == 1 < sorted(images)[1]


def test_unshuffled_classes_come_in_order(run: Training) -> None:
    kinds.unshuffled(run)
    labels = run.data.labels[run.draw()]
    assert (labels.diff() >= 0).all()


def test_drifting_classes_end_with_other_weights(run: Training) -> None:
    kinds.drifting(run)
    run.step += kinds.DRIFT
    counts = drawn(run, 20).values()
    assert max(counts) > 10 * min(counts)


def test_learning_rate_stays_changed(run: Training) -> None:
    run.run(2)
    before = run.optimizer.param_groups[0]["lr"]
    kinds.learning_rate(30.0)(run)
    run.run(4)
    assert 29 * before < run.optimizer.param_groups[0]["lr"] <= 30 * before


def test_frozen_layer_keeps_its_weights(run: Training) -> None:
    kinds.frozen_layer(run)
    first = next(iter(run.network.encoder.children()))
    before = [parameter.clone() for parameter in first.parameters()]
    run.run(2)
    assert all(torch.equal(a, b) for a, b in zip(before, first.parameters(), strict=True))


@pytest.mark.parametrize("name", kinds.KINDS)
def test_every_kind_can_begin_in_mid_run(run: Training, name: str) -> None:
    run.run(2)
    kinds.KINDS[name].begin(run)
    run.run(4)
    assert all(math.isfinite(row["loss"]) for row in run.figures)


def test_ranks_of_others_count_equal_directions() -> None:
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(4000, 8, dtype=torch.float64))
    z = basis * math.sqrt(4000)
    noise = 1e-3 * torch.randn_like(z)
    assert others.rankme(z) == pytest.approx(8, abs=0.01)
    assert others.lidar(z + noise, z - noise) == pytest.approx(8, abs=0.05)
    flat = z * torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0])
    assert others.figures(flat.float(), flat.float())["effective rank"] == pytest.approx(3, abs=0.01)


def test_alpha_is_the_exponent_of_a_power_law() -> None:
    spectrum = torch.arange(1, 33, dtype=torch.float64) ** -1.3
    assert others.alpha_req(spectrum) == pytest.approx(1.3)


def test_uniformity_and_alignment_of_known_points() -> None:
    z1 = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    z2 = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    # Of six pairs, two are 2 apart and four sqrt(2).
    assert others.uniformity(torch.cat([z1, z2])) == pytest.approx(math.log((2 * math.exp(-8) + 4 * math.exp(-4)) / 6))
    assert others.figures(z1, z2)["alignment"] == pytest.approx(2.0)


def test_deviation_needs_two_rows_in_succession() -> None:
    values = np.sin(np.arange(100.0))
    once, twice = values.copy(), values.copy()
    once[70] += 50
    twice[70:] += 50
    assert score.deviation(once)[60:80].max() < 5
    assert np.flatnonzero(score.deviation(twice) > 5)[0] == 71


def test_component_that_loses_its_class_is_emptied_and_named(tmp_path: Path) -> None:
    columns, onset = healthy(200, 10, N=1000), 100
    lose(columns, 4, slice(onset, None), keep=0.4)
    lose(columns, 7, slice(onset, None), keep=0.8)
    columns["participation_ratio"][120:150] = 3.0
    columns["participation_ratio"][160:170] = 1.0  # too short to count
    run = read_run(write(tmp_path, columns))
    record = Record(
        setting=SETTING, seed=0, kind="three classes gone", onset=onset, holders=(4, 7), run=run,
        others=dict.fromkeys(score.OTHERS, np.ones(200)), probes={},
    )  # fmt: skip
    (one, _), _ = score.score([record, attrs.evolve(record, kind="healthy", seed=100)])  # the other sets thresholds
    assert (one.emptied, one.named) == ({4}, {4})
    assert np.flatnonzero(limits.shares_off(record, 4) > 3.5)[0] == onset + 1
    assert limits.shares_off(record, 7).max() < 3.5
    assert limits.lasting("participation_ratio")(record) == pytest.approx(3.0)
