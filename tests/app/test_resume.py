"""A demo that is killed and resumed ends as if it had never been interrupted."""

import contextlib
import io
import multiprocessing
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from mixture_torch import MixtureStats, read_log, read_scores
from mixture_torch.__main__ import main
from mixture_torch.app.demo import MIXTURE, DemoConfig, prepare
from tests.app.common import BRIEF, EPOCH, STEPS
from tests.app.killed import run_until
from tests.wrapper.samples import contents

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")

# Calls before which the run is killed, each in another process that resumes it.
KILLS: dict[str, list[tuple[str, int]]] = {
    "inside the first checkpoint": [("replace", 2)],  # the first replaces config.yaml
    "twice": [("log_step", EPOCH + 2), ("log_step", 3)],
}


class Ended(NamedTuple):
    """The results of a run."""

    log: bytes
    checkpoint: list[Any]  # its values, to the bit
    table: list[str]  # printed lines that do not name the folder


def demo(*arguments: str) -> tuple[int, str]:
    """The exit code of the command, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return main(["demo", *arguments]), out.getvalue()


def leaves(checkpoint: Path) -> list[Any]:
    """All values of a checkpoint as something that == compares to the bit."""
    values, structure = tree_flatten(torch.load(checkpoint))
    return [structure, *(value.numpy().tobytes() if isinstance(value, Tensor) else value for value in values)]


def ended(folder: Path, out: str) -> Ended:
    table = [line for line in out.splitlines() if str(folder) not in line]
    return Ended((folder / "mixture.csv").read_bytes(), leaves(folder / "checkpoint.pt"), table)


def kill(folder: Path, *instants: tuple[str, int], options: tuple[str, ...] = ()) -> None:
    """Starts a run, and resumes it, in processes that are killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mixture_torch.app.cli"])
    arguments = [*BRIEF, *options, "--out", str(folder)]
    for number, instant in enumerate(instants):
        command = ["demo", *arguments, *(["--resume"] if number else [])]
        process = context.Process(target=run_until, args=(*instant, command))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A run that nothing interrupts: its folder, for tests that leave it as it is, and its results."""
    folder = tmp_path_factory.mktemp("whole")
    code, out = demo(*BRIEF, "--out", str(folder))
    assert code == 0
    return folder, ended(folder, out)


@pytest.fixture
def complete(whole: tuple[Path, Ended]) -> Path:
    """The folder of that run."""
    return whole[0]


@pytest.fixture
def uninterrupted(whole: tuple[Path, Ended]) -> Ended:
    """The results of that run."""
    return whole[1]


@pytest.mark.parametrize("name", KILLS)
def test_resumed_run_ends_as_an_uninterrupted_one(name: str, tmp_path: Path, uninterrupted: Ended) -> None:
    kill(tmp_path, *KILLS[name])
    code, out = demo("--resume", "--out", str(tmp_path))
    assert code == 0
    assert ended(tmp_path, out) == uninterrupted


@pytest.mark.parametrize("options", [["--device", "auto"], [*BRIEF, "--set", "runtime.mixture.K=10"]], ids=str)
def test_resuming_a_complete_run_changes_nothing_and_shows_its_table(
    complete: Path, uninterrupted: Ended, options: list[str]
) -> None:
    before = contents(complete)
    code, out = demo("--resume", "--out", str(complete), *options)
    first, *rest = out.splitlines()
    assert code == 0
    assert "is complete" in first
    assert [line for line in rest if str(complete) not in line] == uninterrupted.table
    assert contents(complete) == before


@pytest.mark.parametrize("mixture", [{}, {"mode": "label_supervised"}, {"K": 1000}], ids=str)
def test_report_of_a_resumed_run_is_that_of_its_last_step(mixture: dict[str, Any], tmp_path: Path) -> None:
    demo_config = DemoConfig(epochs=1, batch_size=898, device="cpu")
    configs = demo_config, attrs.evolve(MIXTURE, **mixture)
    job = prepare(*configs, log_dir=tmp_path)
    for _ in job.steps:
        pass
    assert repr(prepare(*configs, log_dir=tmp_path, resume=True).report()) == repr(job.report())


def test_log_is_flushed_before_each_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(MixtureStats, "flush", lambda self: seen.append((tmp_path / "checkpoint.pt").exists()))
    assert demo(*BRIEF, "--out", str(tmp_path))[0] == 0
    assert seen == [False, True]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "3"], "`demo.epochs` of a resumed run must stay 2, got 3"),
        (["--set", "runtime.mixture.K=12"], "`runtime.mixture.K` of a resumed run must stay 10, got 12"),
        (["--config", "other.yaml"], "`runtime.mixture.ema_decay` of a resumed run must stay 0.9"),
        (["--config", "torn.yaml"], "torn.yaml"),
        (["--device", "abacus"], "`device` must be"),
        (["--out", "nowhere"], "`nowhere` holds no run to resume"),
        (["--out", "empty"], "`empty` holds no run to resume"),
        (["--out", "damaged"], "`damaged/checkpoint.pt` is not a checkpoint of this run"),
        (["--out", "foreign"], "`foreign/checkpoint.pt` is not a checkpoint of this run"),
        (["--out", "misshapen"], "`misshapen/checkpoint.pt` is not a checkpoint of this run"),
    ],
)
def test_resuming_what_cannot_be_is_one_line_and_changes_nothing(
    arguments: list[str],
    said: str,
    complete: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.yaml").write_text("runtime: {mixture: {ema_decay: 0.5}}")
    Path("torn.yaml").write_text("runtime: {mixture: [")
    Path("empty").mkdir()
    for name in ("damaged", "foreign", "misshapen"):
        shutil.copytree(complete, name)
    Path("damaged/checkpoint.pt").write_bytes(Path("damaged/checkpoint.pt").read_bytes()[:1000])
    torch.save({"loss": 1.0}, "foreign/checkpoint.pt")
    checkpoint = torch.load("misshapen/checkpoint.pt")
    torch.save(checkpoint | {"model": {"1.weight": torch.zeros(2, 2)}}, "misshapen/checkpoint.pt")
    before = contents(complete), contents(tmp_path)
    out = [] if "--out" in arguments else ["--out", str(complete)]
    assert main(["demo", "--resume", *out, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert (contents(complete), contents(tmp_path)) == before


def test_resuming_without_a_folder_takes_the_newest_run_with_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complete: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/demo").mkdir(parents=True)
    shutil.copy(complete / "config.yaml", "runs/demo")
    assert demo("--resume")[1].startswith("The run in runs/demo is resumed: 0 of 28 steps are done")
    shutil.copytree(complete, "runs/demo-2")
    Path("runs/demo-3").mkdir()
    shutil.copy(complete / "config.yaml", "runs/demo-3")
    shutil.copytree(complete, "runs/demo-of-mine")
    for folder in ("runs/demo", "runs/demo-2", "runs/demo-3", "runs/demo-of-mine"):  # from old to new
        Path(folder, "config.yaml").touch()
    assert demo("--resume")[1].startswith("The run in runs/demo-2 is complete")


def test_resumed_run_notes_in_one_line_what_it_set_aside(
    complete: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(complete, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint.pt").unlink()
    assert demo("--resume", "--out", str(tmp_path))[0] == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "mixture.superseded-1.csv" in line]
    assert line.startswith("Note: ")


def test_run_of_one_process_is_resumed_on_two_and_leaves_one_log(tmp_path: Path) -> None:
    options = ("--set", "runtime.mixture.cross_rank=true", "--set", "runtime.mixture.store_scores=true")
    kill(tmp_path, ("log_step", EPOCH + 1), options=options)
    command = [*TORCHRUN, "2", "-m", "tests.app.threads", "demo", "--resume", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert read_log(tmp_path)["step"].tolist() == list(range(STEPS))
    assert [len(entry["responsibilities"]) for entry in read_scores(tmp_path)] == [256] * STEPS
    assert result.stdout.count("is resumed: 14 of 28 steps are done") == 1
    assert result.stdout.count("participation ratio") == 1
    left = [line for line in result.stdout.splitlines() if line.startswith("Left:")]
    assert len(left) == 2
    assert not any("gloo" in line for line in left)  # they may abort the process while Python ends


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_run_of_many_processes_ends_with_the_same_weights_and_log(world: int, tmp_path: Path) -> None:
    def run(name: str, program: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*TORCHRUN, str(world), "-m", *program, "demo", *arguments, "--out", str(tmp_path / name)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    cross_rank = ("--set", "runtime.mixture.cross_rank=true")
    whole = run("whole", ["mixture_torch"], *BRIEF, *cross_rank)
    killed = run("killed", ["tests.app.killed", "log_step", str(EPOCH + 6)], *BRIEF, *cross_rank)
    assert killed.returncode != 0
    resumed = run("killed", ["mixture_torch"], "--resume")
    assert resumed.returncode == whole.returncode == 0
    assert ended(tmp_path / "killed", resumed.stdout) == ended(tmp_path / "whole", whole.stdout)
