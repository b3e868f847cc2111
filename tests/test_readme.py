"""What the README says is what happens."""

import re
from pathlib import Path

import attrs
import pytest
import torch
import yaml
from torch import nn

from mixture_torch import MixtureRuntimeConfig, NTXentLoss
from mixture_torch.update.stats import StepStats

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def table_after(heading: str) -> dict[str, list[str]]:
    """Returns the cells of the first table under a heading, by the code in its first column."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", README.split(f"## {heading}\n")[1].split("\n## ")[0], re.MULTILINE)
    return {name: [cell.strip() for cell in re.split(r"(?<!\\)\|", cells)] for name, cells in rows}


@pytest.fixture
def training_loop() -> dict[str, object]:
    """Stands in for what a reader has already: a model, an optimizer, a loader and a criterion."""
    model = nn.Linear(12, 6)
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": [(torch.randn(40, 12), torch.randn(40, 12)) for _ in range(3)],
        "criterion": NTXentLoss(),
    }


@pytest.mark.parametrize("code", blocks("python"))
def test_readme_python_runs(code: str, training_loop: dict[str, object], tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), training_loop)


def test_readme_yaml_is_the_default_configuration() -> None:
    (block,) = blocks("yaml")
    assert MixtureRuntimeConfig.from_mapping(yaml.safe_load(block)) == MixtureRuntimeConfig()


def test_readme_options_are_those_of_the_configuration() -> None:
    documented = {name: yaml.safe_load(cells[0].strip("`")) for name, cells in table_after("Options").items()}
    assert documented == attrs.asdict(MixtureRuntimeConfig())


def test_readme_keys_are_those_of_the_statistics() -> None:
    assert set(table_after("What it returns")) == set(StepStats.KEYS)


def test_readme_test_command_is_what_ci_runs() -> None:
    (command,) = [line for block in blocks("sh") for line in block.splitlines() if line.endswith("&& pytest")]
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
