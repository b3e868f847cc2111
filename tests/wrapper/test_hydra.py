"""Configurations of OmegaConf and Hydra, as they are."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from mixture_torch import MixtureRuntimeConfig, MixtureStats, read_log
from tests.wrapper.samples import log_steps

ROOT = Path(__file__).parents[2]
RUN = OmegaConf.create(
    {
        "classes": 5,
        "output": "runs/${name}",
        "name": "first",
        "runtime": {"mixture": {"enabled": True, "K": "${classes}", "ema_decay": "${oc.decode:'0.5'}", "dim": None}},
    }
)
APPLICATION = """
import hydra, torch
from mixture_torch import MixtureStats

@hydra.main(version_base=None, config_path=".", config_name="config")
def main(config):
    estimator = MixtureStats.from_config(config, log_dir=config.output)
    estimator.update(torch.randn(40, 4))
    estimator.log_step(step=0, epoch=0)
    estimator.close()

main()
"""


def test_config_of_omegaconf_makes_an_estimator() -> None:
    wanted = MixtureRuntimeConfig(enabled=True, K=5, ema_decay=0.5)
    assert MixtureRuntimeConfig.from_mapping(RUN) == wanted
    assert MixtureStats.from_config(RUN).config == MixtureStats.from_config(RUN.runtime.mixture).config == wanted


@pytest.mark.parametrize("K", ["${nothing}", "???", "${runtime.mixture.K}"])
def test_interpolation_that_leads_nowhere_is_one_line(K: str) -> None:
    config = OmegaConf.create({"runtime": {"mixture": {"K": K}}})
    with pytest.raises(ValueError, match=r"^`K` cannot be read: .*\.$"):
        MixtureRuntimeConfig.from_mapping(config)


TARGETS: dict[str, dict[str, Any]] = {
    "options": {"_target_": "mixture_torch.MixtureStats", "K": "${classes}", "enabled": True, "log_dir": "${output}"},
    "block": {
        "_target_": "mixture_torch.MixtureStats.from_config", "config": "${runtime.mixture}", "log_dir": "${output}"
    },
    "made before": {
        "_target_": "mixture_torch.MixtureStats.from_config",
        "config": {"_target_": "mixture_torch.MixtureRuntimeConfig", "K": "${classes}", "enabled": True},
        "log_dir": "${output}",
    },
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_hydra_instantiates_an_estimator(target: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    document = OmegaConf.merge(
        RUN, {"estimator": {**target, "on_alarm": {"_target_": "builtins.print", "_partial_": True}}}
    )
    assert isinstance(document, DictConfig)
    wrapper = instantiate(document.estimator)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # before the first row
    log_steps(wrapper)
    assert (wrapper.K, len(read_log(tmp_path / "runs/first")["step"])) == (5, 3)


def test_relative_folder_is_in_the_working_directory_that_hydra_chose(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(APPLICATION)
    OmegaConf.save(RUN, tmp_path / "config.yaml")
    options = ["hydra.job.chdir=True", "hydra.run.dir=job", "hydra.output_subdir=null", "classes=3"]
    command = [sys.executable, "main.py", *options]
    subprocess.run(command, cwd=tmp_path, check=True, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=60)
    assert read_log(tmp_path / "job/runs/first")["K"].tolist() == [3]
