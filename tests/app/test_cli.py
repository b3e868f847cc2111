"""The command line: which options a run gets, where it goes, and what the user is told."""

import sys
import warnings
from pathlib import Path
from typing import Any

import attrs
import pytest
import typer

from mixture_torch import MixtureRuntimeConfig, MixtureStats, read_log
from mixture_torch.__main__ import main
from mixture_torch.app import messages
from mixture_torch.app.demo import MIXTURE, DemoConfig
from mixture_torch.app.training import Place
from tests.app.common import STEPS, demo
from tests.wrapper.samples import BOMB, contents


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default run folder is relative."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "document",
    ["runtime:\n  amp: true\n  mixture: {K: 7, ema_decay: 0.5}\noptimizer: adam\n", "mixture: {K: 7, ema_decay: 0.5}"],
)
def test_set_overrides_the_config_file_and_the_file_overrides_the_defaults(document: str) -> None:
    Path("run.yaml").write_text(document)
    assert demo("--config", "run.yaml", "--set", "runtime.mixture.K=12", "--out", "run") == 0
    assert MixtureRuntimeConfig.from_yaml("run/config.yaml") == attrs.evolve(MIXTURE, K=12, ema_decay=0.5)
    assert set(read_log("run")["K"]) == {12}


def test_config_of_a_run_repeats_it() -> None:
    before = warnings.showwarning
    assert demo("--set", "runtime.mixture.mode=per_batch", "--seed", "3", "--out", "first") == 0
    assert warnings.showwarning is before
    assert main(["demo", "--config", "first/config.yaml", "--out", "second"]) == 0
    first, second = contents(Path("first")), contents(Path("second"))
    assert [first[name] for name in ("config.yaml", "mixture.csv")] == [
        second[name] for name in ("config.yaml", "mixture.csv")
    ]


def test_help_says_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    for name, value in attrs.asdict(DemoConfig()).items():
        _, _, after = words.partition(f"--{name.replace('_', '-')} ")
        assert f"[default: {value}]" in after.split("--")[0]


def test_second_run_gets_its_own_folder() -> None:
    assert [demo("--set", "demo.epochs=1") for _ in range(2)] == [0, 0]
    assert sorted(path.name for path in Path("runs").iterdir()) == ["demo", "demo-2"]


def test_folder_with_a_run_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/mixture.csv").write_text("kept")
    assert demo("--out", "run") == 2
    assert "choose another" in capsys.readouterr().err
    assert contents(Path("run")) == {"mixture.csv": b"kept"}


FILES = {
    "torn.yaml": "runtime: {mixture: [",
    "list.yaml": "[1, 2]",
    "near.yaml": "runtime: {mixure: {K: 3}}",
    "blocks.yaml": "demo: 3",
    "bomb.yaml": f"{BOMB}demo: *i",
    "seed.yaml": f"{BOMB}demo: {{seed: *i}}",
}
ERRORS = [
    (["--set", "runtime.mixture.k=3", "--set", "runtime.mixture.Q=3"], "mixture: `k` (did you mean `K`?), `Q`."),
    (["--set", "runtime.mixure.K=3"], "`--set` must look like"),
    (["--set", "runtime.mixture.K"], "`--set` must look like"),
    (["--set", "runtime.mixture.K=0"], "`K` must be at least 1, got 0"),
    (["--set", "runtime.mixture.K=["], "is not valid YAML"),
    (["--set", "demo.epoch=3"], "Unknown option in demo: `epoch` (did you mean `epochs`?)"),
    (["--set", "runtime.mixture={assigner: label_supervised}"], "`--set` must look like"),
    (["--set", "runtime.mixture.mode=label_supervised", "--set", "runtime.mixture.K=9"], "`K` must be at least 10"),
    (["--config", "near.yaml"], "did you mean `mixture`?"),
    (["--config", "missing.yaml"], "Invalid value for '--config'"),
    (["--config", "folder"], "Invalid value for '--config'"),
    (["--config", "torn.yaml"], "torn.yaml"),
    (["--config", "list.yaml"], "list.yaml"),
    (["--config", "blocks.yaml"], "`demo` must be a mapping"),
    (["--config", "bomb.yaml"], "`demo` must be a mapping"),
    (["--config", "seed.yaml"], "`seed` must be an integer"),
    (["--epochs", "0"], "`epochs` must be at least 1, got 0"),
    (["--epochs", "many"], "epochs"),
    (["--fault", "temprature"], "`fault` must be one of none, no-negatives, temperature,"),
    (["--fault", "outliers", "--epochs", "1"], "`epochs` must be at least 2 with the fault outliers"),
    (["--batch-size", "1"], "`batch_size` must be at least 2"),
    (["--batch-size", "1798"], "at most 1797"),
    (["--seed", str(2**63)], "`seed` must be at most 9223372036854775807, got 9223372036854775808"),
    (["--device", "abacus"], "`device` must be"),
    (["--device", "meta"], "`device` must be"),
    (["--out", "torn.yaml"], "torn.yaml"),
    (["--verbose"], "--verbose"),
]


@pytest.mark.parametrize(
    ("arguments", "said"), ERRORS, ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else ""
)
def test_wrong_option_is_one_line_and_leaves_no_folder(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in FILES.items():
        Path(name).write_text(text)
    Path("folder").mkdir()
    before = sorted(Path().iterdir())
    assert demo(*arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert said in line
    assert len(line) < 300
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


def raising_at(call: int, error: BaseException) -> Any:
    """A `log_step` that raises at one call."""
    log_step, calls = MixtureStats.log_step, iter(range(STEPS))

    def logged(self: MixtureStats, **position: int) -> None:
        if next(calls) == call:
            raise error
        log_step(self, **position)

    return logged


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("SimCLR on digits")]


@pytest.mark.parametrize("kind", [OSError, TypeError])
def test_error_inside_the_estimator_is_one_line(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(MixtureStats, "log_step", raising_at(3, kind("the disk\nis gone")))
    assert demo("--out", "run") == 2
    assert errors(capsys) == ["Error: the disk is gone"]


def test_interrupted_run_says_how_to_resume_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(MixtureStats, "log_step", raising_at(20, KeyboardInterrupt()))
        assert demo("--out", "run") == 130
    (line,) = errors(capsys)
    _, command, _ = line.split("`")
    assert main(command.split()[1:]) == 0
    assert read_log("run")["step"].tolist() == list(range(STEPS))


def test_error_of_another_rank_names_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(messages, "current_place", lambda: Place(1, 2))
    for every_rank, said in ((True, "Error on rank 1: disk full\n"), (False, "")):
        with pytest.raises(typer.Exit), messages.one_line_errors(every_rank=every_rank):
            raise OSError("disk full")
        assert capsys.readouterr().err == said
