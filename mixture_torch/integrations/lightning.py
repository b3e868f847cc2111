"""`MixtureCallback` for Lightning."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixture_torch.integrations.callback import LayerCallback

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    packages = ["lightning.pytorch", "pytorch_lightning"]  # two packages with one content; a trainer needs its own
    packages.sort(key=lambda package: package not in sys.modules)
    try:
        Callback = import_module(packages[0]).Callback
    except ModuleNotFoundError:
        try:
            Callback = import_module(packages[1]).Callback
        except ModuleNotFoundError as error:
            raise ImportError(
                '`MixtureCallback` needs Lightning: pip install "mixture-diagnostics[lightning]"'
            ) from error


class MixtureCallback(LayerCallback, Callback):
    """Fits a mixture to a layer's output during `Trainer.fit`; its arguments are those of `LayerCallback`.

    Checkpoints hold the mixture, and a resumed run continues it. Loggers, `ModelCheckpoint` and the progress bar get
    scalars such as `mixture/trace_B` at the first step, then every `log_every_n_steps` steps and at the end of each
    epoch. Each rank has its own mixture unless `cross_rank` is set.

    Example:
        >>> from mixture_torch.integrations.lightning import MixtureCallback
        >>> callback = MixtureCallback("projector", K=8, log_dir="runs/lightning")
        >>> callback.state_key
        "MixtureCallback{'layer': 'projector', 'name': ''}"
    """

    @property
    def state_key(self) -> str:
        """The key of the mixture in a checkpoint."""
        return self._generate_state_key(layer=self.layer, name=self.name)

    def setup(self, trainer: Any, pl_module: "LightningModule", stage: str) -> None:
        """Makes the estimator, before a checkpoint is loaded into it."""
        if stage == "fit":
            self._make(_folder_of(trainer), continues=trainer.global_step > 0, writes=not trainer.fast_dev_run)
            self._is_first = True

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Watches the layer; `configure_model` has made it by now."""
        self._watch(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Returns the mixture, for a checkpoint."""
        if self.estimator is None:
            return {}
        self.estimator.flush()
        return self.estimator.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the mixture of a checkpoint."""
        if self.estimator is not None and self.estimator.enabled and state_dict:
            self.estimator.load_state_dict(state_dict)

    def on_train_batch_start(self, trainer: "Trainer", *_: Any) -> None:
        """Notes the step, because the trainer increases it before the batch ends."""
        self._begin(trainer.global_step, trainer.current_epoch)

    def on_train_batch_end(self, trainer: Any, pl_module: "LightningModule", *_: Any) -> None:
        """Writes the row if the optimizer made a step; within gradient accumulation it does not."""
        step, every = trainer.global_step, trainer.log_every_n_steps
        if step == self._place[0] or not self._end():
            return
        if self._is_first or trainer.is_last_batch or (every > 0 and step % every == 0):
            self._is_first = False
            for name, value in self._scalars().items():  # on all ranks: each has a ModelCheckpoint that reads them
                pl_module.log(name, value, prog_bar=name.endswith("/trace_B"))

    def teardown(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Completes the files."""
        self._stop()

    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        """Completes the files."""
        self._stop()


def _folder_of(trainer: "Trainer") -> str | Path:
    """Returns the folder of the trainer's first logger; without a logger, its `default_root_dir`."""
    if not trainer.loggers:
        return trainer.default_root_dir
    logger = trainer.loggers[0]
    if folder := getattr(logger, "log_dir", None):
        return str(folder)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version
