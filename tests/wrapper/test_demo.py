"""The demo as a user starts it, and what its training and its mixture come to."""

import functools
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import numpy as np
import pytest
import torch
import yaml
from sklearn.cluster import KMeans
from torch import Tensor

from mixture_core import batch_moments
from mixture_torch import MixtureRuntimeConfig, read_log, read_scores
from mixture_torch.__main__ import main
from mixture_torch.app.demo import MIXTURE, DemoConfig, epochs_of_views, load_images, prepare, view
from mixture_torch.app.report import Report, summarise
from mixture_torch.app.training import Place
from tests.wrapper.samples import contents

BRIEF = ("--epochs", "2", "--batch-size", "128", "--device", "cpu")
BRIEF_STEPS = 2 * (1797 // 128)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default run folder is relative."""
    monkeypatch.chdir(tmp_path)


def demo(*arguments: str) -> int:
    return main(["demo", *BRIEF, *arguments])


def document(folder: str) -> Any:
    return yaml.safe_load(Path(folder, "config.yaml").read_text(encoding="utf-8"))


def test_demo_writes_one_row_per_step() -> None:
    assert demo() == 0
    log = read_log("runs/demo")
    assert log["step"].tolist() == list(range(BRIEF_STEPS))
    assert log["epoch"].tolist() == [0] * (BRIEF_STEPS // 2) + [1] * (BRIEF_STEPS // 2)
    assert set(log["K"]) == {10}


def test_demo_ends_with_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo("--out", "run") == 0
    out = capsys.readouterr().out
    words = ("pi", "tr Sigma", "digit", "purity", "normalised mutual information", "trace_B over", "participation")
    assert not [word for word in words if word not in out]


def test_demo_writes_scores_if_asked() -> None:
    assert demo("--out", "run", "--set", "runtime.mixture.store_scores=true") == 0
    assert [tuple(entry["responsibilities"].shape) for entry in read_scores("run")] == [(256, 10)] * BRIEF_STEPS


def test_set_goes_over_the_config_file_and_the_file_over_the_defaults() -> None:
    Path("run.yaml").write_text("runtime:\n  amp: true\n  mixture: {K: 7, ema_decay: 0.5}\noptimizer: adam\n")
    assert demo("--config", "run.yaml", "--set", "runtime.mixture.K=12", "--out", "run") == 0
    expected = attrs.evolve(MIXTURE, K=12, ema_decay=0.5)
    assert document("run")["runtime"]["mixture"] == attrs.asdict(expected)
    assert set(read_log("run")["K"]) == {12}


@pytest.mark.parametrize("option", ["epochs", "batch_size", "seed", "device"])
def test_help_says_the_default(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--help"]) == 0
    _, _, after = " ".join(capsys.readouterr().out.split()).partition(f"--{option.replace('_', '-')} ")
    assert f"[default: {getattr(DemoConfig(), option)}]" in after.split("--")[0]


def test_largest_seed_is_good_for_every_rank() -> None:
    config = DemoConfig(epochs=1, seed=2**63 - 1)
    images, ids = torch.zeros(1797, 1, 8, 8), torch.arange(1797)
    batches = next(epochs_of_views(images, ids, config, Place(rank=255, world=256)))
    assert len(next(batches).labels) == config.batch_size // 256


def test_config_of_a_run_repeats_it() -> None:
    assert demo("--set", "runtime.mixture.mode=per_batch", "--seed", "3", "--out", "first") == 0
    assert main(["demo", "--config", "first/config.yaml", "--out", "second"]) == 0
    assert document("first") == document("second")
    assert Path("first/mixture.csv").read_bytes() == Path("second/mixture.csv").read_bytes()


def test_config_of_a_run_is_read_by_the_library_too() -> None:
    assert demo("--set", "runtime.mixture.K=12", "--out", "run") == 0
    assert MixtureRuntimeConfig.from_yaml("run/config.yaml") == attrs.evolve(MIXTURE, K=12)


def test_disabled_demo_trains_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo("--set", "runtime.mixture.enabled=false", "--out", "run") == 0
    assert sorted(path.name for path in Path("run").iterdir()) == ["checkpoint.pt", "config.yaml"]
    (line,) = capsys.readouterr().out.splitlines()
    assert "off" in line


def test_demo_takes_its_components_from_labels_if_asked() -> None:
    job = prepare(DemoConfig(epochs=1, device="cpu"), attrs.evolve(MIXTURE, assigner="label_supervised"))
    for _ in job.steps:
        pass
    components = job.report().components
    assert [component.label for component in components] == list(range(10))
    assert {component.purity for component in components} == {1.0}


def test_second_run_gets_a_folder_of_its_own() -> None:
    assert [demo() for _ in range(3)] == [0, 0, 0]
    assert sorted(path.name for path in Path("runs").iterdir()) == ["demo", "demo-2", "demo-3"]


def test_folder_with_a_run_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/mixture.csv").write_text("kept")
    assert demo("--out", "run") == 2
    assert "choose another" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in Path("run").iterdir()] == [("mixture.csv", "kept")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "runtime.mixture.k=3"], "did you mean `K`"),
        (["--set", "runtime.mixure.K=3"], "runtime.mixure.K=3"),
        (["--set", "runtime.mixture.K"], "must look like"),
        (["--set", "runtime.mixture.K=0"], "`K` must be at least 1, got 0"),
        (["--set", "runtime.mixture.K=["], "YAML"),
        (["--set", "demo.epoch=3"], "`epoch` is not an option"),
        (["--set", "runtime.mixture={assigner: label_supervised}"], "must look like"),
        (["--set", "runtime.mixture.mode=label_supervised", "--set", "runtime.mixture.K=9"], "`K` must be at least 10"),
        (["--config", "missing.yaml"], "Invalid value for '--config'"),
        (["--config", "folder"], "Invalid value for '--config'"),
        (["--config", "torn.yaml"], "torn.yaml"),
        (["--config", "list.yaml"], "list.yaml"),
        (["--config", "blocks.yaml"], "`demo` must be a mapping"),
        (["--epochs", "0"], "`epochs` must be at least 1, got 0"),
        (["--epochs", "-1"], "`epochs` must be at least 1, got -1"),
        (["--epochs", "many"], "epochs"),
        (["--batch-size", "1"], "`batch_size` must be at least 2"),
        (["--batch-size", "1798"], "at most 1797"),
        (["--seed", "-1"], "`seed` must be at least 0"),
        (["--seed", str(2**63)], "`seed` must be at most 9223372036854775807, got 9223372036854775808"),
        (["--device", "abacus"], "`device` must be"),
        (["--device", "meta"], "`device` must be"),
        (["--out", "torn.yaml"], "torn.yaml"),
        (["--verbose"], "--verbose"),
    ],
)
def test_users_error_is_one_line_and_leaves_no_folder(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("torn.yaml").write_text("runtime: {mixture: [")
    Path("list.yaml").write_text("[1, 2]")
    Path("blocks.yaml").write_text("demo: 3")
    Path("folder").mkdir()
    before = sorted(Path().iterdir())
    assert demo(*arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert said in line
    assert not captured.out
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("package", ["typer", "rich", "sklearn"])
def test_missing_extra_is_one_line(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == package or name.startswith("mixture_torch.app"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert demo() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert 'pip install "mixture-diagnostics[demo]"' in line


def test_weights_are_the_same_to_the_bit_without_the_estimator() -> None:
    def weights(*, enabled: bool) -> dict[str, bytes]:
        job = prepare(DemoConfig(epochs=2, batch_size=256, device="cpu"), attrs.evolve(MIXTURE, enabled=enabled))
        for _ in job.steps:
            pass
        return {name: value.numpy().tobytes() for name, value in job.encoder.state_dict().items()}

    assert weights(enabled=True) == weights(enabled=False)


def test_demo_puts_back_how_warnings_are_shown() -> None:
    before = warnings.showwarning
    assert demo() == 0
    assert warnings.showwarning is before


def test_demo_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    next(prepare(DemoConfig(device="cpu"), MIXTURE).steps)
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


@pytest.mark.parametrize("cross_rank", ["false", "true"])
def test_demo_on_two_processes_leaves_one_log(cross_rank: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    override = ["--set", f"runtime.mixture.cross_rank={cross_rank}", "--set", "runtime.mixture.store_scores=true"]
    command = [*torchrun, "-m", "mixture_torch", "demo", *BRIEF, *override, "--out", "run"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    files = ["checkpoint.pt", "config.yaml", "mixture.csv", "mixture_scores.pt"]
    assert sorted(contents(Path("run"))) == files
    assert read_log("run")["step"].tolist() == list(range(BRIEF_STEPS))
    rows_per_step = 256 if cross_rank == "true" else 128
    assert {len(entry["responsibilities"]) for entry in read_scores("run")} == {rows_per_step}
    assert result.stdout.count("participation ratio") == 1


def test_report_counts_what_a_component_was_assigned() -> None:
    labels = torch.tensor([3, 3, 1, 1, 1, 3])
    R = torch.eye(3)[[0, 0, 0, 2, 2, 2]]
    x = torch.arange(12.0).view(6, 2)
    first, empty, last = summarise(batch_moments(x, R), R, labels).components
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
    """What a run with the demo's defaults came to."""

    report: Report
    embeddings: Tensor  # (1797, D)
    digits: Tensor  # (1797,)
    batches: dict[int, tuple[Tensor, Tensor, Tensor]]  # by step from 60 on: embeddings, mu, R
    n_relocated: int  # from step 60 on


@functools.cache
def full_run(seed: int) -> FullRun:
    job = prepare(DemoConfig(seed=seed, device="cpu"), MIXTURE)
    update, fed, batches, moved = job.estimator.update, [], {}, 0

    def record(embeddings: Tensor, labels: Tensor | None = None) -> Any:
        fed[:] = [embeddings]
        return update(embeddings, labels)

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


def assert_components_follow_the_digits(seed: int) -> None:
    run = full_run(seed)
    assert run.report.mean_purity >= 0.60
    assert run.report.mean_purity >= 0.9 * kmeans_purity(run)


def assert_inertia_stays_near_the_best(seed: int) -> None:
    excess = {step: excess_inertia(*batch) for step, batch in full_run(seed).batches.items()}
    assert len(excess) > 2
    assert np.max(list(excess.values())) <= 1.08, excess


def test_components_follow_the_digits() -> None:
    assert_components_follow_the_digits(seed=0)


def test_components_of_a_healthy_demo_stay_where_they_are() -> None:
    assert full_run(0).n_relocated == 0


def test_inertia_stays_near_that_of_fresh_kmeans() -> None:
    assert_inertia_stays_near_the_best(seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_components_follow_the_digits_for_five_seeds(seed: int) -> None:
    assert_components_follow_the_digits(seed)
    assert full_run(seed).n_relocated == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_inertia_stays_near_that_of_fresh_kmeans_for_five_seeds(seed: int) -> None:
    assert_inertia_stays_near_the_best(seed)
