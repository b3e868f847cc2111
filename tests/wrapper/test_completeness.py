"""When the files are complete: after flush and close, and for whoever calls neither."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixture_torch import read_log
from tests.wrapper.samples import contents, estimator, log_steps

ROOT = Path(__file__).parents[2]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def test_flush_makes_scores_complete(tmp_path: Path) -> None:
    wrapper = estimator(log_dir=tmp_path, store_scores=True)
    log_steps(wrapper)
    wrapper.flush()
    assert [entry["step"] for entry in torch.load(tmp_path / "mixture_scores.pt")] == [0, 1, 2]


def test_log_step_goes_on_after_close(tmp_path: Path) -> None:
    wrapper = estimator(log_dir=tmp_path, store_scores=True)
    for epoch in range(2):
        log_steps(wrapper, epoch=epoch)
        wrapper.close()
    assert read_log(tmp_path)["step"].tolist() == [0, 1, 2] * 2
    assert [entry["step"] for entry in torch.load(tmp_path / "mixture_scores.pt")] == [0, 1, 2] * 2


def test_close_twice_changes_nothing(tmp_path: Path) -> None:
    wrapper = estimator(log_dir=tmp_path, store_scores=True)
    log_steps(wrapper)
    wrapper.close()
    before = contents(tmp_path)
    wrapper.close()
    assert contents(tmp_path) == before


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
    assert set(contents(tmp_path)) == {"mixture.csv", "mixture_scores.pt"}
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
    assert set(contents(tmp_path)) == {"mixture.csv", "mixture_scores.pt"}
    assert [entry["step"] for entry in torch.load(tmp_path / "mixture_scores.pt")] == [0, 1]


FORK = """
def fork(leave):
    child = os.fork()
    if child == 0:
        leave()
        sys.exit()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

def forget():
    global estimator
    del estimator

def files():
    return {path.name: path.read_bytes() for path in pathlib.Path(sys.argv[1]).iterdir()}

log(0)
before = files()
fork(lambda: None)
fork(forget)
print(files() == before)
log(1)
fork(lambda: estimator.close())
log(2)
"""


@pytest.fixture(scope="module")
def forked_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a process that was forked between its steps, and whether two children left the files alone."""
    folder = tmp_path_factory.mktemp("forked")
    return folder, run(WRITE + FORK, folder).strip()


@needs_fork
def test_forked_child_leaves_the_files_of_its_parent(forked_run: tuple[Path, str]) -> None:
    assert forked_run[1] == "True"


@needs_fork
def test_forked_children_cost_their_parent_no_step(forked_run: tuple[Path, str]) -> None:
    assert [entry["step"] for entry in torch.load(forked_run[0] / "mixture_scores.pt")] == [0, 1, 2]
    assert read_log(forked_run[0])["step"].tolist() == [0, 1, 2]
