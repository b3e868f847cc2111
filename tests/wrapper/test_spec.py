"""The specification's own examples, word for word."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mixture_torch import MixtureRuntimeConfig, MixtureStats
from tests.wrapper.samples import mixture

ROOT = Path(__file__).parents[2]

USAGE = """
from mfcl.mixture import MixtureStats

estimator = MixtureStats(
    K=8,
    assigner="kmeans_online",
    mode="ema",
    enabled=True,
    log_dir=run_dir,
    is_main=True,
)
stats = estimator.update(embeddings)
# stats contains pi, mu, Sigma, B, and the per-sample responsibilities R.
estimator.log_step(step=step_idx, epoch=current_epoch, stats=stats)
"""

YAML = """
runtime:
  mixture:
    enabled: false          # Feature flag, default disabled.
    K: 8                    # Number of mixture components.
    mode: ema               # Mixture mode: per_batch | ema | label_supervised.
    assigner: kmeans_online # Assignment strategy: kmeans_online | label_supervised.
    ema_decay: 0.95         # EMA decay factor when mode == "ema".
    store_scores: false     # Persist responsibilities alongside CSV output.
    scores_mode: append     # append | per_step storage strategy for responsibilities.
    cross_rank: false       # Gather embeddings across ranks before computing stats.
    max_assign_iters: 2     # Lloyd iterations for the k-means assigner.
"""

HEADER = "step,epoch,K,pi_min,pi_max,trace_B,opnorm_B"


def test_usage_block_returns_what_its_comment_says_and_appends_one_row(tmp_path: Path) -> None:
    embeddings, labels = mixture(256, K=8, D=16)
    names: dict[str, Any] = {"run_dir": tmp_path, "embeddings": embeddings, "step_idx": 123, "current_epoch": 4}
    exec(USAGE.replace("from mfcl.mixture import", "from mixture_torch import"), names)
    stats = names["stats"]
    shapes = {key: tuple(stats[key].shape) for key in ("pi", "mu", "Sigma", "B", "R")}
    assert shapes == {"pi": (8,), "mu": (8, 16), "Sigma": (8, 16, 16), "B": (16, 16), "R": (256, 8)}
    counts = torch.zeros(8, 8).index_add_(0, labels, stats["R"])
    assert sorted(counts.flatten().tolist()) == [0.0] * 56 + [32.0] * 8
    lines = (tmp_path / "mixture.csv").read_text().splitlines()
    assert lines[0] == HEADER
    assert [line.split(",")[:3] for line in lines[1:]] == [["123", "4", "8"]]


def test_yaml_block_holds_the_defaults_of_configuration_and_estimator(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    assert MixtureRuntimeConfig.from_yaml(path) == MixtureRuntimeConfig()
    block = yaml.safe_load(YAML)["runtime"]["mixture"]
    signature = inspect.signature(MixtureStats).parameters
    same = set(block) - {"K", "enabled"}  # K is needed, and `enabled` left out is false
    assert {key: getattr(MixtureRuntimeConfig(), key) for key in block} == block
    assert {key: signature[key].default for key in same} == {key: block[key] for key in same}


@pytest.mark.parametrize("scores_mode", ["append", "per_step"])
def test_scores_are_stored_where_the_specification_says(tmp_path: Path, scores_mode: str) -> None:
    with MixtureStats(K=3, enabled=True, log_dir=tmp_path, store_scores=True, scores_mode=scores_mode) as estimator:
        R = estimator.update(mixture()[0])["R"]
        estimator.log_step(step=123, epoch=0)
    path = {"append": "mixture_scores.pt", "per_step": "mixture_scores/step_000123.pt"}[scores_mode]
    value = torch.load(tmp_path / path)
    (entry,) = value if scores_mode == "append" else [value]
    assert (entry["step"], entry["epoch"], entry["responsibilities"].tolist()) == (123, 0, R.tolist())


def test_disabled_estimator_returns_an_empty_falsy_mapping_and_writes_nothing(tmp_path: Path) -> None:
    log_dir = tmp_path / "run"
    with MixtureStats(K=8, log_dir=log_dir, store_scores=True) as estimator:
        stats = estimator.update(mixture()[0])
        assert not stats
        assert dict(stats) == {}
        estimator.log_step(step=0, epoch=0)
        estimator.flush()
    assert not log_dir.exists()
