"""The Transformers callback, in its own trainer and in that of Sentence Transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments

from mixture_torch import read_extra, read_log
from mixture_torch.integrations.transformers import MixtureCallback
from tests.integrations.exact import EPOCHS, OPTIONS, STEPS, N, Net, batches, log, loss_of, optimizer_of, plain


class Model(nn.Module):
    """The exact training, as Transformers wants a model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        z = self.net(x)
        return {"loss": loss_of(z, target), "logits": z}


def train(folder: Path, *callbacks: TrainerCallback, resume: Path | None = None, **options: Any) -> Trainer:
    fixed = {"num_train_epochs": EPOCHS, "max_grad_norm": 0, "train_sampling_strategy": "sequential", "use_cpu": True}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 2}
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=N, **(fixed | quiet | options))
    model = Model()
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    rows = [{"x": x, "target": target} for batch in batches() for x, target in zip(*batch, strict=True)]
    trainer = Trainer(model, arguments, optimizers=(optimizer, schedule), callbacks=list(callbacks), train_dataset=rows)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def mixture(folder: Path | None = None, **options: Any) -> MixtureCallback:
    return MixtureCallback("net.projector", log_dir=folder, **(OPTIONS | options))


def test_transformers_writes_the_log_of_a_plain_loop_and_keeps_the_weights(plain_log: bytes, tmp_path: Path) -> None:
    trainer = train(tmp_path, mixture())  # into the trainer's own folder
    assert log(tmp_path) == plain_log
    assert torch.equal(trainer.model.net.encoder.weight, plain(None))


@pytest.mark.parametrize("moved", [False, True], ids=["in place", "moved"])
def test_a_resumed_run_has_the_log_of_a_whole_one(plain_log: bytes, tmp_path: Path, moved: bool) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
            control.should_training_stop = state.global_step == 5

    train(tmp_path, mixture(tmp_path), Stop(), save_strategy="steps", save_steps=3)
    checkpoint = tmp_path / "checkpoint-3"
    assert len(read_log(tmp_path)["step"]) == 5
    if moved:
        checkpoint = checkpoint.rename(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match=r"rows? "):
        train(tmp_path, mixture(tmp_path), resume=checkpoint)
    assert log(tmp_path) == plain_log


def test_a_checkpoint_without_a_mixture_is_said(tmp_path: Path) -> None:
    train(tmp_path, save_strategy="steps", save_steps=3)
    with pytest.warns(UserWarning, match=r"no `.*checkpoint-3/mixture.pt`, so the mixture starts afresh"):
        train(tmp_path, mixture(tmp_path), resume=tmp_path / "checkpoint-3")
    assert len(read_log(tmp_path)["step"]) == STEPS * EPOCHS - 3


def test_a_damaged_mixture_is_one_line(tmp_path: Path) -> None:
    train(tmp_path, mixture(tmp_path), save_strategy="steps", save_steps=3)
    (tmp_path / "checkpoint-3" / "mixture.pt").write_bytes(b"else")
    with pytest.raises(ValueError, match=r"checkpoint-3/mixture.pt` is not the mixture of a checkpoint"):
        train(tmp_path, mixture(tmp_path), resume=tmp_path / "checkpoint-3")


def test_reporters_get_the_scalars_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = train(tmp_path, mixture(tmp_path), report_to="tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "board")).Reload().Scalars("train/mixture/trace_B")
    want = read_log(tmp_path)["trace_B"][1::2].tolist()
    assert [event.value for event in events] == pytest.approx(want)
    history = [entry["mixture/trace_B"] for entry in trainer.state.log_history if "mixture/trace_B" in entry]
    assert history == pytest.approx(want)


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    train(tmp_path, mixture(tmp_path), gradient_accumulation_steps=2)
    assert read_log(tmp_path)["step"].tolist() == list(range(STEPS * EPOCHS // 2))
    assert set(read_extra(tmp_path)["n_rows"]) == {2 * N}


def test_a_wrong_layer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got 'net.projectr'; did you mean `net.projector`"):
        train(tmp_path, MixtureCallback("net.projectr", K=2))
