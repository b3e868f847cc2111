"""`MixtureCallback` for the trainers of Transformers and Sentence Transformers."""

import inspect
import os
import warnings
from pathlib import Path
from typing import Any

from mixture_torch.files.shards import load_checked, save
from mixture_torch.integrations.callback import LayerCallback

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler
except ModuleNotFoundError as error:
    raise ImportError(
        '`MixtureCallback` needs Transformers: pip install "mixture-diagnostics[transformers]"'
    ) from error


class MixtureCallback(LayerCallback, TrainerCallback):
    """Fits a mixture to a layer's output during `Trainer.train`; its arguments are those of `LayerCallback`.

    The mixture is saved as `mixture.pt` in each checkpoint, and a resumed run continues it. Whenever the trainer logs
    its loss, reporters and `trainer.state.log_history` get scalars such as `mixture/trace_B`. Each rank has its own
    mixture unless `cross_rank` is set. Padding tokens count, so watch a layer that pools.

    Example:
        >>> from mixture_torch.integrations.transformers import MixtureCallback
        >>> callback = MixtureCallback("bert.pooler", K=8, log_dir="runs/transformers")
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Makes the estimator, loads the mixture of the checkpoint if there is one, and watches the layer."""
        handler = _of_callers("self", CallbackHandler)
        if handler is not None and self in handler.callbacks:  # before reporters, which log what `on_log` adds
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)
        self._stop()
        estimator = self._make(args.output_dir)
        if state.global_step > 0 and estimator.enabled:
            path = (
                Path(_of_callers("resume_from_checkpoint", (str, os.PathLike)) or _checkpoint(args, state)) / self._file
            )
            if path.is_file():
                estimator.load_state_dict(load_checked(path, _is_mapping, expected="the mixture of a checkpoint"))
            else:
                warnings.warn(f"There is no `{path}`, so the mixture starts afresh.", stacklevel=2)
        self._watch(model)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Notes the step and the epoch, because the trainer increases them before the step ends."""
        self._begin(state.global_step, int(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Writes the row."""
        self._end()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Adds the scalars to what the trainer logs about its training."""
        if logs is not None and "loss" in logs and state.is_world_process_zero:
            scalars = self._scalars()
            logs.update(scalars)
            state.log_history[-1].update(scalars)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Saves the mixture in the checkpoint that the trainer has just written."""
        folder = _checkpoint(args, state)
        if self._hook is None or self.estimator is None or not (self.estimator.is_main and folder.is_dir()):
            return
        try:
            self.estimator.flush()
            save(folder / self._file, self.estimator.state_dict())
        except OSError as error:
            warnings.warn(f"`{folder / self._file}` was not written: {error}.", stacklevel=2)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Completes the files."""
        self._stop()

    @property
    def _file(self) -> str:
        return f"mixture_{self.name}.pt" if self.name else "mixture.pt"


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Returns the folder of the checkpoint of the current step."""
    return Path(str(args.output_dir), f"checkpoint-{state.global_step}")


def _of_callers(name: str, kind: Any) -> Any:
    """Returns a local variable of a calling function, because the trainer does not pass it to callbacks."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(value := frame.f_locals.get(name), kind):
            return value
        frame = frame.f_back
    return None
