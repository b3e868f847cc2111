"""The Lightning callback."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from mixture_torch import MixtureStats, read_log
from mixture_torch.integrations.lightning import MixtureCallback
from tests.integrations.exact import EPOCHS, OPTIONS, STEPS, Net, batches, log, loss_of, optimizer_of, plain
from tests.integrations.lightning_runs import Module, ddp, ended, fit, free_port, killed

pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning", "ignore:.*LeafSpec.*")


def mixture(folder: Path | None = None, **options: Any) -> MixtureCallback:
    return MixtureCallback("net.projector", log_dir=folder, **(OPTIONS | options))


def test_lightning_writes_the_log_of_a_plain_loop(plain_log: bytes, tmp_path: Path) -> None:
    fit(tmp_path, mixture(tmp_path))
    assert log(tmp_path) == plain_log


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a run on two ranks, and what each of them came to."""
    folder, port = tmp_path_factory.mktemp("ddp"), free_port()
    assert ended(*((ddp, (rank, port, folder)) for rank in range(2))) == [0, 0]
    return folder, [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_two_ranks_write_the_log_of_a_plain_loop_and_monitor_it(plain_log: bytes, two_ranks: Any) -> None:
    folder, ranks = two_ranks
    assert log(folder) == plain_log
    assert [rank["best"] for rank in ranks] == 2 * [min(read_trace(folder))]


@pytest.mark.parametrize("how", ["lightning", "watch"])
def test_weights_on_two_ranks_are_the_same_to_the_bit(how: str, two_ranks: Any) -> None:
    _, ranks = two_ranks
    without, *others = (weights for rank in ranks for weights in rank[how])
    assert all(torch.equal(weights, without) for weights in others)


def read_trace(folder: Path) -> list[float]:
    return [float(torch.tensor(value, dtype=torch.float32)) for value in read_log(folder)["trace_B"]]


def test_a_killed_and_resumed_run_has_the_log_of_a_whole_one(plain_log: bytes, tmp_path: Path) -> None:
    assert ended((killed, (tmp_path,))) == [-9]
    assert len(read_log(tmp_path)["step"]) == 6
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")  # of step 4
    with pytest.warns(UserWarning, match="superseded|moved"):
        fit(tmp_path, mixture(tmp_path), ckpt=checkpoint)
    assert log(tmp_path) == plain_log


def test_weights_are_the_same_to_the_bit(tmp_path: Path) -> None:
    with_it, without = fit(tmp_path, mixture(tmp_path)), fit(tmp_path)
    assert torch.equal(with_it.net.encoder.weight, without.net.encoder.weight)
    assert torch.equal(with_it.net.encoder.weight, plain(None))


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    fit(tmp_path / "a", mixture(tmp_path / "a"), parts=2)
    net, estimator = Net(), MixtureStats(log_dir=tmp_path / "b", enabled=True, **OPTIONS)
    optimizer = optimizer_of(net)
    for step in range(STEPS * EPOCHS):
        x, target = batches()[step % STEPS]
        for part, goal in zip(x.chunk(2), target.chunk(2), strict=True):
            z = net(part)
            (loss_of(z, goal) / 2).backward()
            estimator.update(z, step=step)
        optimizer.step()
        optimizer.zero_grad()
        estimator.log_step(step=step, epoch=step // STEPS)
    estimator.close()
    assert log(tmp_path / "a") == log(tmp_path / "b")


def test_default_folder_and_loggers(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(tmp_path, mixture(), logger=logger, log_every_n_steps=2)
    folder = tmp_path / "lightning_logs" / "version_0"
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    traces = {row[rows[0].index("mixture/trace_B")] for row in rows[1:]}
    assert len(traces) == 4  # every second of eight steps
    assert {round(float(value), 5) for value in traces} == {round(value, 5) for value in read_trace(folder)[1::2]}


def test_progress_bar_gets_trace_b(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    class Look(Callback):
        def on_train_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append(set(trainer.progress_bar_metrics))

    fit(tmp_path, mixture(tmp_path), Look())
    assert seen == [{"mixture/trace_B"}]


def test_monitoring_every_step_works_with_rare_logging(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="mixture/encoder/trace_B", every_n_train_steps=1)
    fit(tmp_path, MixtureCallback("net.encoder", K=2, name="encoder", log_dir=tmp_path), best, log_every_n_steps=50)
    assert best.best_model_score is not None


def test_several_layers_have_a_folder_and_a_state_each(tmp_path: Path) -> None:
    both = [MixtureCallback(f"net.{name}", name=name, log_dir=tmp_path, **OPTIONS) for name in ("encoder", "projector")]
    save = ModelCheckpoint(tmp_path)
    fit(tmp_path, *both, save)
    assert all(len(read_log(tmp_path / name)["step"]) == STEPS * EPOCHS for name in ("encoder", "projector"))
    states = torch.load(save.best_model_path, weights_only=True)["callbacks"]
    assert {callback.state_key for callback in both} <= set(states)


def test_a_layer_made_late_is_found_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    class Late(Module):
        def configure_model(self) -> None:
            self.late = torch.nn.Identity()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return loss_of(self.late(self.net(batch[0])), batch[1])

    callback = MixtureCallback("late", log_dir=tmp_path, **OPTIONS)
    trainer = Trainer(fast_dev_run=True, callbacks=[callback], accelerator="cpu", enable_progress_bar=False)
    trainer.fit(Late())
    assert callback.estimator is not None
    assert callback.estimator.stats
    assert not list(tmp_path.iterdir())  # a trial writes nothing
    with pytest.raises(
        ValueError, match=r"`layer` must be .* of Module, got 'net.projectr'; did you mean `net.projector`"
    ):
        fit(tmp_path, MixtureCallback("net.projectr", K=2))


def test_disabled_does_nothing_and_bad_options_raise_at_once(tmp_path: Path) -> None:
    fit(tmp_path, mixture(tmp_path, enabled=False))
    assert not list(tmp_path.glob("mixture*"))
    with pytest.raises(TypeError, match="`K`"):
        MixtureCallback("net", K="8")
    with pytest.raises(ValueError, match="`reduce`"):
        MixtureCallback("net", K=8, reduce="max")


def test_an_error_ends_the_watch_and_completes_the_files(tmp_path: Path) -> None:
    class Fail(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("out of luck")

    callback = mixture(tmp_path)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path, callback, Fail())
    assert (tmp_path / "mixture_last.pt").exists()
    assert len(read_log(tmp_path)["step"]) == 3


def test_a_layer_that_never_completes_a_batch_is_said_once(tmp_path: Path) -> None:
    callback = MixtureCallback("net.projector", log_dir=tmp_path / "log", forwards=5, **OPTIONS)
    with pytest.warns(UserWarning, match="`forwards` times a step") as said:
        fit(tmp_path, callback)
    assert sum("nothing to log" in str(one.message) for one in said) == 1
