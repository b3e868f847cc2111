"""The alarms of a run folder are those that were raised during training, however many rows there are."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mixture_torch import MixtureStats, read_run


@pytest.mark.filterwarnings("ignore:.* is resumed at step")
def test_alarms_of_a_folder_are_those_of_training(tmp_path: Path) -> None:
    alarms: list[str] = []
    checkpoints = []
    options: Any = {"K": 4, "enabled": True, "log_dir": tmp_path, "on_alarm": lambda alarm: alarms.append(str(alarm))}
    for first in (0, 90):  # resumed once
        with MixtureStats(**options) as each:
            if first:
                each.load_state_dict(checkpoints[0])
            for step in range(first, 180 if first else 100):
                generator = torch.Generator().manual_seed(step)
                label = torch.randint(4 if step < 120 else 3, (256,), generator=generator)
                each.update(3 * torch.eye(4, 12)[label] + 0.1 * torch.randn(256, 12, generator=generator))
                each.log_step(step=step, epoch=0)
                if step == 89:
                    each.flush()
                    checkpoints.append(each.state_dict())
    assert alarms
    assert [str(alarm) for alarm in read_run(tmp_path).alarms] == alarms
