"""A tracker that writes to Weights & Biases."""

from collections.abc import Mapping
from typing import Any

from mixture_core.alarms import Alarm
from mixture_torch.integrations.plane import named, plane, readings


class WandB:
    """Shows the mixture in a run of Weights & Biases, as the `tracker` of an estimator; offline runs too.

    Figures are under `mixture/`, over `mixture/step`, without those that are nan. Each alarm is an alert. Each snapshot
    adds a few figures and, if matplotlib is installed, a picture, `mixture/plane`.

    Args:
        run: What `wandb.init` returned.
        with_step: Set this if you call `run.log(..., step=...)` with the training step. By default, each row advances
            wandb's own step, and wandb would drop your figures with an earlier one.

    Raises:
        TypeError: `run` is not a run; for example, it is None on a rank that did not call `wandb.init`.

    Example:
        >>> from mixture_torch import MixtureStats
        >>> from mixture_torch.integrations.wandb import WandB
        >>> import wandb  # doctest: +SKIP
        >>> estimator = MixtureStats(K=8, enabled=True, tracker=WandB(wandb.init()))  # doctest: +SKIP
    """

    def __init__(self, run: Any, *, with_step: bool = False) -> None:
        if not all(hasattr(run, name) for name in ("define_metric", "log", "alert")):
            raise TypeError(f"`run` must be what `wandb.init` returned, got {run!r}; other ranks need no tracker.")
        self._run, self._with_step = run, with_step
        run.define_metric("mixture/*", step_metric="mixture/step")

    def __call__(self, scalars: Mapping[str, float], step: int) -> None:
        """Logs the figures of a row."""
        self._log(named(scalars), step, commit=True)

    def alarm(self, alarm: Alarm) -> None:
        """Raises an alert; wandb sends one of each title per minute."""
        about = "" if alarm.component is None else f" (component {alarm.component})"
        self._run.alert(title=f"Mixture: {alarm.kind}{about}", text=str(alarm), level="WARN")

    def snapshot(self, entry: Mapping[str, Any]) -> None:
        """Logs a snapshot, as a picture and figures."""
        shown: dict[str, Any] = {}
        if (picture := plane(entry)) is not None:
            import wandb

            shown["mixture/plane"] = wandb.Image(picture)
        self._log({**readings(entry), **shown}, entry["step"], commit=False)  # does not advance wandb's own step

    def _log(self, logged: Mapping[str, Any], step: int, *, commit: bool) -> None:
        how = {"step": step} if self._with_step else {"commit": commit}
        self._run.log({**logged, "mixture/step": step}, **how)
