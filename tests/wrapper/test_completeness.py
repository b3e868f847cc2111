"""When the files are complete: after flush and close, and for whoever calls neither."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.wrapper.samples import contents, estimator, log_steps

ROOT = Path(__file__).parents[2]


def test_context_manager_makes_files_complete_on_exceptions(tmp_path: Path) -> None:
    wrapper = estimator(log_dir=tmp_path, store_scores=True)
    log_steps(wrapper)
    with pytest.raises(KeyError), wrapper:
        raise KeyError
    assert len(torch.load(tmp_path / "mixture_scores.pt")) == 3


def test_garbage_collection_makes_files_complete(tmp_path: Path) -> None:
    wrapper = estimator(log_dir=tmp_path, store_scores=True)
    log_steps(wrapper)
    del wrapper
    gc.collect()
    assert set(contents(tmp_path)) == {"mixture.csv", "mixture_extra.csv", "mixture_scores.pt"}
    assert len(torch.load(tmp_path / "mixture_scores.pt")) == 3


def test_estimator_that_is_collected_leaves_its_folder_to_others(tmp_path: Path) -> None:
    wrapper = estimator(log_dir=tmp_path, store_scores=True)
    log_steps(wrapper)
    wrapper.close()
    with estimator(log_dir=tmp_path, store_scores=True) as other:
        log_steps(other, epoch=1)
    before = contents(tmp_path)
    del wrapper
    gc.collect()
    assert contents(tmp_path) == before


def run(script: str, folder: Path) -> str:
    """Runs a script in a process of its own, from the repository's root, and returns what it prints."""
    command = [sys.executable, "-c", script, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout


WRITE = """
import os, pathlib, sys, torch
from mixture_torch import MixtureStats
estimator = MixtureStats(K=3, enabled=True, log_dir=sys.argv[1], store_scores=True)
def log(step):
    estimator.update(torch.randn(60, 4))
    estimator.log_step(step=step, epoch=0)
"""


def test_interpreter_exit_makes_files_complete(tmp_path: Path) -> None:
    run(WRITE + "log(0); log(1)", tmp_path)
    assert set(contents(tmp_path)) == {"mixture.csv", "mixture_extra.csv", "mixture_scores.pt"}
    assert [entry["step"] for entry in torch.load(tmp_path / "mixture_scores.pt")] == [0, 1]
