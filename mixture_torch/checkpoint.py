"""An estimator's state as plain tensors, ints and strings, and back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mixture_core import MixtureConfig, MixtureState, Moments

VERSION = 1


def to_state_dict(
    config: MixtureConfig, state: MixtureState | None, waiting: Tensor | None
) -> dict[str, Tensor | int | str]:
    """Returns copies, so that nothing that happens to either side reaches the other.

    Args:
        config: The choices.
        state: None before the first update: D is 0 then.
        waiting: (n, D) rows that wait until there are enough to start from; None where there were enough.
    """
    K = config.K
    if state is None:
        weight = torch.zeros(K, dtype=torch.float32, device="cpu")  # whatever torch's defaults are
        moments = Moments(weight=weight, mean=weight.new_zeros(K, 0), covariance=weight.new_zeros(K, 0, 0))
    else:
        moments = state.moments
    D = moments.mean.shape[1]
    return {
        "version": VERSION,
        "K": K,
        "D": D,
        "mode": config.mode,
        "assigner": config.assigner,
        "weight": moments.weight.clone(),
        "mean": moments.mean.clone(),
        "covariance": moments.covariance.clone(),
        "started": int(state is not None and waiting is None),
        "waiting": moments.mean.new_zeros(0, D) if waiting is None else waiting.clone(),
    }


def from_state_dict(config: MixtureConfig, state_dict: Mapping[str, Any]) -> tuple[MixtureState | None, Tensor | None]:
    """Returns the state and the waiting rows that `to_state_dict` was given, as copies.

    Raises:
        ValueError: Keys are missing or unknown, or the state is of another version, K, mode, assigner or shape.
    """
    wanted = to_state_dict(config, None, None)
    if set(state_dict) != set(wanted):
        raise ValueError(
            f"The state_dict must have the keys {', '.join(wanted)}, got {', '.join(map(str, state_dict))}."
        )
    for key in ("version", "K", "mode", "assigner"):
        if state_dict[key] != wanted[key]:
            raise ValueError(f"The state_dict must have {key} {wanted[key]!r}, got {state_dict[key]!r}.")
    K, D = config.K, state_dict["D"]
    tensors = {}
    for key, shape in {"weight": (K,), "mean": (K, D), "covariance": (K, D, D), "waiting": (..., D)}.items():
        tensor = state_dict[key]
        if not isinstance(tensor, Tensor) or len(tensor.shape) != len(shape) or tensor.shape[1:] != shape[1:]:
            raise ValueError(f"The state_dict must have a tensor of shape {shape} as {key}, got {tensor!r}.")
        tensors[key] = tensor.clone()
    waiting = tensors.pop("waiting")
    if D == 0:
        return None, None
    return MixtureState(config=config, moments=Moments(**tensors)), None if state_dict["started"] else waiting
