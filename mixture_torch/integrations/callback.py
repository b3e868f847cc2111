"""The base of the callbacks for trainers: an estimator that a layer feeds."""

import difflib
import os
from pathlib import Path
from typing import Any

from torch import nn

from mixture_torch.estimator import MixtureStats
from mixture_torch.integrations.hooks import LayerHook, Output, Reduce, watch

Folder = str | os.PathLike[str] | None


class LayerCallback:
    """Fits a mixture to the output of a layer during training, and writes one row per step.

    Args:
        layer: Name of the layer, as in `model.named_modules()`; "" is the whole model.
        K: Number of components.
        log_dir: Folder for the files; None means the trainer's.
        name: Subfolder for the files, and part of the names of scalars; needed if there are several callbacks.
        enabled: False makes the callback do nothing.
        output, reduce, views, forwards: See `watch`.
        **options: Any other option of `MixtureStats`.

    Raises:
        TypeError: An option is unknown, or of the wrong type.
        ValueError: An option is out of range. When training begins: the model has no such layer.
    """

    def __init__(
        self,
        layer: str,
        *,
        K: int,
        log_dir: Folder = None,
        name: str = "",
        enabled: bool = True,
        output: Output = None,
        reduce: Reduce = "mean",
        views: int = 1,
        forwards: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        self.layer, self.name = layer, name
        self.estimator: MixtureStats | None = None  # made when training begins
        self._log_dir = log_dir
        self._options: dict[str, Any] = {"K": K, "enabled": enabled, **options}
        self._how: dict[str, Any] = {"output": output, "reduce": reduce, "views": views, "forwards": forwards}
        self._hook: LayerHook | None = None
        self._place = (0, 0)  # (step, epoch) of the step under way
        if not isinstance(layer, str) or not isinstance(name, str):
            raise TypeError(f"`layer` and `name` must be strings, got {layer!r} and {name!r}.")
        watch(nn.Identity(), MixtureStats(log_dir=os.curdir, **self._options), **self._how)  # errors come at once

    def _make(self, folder: Folder, *, continues: bool = False, writes: bool = True) -> MixtureStats:
        """Makes a new estimator, or keeps the present one if training `continues`; `folder` is the trainer's."""
        if self.estimator is None or not continues:
            folder = folder if self._log_dir is None else self._log_dir
            log_dir = Path(os.curdir if folder is None else folder) / self.name
            options = self._options if writes else self._options | {"is_main": False}
            self.estimator = MixtureStats(log_dir=log_dir, **options)
        return self.estimator

    def _watch(self, model: nn.Module) -> None:
        """Lets the layer of a model feed the estimator."""
        if self.estimator is not None and self.estimator.enabled:
            self._hook = watch(_find(model, self.layer), self.estimator, **self._how)

    def _begin(self, step: int, epoch: int) -> None:
        """Begins a part of a training step, such as one batch of gradient accumulation."""
        if self._hook is not None:
            self._place = step, epoch
            self._hook.begin(step)

    def _end(self) -> bool:
        """Writes the row of a training step, and returns whether there was an update."""
        if self._hook is None or self.estimator is None:
            return False
        has_row, self._hook.has_row = self._hook.has_row, False
        if has_row or not self.estimator.stats:  # without any update it warns
            step, epoch = self._place
            self.estimator.log_step(step=step, epoch=epoch)
        return has_row

    def _scalars(self) -> dict[str, float]:
        """Returns the figures of the last update that are not nan, such as `mixture/trace_B`."""
        prefix = f"mixture/{self.name}/" if self.name else "mixture/"
        scalars = {} if self.estimator is None else self.estimator.stats.scalars()
        return {prefix + name: value for name, value in scalars.items() if value == value}  # nan is not equal to itself

    def _stop(self) -> None:
        """Stops watching and closes the estimator, which can still be read."""
        if self._hook is not None and self.estimator is not None:
            self._hook.remove()
            self._hook = None
            self.estimator.close()


def _find(model: nn.Module, layer: str) -> nn.Module:
    """Returns a layer by its name."""
    layers: dict[str, nn.Module] = dict(model.named_modules())
    if layer not in layers:
        near = difflib.get_close_matches(layer, layers, n=1)
        hint = (
            f"did you mean `{near[0]}`?"
            if near
            else f"its own layers are {[name for name, _ in model.named_children()]}."
        )
        raise ValueError(f"`layer` must be the name of a layer of {type(model).__name__}, got {layer!r}; {hint}")
    return layers[layer]
