"""The demo: what its training leaves behind, and how well its mixture follows the digits."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from mixture_core import batch_moments
from mixture_torch import read_log, read_scores
from mixture_torch.app.demo import MIXTURE, DemoConfig, epochs_of_views, prepare
from mixture_torch.app.digits import load_images, view
from mixture_torch.app.report import Report, summarise
from mixture_torch.app.training import Place
from tests.app.common import EPOCH, STEPS, demo

CPU = torch.device("cpu")


def test_demo_logs_every_step_and_ends_with_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo("--out", str(tmp_path), "--set", "runtime.mixture.store_scores=true") == 0
    log = read_log(tmp_path)
    assert log["step"].tolist() == list(range(STEPS))
    assert log["epoch"].tolist() == [0] * EPOCH + [1] * EPOCH
    assert set(log["K"]) == {10}
    assert [tuple(entry["responsibilities"].shape) for entry in read_scores(tmp_path)] == [(256, 10)] * STEPS
    out = capsys.readouterr().out
    words = ("pi", "tr Sigma", "digit", "purity", "normalized mutual information", "trace_B over", "participation")
    assert not [word for word in words if word not in out]


def test_disabled_demo_trains_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo("--set", "runtime.mixture.enabled=false", "--out", str(tmp_path)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "config.yaml"]
    (line,) = capsys.readouterr().out.splitlines()
    assert "off" in line


def test_demo_takes_its_components_from_labels_if_asked() -> None:
    job = prepare(DemoConfig(epochs=1, device="cpu"), attrs.evolve(MIXTURE, assigner="label_supervised"))
    for _ in job.steps:
        pass
    components = job.report().components
    assert [component.label for component in components] == list(range(10))
    assert {component.purity for component in components} == {1.0}


def test_weights_are_the_same_to_the_bit_without_the_estimator() -> None:
    def weights(*, enabled: bool) -> dict[str, bytes]:
        job = prepare(DemoConfig(epochs=2, batch_size=256, device="cpu"), attrs.evolve(MIXTURE, enabled=enabled))
        for _ in job.steps:
            pass
        return {name: value.numpy().tobytes() for name, value in job.encoder.state_dict().items()}

    torch.manual_seed(12)  # not the demo's seed, which it could leave behind
    before = torch.get_rng_state()
    assert weights(enabled=True) == weights(enabled=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_share_an_epoch_without_overlap() -> None:
    images, ids = torch.zeros(1797, 1, 8, 8), torch.arange(1797)
    config = DemoConfig(epochs=1, batch_size=300)
    of_each_rank = [next(epochs_of_views(images, ids, config, Place(rank, 3))) for rank in range(3)]
    seen = [batch.labels for epoch in of_each_rank for batch in epoch]
    assert len(torch.cat(seen).unique()) == 5 * 300
    assert {len(labels) for labels in seen} == {100}


def test_views_of_an_image_differ_and_are_repeated_by_their_seed() -> None:
    images, _ = load_images(CPU)
    generator = torch.Generator().manual_seed(0)
    first, second = view(images, generator=generator), view(images, generator=generator)
    assert not (first == second).flatten(1).all(dim=1).any()
    assert torch.equal(view(images, generator=torch.Generator().manual_seed(0)), first)
    assert view(0 * images, generator=generator).any()  # noise


def test_report_counts_what_a_component_was_assigned() -> None:
    labels = torch.tensor([3, 3, 1, 1, 1, 3])
    R = torch.eye(3)[[0, 0, 0, 2, 2, 2]]
    x = torch.arange(12.0).view(6, 2)
    report = summarise(batch_moments(x, R), R, labels)
    first, empty, last = report.components
    assert report.mean_purity == pytest.approx(2 / 3)
    assert (first.n_samples, first.label, first.purity) == (3, 3, pytest.approx(2 / 3))
    assert (empty.n_samples, empty.label) == (0, None)
    assert (last.n_samples, last.label, last.purity) == (3, 1, pytest.approx(2 / 3))


def test_report_shares_variance_between_and_within() -> None:
    x = torch.tensor([[0.0], [2.0], [10.0], [12.0]])  # variance 1 within either pair, 25 between them
    R = torch.eye(2)[[0, 0, 1, 1]]
    report = summarise(batch_moments(x, R), R, torch.tensor([0, 0, 1, 1]))
    assert report.between_share == pytest.approx(25 / 26)
    assert report.mutual_information == pytest.approx(1.0)
    assert report.mean_purity == 1.0


class FullRun(NamedTuple):
    """The result of a run with the demo's defaults."""

    report: Report
    embeddings: Tensor  # (1797, D)
    digits: Tensor  # (1797,)
    batches: dict[int, tuple[Tensor, Tensor, Tensor]]  # by step from 60 on: embeddings, mu, R
    n_relocated: int  # from step 60 on


@functools.cache
def full_run(seed: int) -> FullRun:
    job = prepare(DemoConfig(seed=seed, device="cpu"), MIXTURE)
    update, fed, batches, moved = job.estimator.update, [], {}, 0

    def record(embeddings: Tensor, labels: Tensor | None = None, *, views: int) -> Any:
        fed[:] = [embeddings]
        return update(embeddings, labels, views=views)

    job.estimator.update = record  # type: ignore[method-assign]
    for done in job.steps:
        moved += int(job.estimator.stats["n_relocated"]) if done.step >= 60 else 0
        if done.step >= 60 and done.step % 20 == 0:
            batches[done.step] = fed[0], job.estimator.stats["mu"], job.estimator.stats["R"]
    return FullRun(job.report(), job.embeddings(), job.digits, batches, moved)


def kmeans_purity(run: FullRun) -> float:
    assigned = torch.as_tensor(KMeans(10, n_init=10, random_state=0).fit_predict(run.embeddings.numpy()))
    counts = torch.eye(10)[assigned].T @ torch.eye(10)[run.digits]
    return float((counts.max(dim=1).values / counts.sum(dim=1)).mean())


def excess_inertia(x: Tensor, mu: Tensor, R: Tensor) -> tuple[float, float]:
    """The inertia about the nearest means, and about the batch's own means of R, over that of the best of 5 KMeans."""
    best = min(KMeans(10, n_init=1, random_state=seed).fit(x.numpy()).inertia_ for seed in range(5))
    own = (R.T @ x) / R.sum(dim=0).clamp(min=1)[:, None]
    about_means = torch.cdist(x, mu).square().min(dim=1).values.sum()
    return float(about_means / best), float((x - R @ own).square().sum() / best)


seeds = pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])


@seeds
def test_components_follow_the_digits(seed: int) -> None:
    run = full_run(seed)
    assert run.report.mean_purity >= 0.60
    assert run.report.mean_purity >= 0.9 * kmeans_purity(run)


@seeds
def test_components_of_a_healthy_demo_stay_where_they_are(seed: int) -> None:
    assert full_run(seed).n_relocated == 0


@seeds
def test_inertia_stays_near_that_of_fresh_kmeans(seed: int) -> None:
    excess = {step: excess_inertia(*batch) for step, batch in full_run(seed).batches.items()}
    assert len(excess) > 2
    assert np.max(list(excess.values())) <= 1.08, excess
