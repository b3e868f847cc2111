"""What can be read from an estimator: its options, its state and its last statistics."""

from collections.abc import Mapping
from typing import Any, Literal, NoReturn

import attrs
from torch import Tensor

import mixture_core
from mixture_core import MixtureState
from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.update.batch import as_plain_embeddings
from mixture_torch.update.checkpoint import completed, to_device, to_state_dict
from mixture_torch.update.mixture import Mixture
from mixture_torch.update.precision import full_float32
from mixture_torch.update.ranks import is_main_rank
from mixture_torch.update.stats import NOTHING, StepStats

DEFAULTS = MixtureRuntimeConfig()
DISABLED = (
    "MixtureStats is disabled, since `enabled` was left out: `update` and `log_step` do nothing. Give enabled=True to "
    "enable it, or enabled=False to silence this warning."
)


def as_config(config: Any) -> MixtureRuntimeConfig:
    """Returns a configuration, or that in a mapping; raises a TypeError for anything else."""
    if isinstance(config, Mapping):
        return MixtureRuntimeConfig.from_mapping(config)
    if not isinstance(config, MixtureRuntimeConfig):
        raise TypeError(f"`config` must be a MixtureRuntimeConfig or a mapping, got {config!r}.")
    return config


def check_process(config: MixtureRuntimeConfig, *, log_dir: Any, is_main: Any, on_alarm: Any, tracker: Any) -> None:
    """Raises a TypeError or ValueError if an option of the process is wrong, or others have no effect with it."""
    if is_main is not None and not isinstance(is_main, bool):
        raise TypeError(f"`is_main` must be true, false or None, got {is_main!r}.")
    if on_alarm is not None and not callable(on_alarm):
        raise TypeError(f"`on_alarm` must be a function of an alarm, or None, got {on_alarm!r}.")
    for name, value in (("on_alarm", on_alarm), ("snapshot_every", config.snapshot_every)):
        if value is not None and not config.extra:
            raise ValueError(f"`extra` must be true with `{name}`, which rests on these figures, got False.")
    needs_folder = {"store_scores": config.store_scores, "snapshot_every": config.snapshot_every and tracker is None}
    if log_dir is None and config.enabled and is_main is not False:
        for name in [name for name, needs in needs_folder.items() if needs]:
            raise ValueError(f"`log_dir` must be given with `{name}`, got None.")


class View:
    """The part of an estimator that changes nothing."""

    def __init__(self, config: MixtureRuntimeConfig, *, is_main: bool | None, process_group: Any) -> None:
        self._config, self._is_main, self._group = config, is_main, process_group
        self._mixture = Mixture(config, process_group)
        self._stats = NOTHING

    @property
    def config(self) -> MixtureRuntimeConfig:
        """All options that a configuration file can set."""
        return self._config

    @property
    def enabled(self) -> bool:
        """Whether the estimator does anything."""
        return self._config.enabled

    @property
    def K(self) -> int:
        """Number of components."""
        return self._config.K

    @property
    def mode(self) -> Literal["per_batch", "ema", "label_supervised"]:
        """The `mode` option."""
        return self._config.mode

    @property
    def assigner(self) -> Literal["kmeans_online", "label_supervised"]:
        """The `assigner` option."""
        return self._config.assigner

    @property
    def ema_decay(self) -> float:
        """Factor by which earlier weights are multiplied each step."""
        return self._config.ema_decay

    @property
    def is_main(self) -> bool:
        """Whether this process writes files: as given, or whether it is rank 0 now."""
        return is_main_rank(self._group) if self._is_main is None else self._is_main

    @property
    def state(self) -> MixtureState | None:
        """A copy of the state that the next update starts from; None before the first update."""
        own = self._mixture.progress.state
        if own is None:
            return None
        with full_float32(own.moments.weight):
            return completed(own)

    @property
    def stats(self) -> StepStats:
        """The statistics that the last update returned; empty before the first."""
        return self._stats

    def assign(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """Returns R, (N, K) float32, by the nearest mean or the label of each row; it updates nothing.

        Args:
            embeddings: (N, D), tensor or NumPy array.
            labels: (N,) integers; not used unless responsibilities come from labels.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: A shape is wrong, there has been no update, or the estimator is disabled.
        """
        state = self._mixture.progress.state
        if state is None:
            why = "call `update` first" if self.enabled else "the estimator is disabled"
            raise ValueError(f"There is no mixture to assign to: {why}.")
        with full_float32(embeddings):
            x = as_plain_embeddings(embeddings)
            return mixture_core.assign(to_device(state, x.device), x, labels)

    def state_dict(self, *, dim: int | None = None) -> dict[str, Tensor | int | str]:
        """Returns all that a resumed run needs, as tensors, ints and strings, always under the same keys.

        `torch.load` reads it with its safe defaults. `torch.distributed.checkpoint` loads in place and needs the final
        shapes: give `dim` if it loads into an estimator that has had no update.

        Args:
            dim: D, for the shapes before the first update; None means the estimator's `dim`, or 0 if unset.
        """
        with full_float32(None):
            return to_state_dict(self._config.core, self._mixture.progress, dim=dim or self._config.dim)

    def __repr__(self) -> str:
        """Returns the options that differ from the defaults, D, and how many updates this object had, in one line."""
        options = ((field.name, getattr(self._config, field.name)) for field in attrs.fields(MixtureRuntimeConfig))
        said = [f"{name}={value!r}" for name, value in options if name == "K" or value != getattr(DEFAULTS, name)]
        n, D = self._mixture.n_updates, self._mixture.progress.D
        return f"MixtureStats({', '.join(said)}; {'' if D is None else f'D={D}, '}{n} update{'' if n == 1 else 's'})"

    def __reduce__(self) -> NoReturn:
        """Refuses to be pickled: in another process it would write to the same files."""
        raise TypeError(
            "A MixtureStats cannot be pickled because it writes to its `log_dir`. Make a new one in the other process "
            "and give it the `state_dict()` of this one by `load_state_dict`."
        )
