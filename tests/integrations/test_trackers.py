"""The trackers, against the real packages: what they write is read back."""

import importlib
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.utils.tensorboard import SummaryWriter

from mixture_torch import MixtureStats
from mixture_torch.integrations import plane as pictures
from mixture_torch.integrations.tensorboard import TensorBoard
from mixture_torch.integrations.wandb import WandB
from tests.wrapper.samples import estimator, mixture

STEPS = 63  # of which the last three lack a cluster
READINGS = ("effective_rank", "rankme", "nc1")


def run(tracker: Any, before: Any = lambda step: None, **options: Any) -> dict[str, list[float]]:
    """Trains for a while, with a snapshot at the end; returns the known scalars by name."""
    known: dict[str, list[float]] = {}
    with estimator(tracker=tracker, on_alarm=lambda _: None, **options) as wrapper:
        for step in range(STEPS):
            before(step)
            stats = wrapper.update(mixture(60, K=3 if step < 60 else 2, D=6, seed=step)[0])
            wrapper.log_step(step=step, epoch=0)
            for name, value in stats.scalars().items():
                known.setdefault(f"mixture/{name}", []).append(value)
        wrapper.flush()
    return {name: values for name, values in known.items() if not math.isnan(values[0])}


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()


@pytest.mark.parametrize("own", [False, True], ids=["folder", "writer"])
def test_tensorboard_has_the_scalars_the_alarms_the_plane_and_charts(own: bool, tmp_path: Path) -> None:
    scalars = run(TensorBoard(SummaryWriter(tmp_path) if own else tmp_path))
    found = read(tmp_path)
    assert set(found.Tags()["scalars"]) == {*scalars, *(f"mixture/{name}" for name in READINGS)}
    for name, values in scalars.items():
        events = found.Scalars(name)
        assert [event.step for event in events] == list(range(STEPS))
        assert torch.equal(torch.tensor([event.value for event in events]), torch.tensor(values))
    (alarm, *_) = found.Tensors("mixture/alarms/text_summary")
    assert b"composition (component " in alarm.tensor_proto.string_val[0]
    (image,) = found.Images("mixture/plane")
    assert (image.step, image.width, image.height) == (STEPS - 1, 600, 600)
    (event,) = found.Tensors("custom_scalars__config__")
    (category,) = Layout.FromString(event.tensor_proto.string_val[0]).category
    assert category.title == "mixture"
    tags = {chart.title: "|".join(chart.multiline.tag) for chart in category.chart}
    shown = {title: [tag for tag in found.Tags()["scalars"] if re.search(tags[title], tag)] for title in tags}
    assert all(shown.values())
    assert sorted(shown["weights"]) == ["mixture/pi_0", "mixture/pi_1", "mixture/pi_2"]


def test_tensorboard_makes_no_file_before_the_first_row(tmp_path: Path) -> None:
    run(TensorBoard(tmp_path), is_main=False)
    assert not list(tmp_path.iterdir())


def test_tensorboard_is_complete_at_the_end_of_the_program(tmp_path: Path) -> None:
    script = f"""
import torch
from mixture_torch import MixtureStats
from mixture_torch.integrations.tensorboard import TensorBoard

estimator = MixtureStats(K=2, enabled=True, tracker=TensorBoard({str(tmp_path)!r}))
for step in range(100):
    estimator.update(torch.randn(20, 4))
    estimator.log_step(step=step, epoch=0)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
    assert len(read(tmp_path).Scalars("mixture/trace_B")) == 100


def test_tensorboard_that_cannot_write_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="The tracker raised [A-Za-z]*Error at step 0: ") as said:
        run(TensorBoard(tmp_path / "file" / "folder"))
    assert len(said) == 1


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A real run that needs no network."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(project="mixture", dir=tmp_path) as run:
        yield run


@pytest.mark.parametrize("loop", ["without steps", "before the row", "after the row"])
def test_wandb_offline_has_the_last_row_and_loses_nothing_of_the_loop(loop: str, offline: Any) -> None:
    def log(step: int) -> None:
        own = {"without steps": None, "before the row": step, "after the row": max(step - 1, 0)}[loop]
        offline.log({"loss": step}, step=own)

    scalars = run(WandB(offline, with_step=loop != "without steps"), log)
    offline.log({}, commit=True)  # ends the last step, which the summary lacks until then
    found = dict(offline.summary)
    assert found["loss"] == STEPS - 1
    assert {name: found[name] for name in scalars} == {name: values[-1] for name, values in scalars.items()}
    assert found["mixture/step"] == STEPS - 1
    picture = Path(offline.dir) / found["mixture/plane"]["path"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_wandb_gets_each_row_alarm_and_axis() -> None:
    calls: list[Any] = []
    stub: Any = SimpleNamespace(
        log=lambda data, commit: calls.append((data, commit)),
        alert=lambda **options: calls.append(options),
        define_metric=lambda *names, **options: calls.append((names, options)),
    )
    scalars = run(WandB(stub))
    axis, *others = calls
    assert axis == (("mixture/*",), {"step_metric": "mixture/step"})
    *rows, (snapshot, commit) = [call for call in others if isinstance(call, tuple)]
    assert {f"mixture/{name}" for name in READINGS} <= set(snapshot)
    assert not commit
    assert [(data["mixture/step"], commit) for data, commit in rows] == [(step, True) for step in range(STEPS)]
    for name, values in scalars.items():
        assert [data[name] for data, _ in rows] == values
    (alert, *_) = [call for call in others if isinstance(call, dict)]
    assert alert["title"].startswith("Mixture: composition (component ")
    assert alert["text"].startswith("composition (component ")
    assert alert["level"] == wandb.AlertLevel.WARN.value


def test_wandb_run_that_is_finished_ends_no_run(offline: Any) -> None:
    tracker = WandB(offline)
    offline.finish()
    with pytest.warns(UserWarning, match="The tracker raised .* at step 0: ") as said:
        run(tracker)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("make", "value", "text"),
    [
        (TensorBoard, None, "`writer` must be a SummaryWriter of torch or a folder, got NoneType."),
        (WandB, None, "`run` must be what `wandb.init` returned, got None; other ranks need no tracker."),
    ],
)
def test_trackers_name_what_they_expect(make: Any, value: Any, text: str) -> None:
    with pytest.raises(TypeError) as error:
        make(value)
    assert str(error.value) == text


def test_missing_tensorboard_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mixture_torch.integrations.tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r'^`TensorBoard` needs tensorboard: pip install "mixture-diagnostics\['):
        importlib.import_module("mixture_torch.integrations.tensorboard")


def test_trackers_need_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    run(TensorBoard(tmp_path))
    assert not read(tmp_path).Tags()["images"]


@pytest.mark.parametrize(
    ("K", "x"),
    [
        (1, torch.randn(20, 3)),
        (2, torch.randn(20, 1)),
        (3, torch.zeros(20, 4)),
        (60, torch.randn(300, 5)),
        (2, 1e12 * torch.randn(20, 3)),
    ],
    ids=["one component", "one dimension", "a point", "many components", "large"],
)
def test_plane_of_any_mixture_is_drawn(K: int, x: torch.Tensor) -> None:
    entries: list[dict[str, Any]] = []

    class Keeps:
        def __call__(self, scalars: dict[str, float], step: int) -> None: ...

        snapshot = staticmethod(entries.append)

    with MixtureStats(K=K, enabled=True, tracker=Keeps(), relocate=False) as wrapper:
        wrapper.update(x)
        wrapper.log_step(step=0, epoch=0)
        wrapper.flush()
    picture = pictures.plane(entries[0])
    assert picture is not None
    assert (picture.shape, len(np.unique(picture)) > 2) == ((600, 600, 3), True)
