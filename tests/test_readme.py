"""Every example in every README runs, and the tables agree with the code."""

import re
import shlex
from inspect import signature
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import yaml
from torch import nn

from benchmarks.__main__ import main as benchmarks
from mixture_torch import MixtureRuntimeConfig, MixtureStats, NTXentLoss
from mixture_torch.__main__ import main
from tests.integrations.readme import Pooled, lightning_module

ROOT = Path(__file__).parent.parent
INTEGRATIONS = ROOT / "mixture_torch" / "integrations" / "README.md"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted(ROOT.glob("[!.]*/README.md")), INTEGRATIONS]
}
README = PAGES["README.md"]


def blocks(language: str) -> list[Any]:
    return [
        pytest.param(block, id=f"{page}-{number}")
        for page, text in PAGES.items()
        for number, block in enumerate(re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    ]


def table_after(heading: str, page: str = "README.md") -> dict[str, list[str]]:
    """Returns the cells of the tables under a heading, by the code in their first column."""
    section = PAGES[page].split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", section, re.MULTILINE)
    return {name: [cell.strip() for cell in re.split(r"(?<!\\)\|", cells)] for name, cells in rows}


@pytest.fixture
def training_loop() -> dict[str, object]:
    """The names that a reader has already: a model, an optimizer, a loader and a criterion."""
    model = nn.Linear(12, 6)
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": [(torch.randn(40, 12), torch.randn(40, 12)) for _ in range(3)],
        "criterion": NTXentLoss(),
        "transformers_model": Pooled(),
        "dataset": [{"x": torch.randn(12)} for _ in range(64)],
    }


def test_repository_has_a_readme_per_folder() -> None:
    assert set(PAGES) == {"README.md"} | {
        f"{folder}/README.md"
        for folder in ("mixture_core", "mixture_torch", "mixture_torch/integrations", "tests", "benchmarks")
    }


@pytest.mark.parametrize("code", blocks("python"))
def test_python_of_every_readme_runs(code: str, training_loop: dict[str, object], tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for package in re.findall(r"integrations\.(lightning|transformers) import", code):
        pytest.importorskip(package)
        if package == "lightning":
            training_loop["lightning_module"] = lightning_module()
    exec(compile(code, "README.md", "exec"), training_loop)


def test_integrating_takes_at_most_three_lines() -> None:
    stacks = INTEGRATIONS.read_text(encoding="utf-8").split("# Other people's training")[0].split("\n## ")[1:]
    added = {stack.splitlines()[0]: stack.count("  # +\n") for stack in stacks}
    assert all(1 <= lines <= 3 for lines in added.values())
    counted = {name: int(lines) for name, lines in re.findall(r"^\| ([A-Z][a-z ]+) \| (\d) \|", README, re.MULTILINE)}
    assert counted == added


@pytest.mark.parametrize("text", blocks("sh"))
def test_commands_of_every_readme_exist(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in re.split(r"\n| && ", text.strip()):
        words = shlex.split(command, comments=True)
        if words[0] == "mixture-diagnostics" or "demo" in words:
            assert main([*words[1 if words[0] == "mixture-diagnostics" else words.index("demo") :], "--help"]) == 0
        elif words[:3] == ["python", "-m", "benchmarks"]:
            with pytest.raises(SystemExit, match="0"):
                benchmarks([*words[3:], "--help"])
        elif words[:2] == ["python", "-m"]:
            assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").exists()
        else:
            assert words[0] in ("pip", "pytest", "apt-get")
            paths = [word for word in words if "/" in word]
            assert all((ROOT / path).exists() for path in paths)


@pytest.mark.parametrize("page", PAGES)
def test_links_of_every_readme_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, heading = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), target
        if heading:
            title = heading.replace("-", " ")
            assert re.search(rf"^#+ {title}$", found.read_text(encoding="utf-8"), re.IGNORECASE | re.MULTILINE), target


def test_front_page_is_short() -> None:
    assert len(README.split()) <= 1500


def test_readme_yaml_is_the_default_configuration() -> None:
    ((block,),) = [param.values for param in blocks("yaml")]
    assert MixtureRuntimeConfig.from_mapping(yaml.safe_load(block)) == MixtureRuntimeConfig()


def test_readme_options_are_those_of_the_configuration() -> None:
    rows = table_after("Options") | table_after("Rarer options", "mixture_torch/README.md")
    options = {name: yaml.safe_load(cells[0].strip("`")) for name, cells in rows.items() if len(cells) == 2}
    assert options == attrs.asdict(MixtureRuntimeConfig())
    assert set(rows) == set(signature(MixtureStats).parameters)


def test_readme_results_are_those_of_an_update() -> None:
    assert set(table_after("What it returns")) == set(MixtureStats(K=2, enabled=True).update(torch.randn(20, 3)))


def test_readme_test_command_is_what_ci_runs() -> None:
    lines = README.splitlines()
    (command,) = [line for line in lines if line.endswith("&& pytest")]
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
