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
        TypeError: It is no mapping.
        ValueError: Keys are missing or unknown, or the state is of another version, K, mode, assigner or shape.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"The state_dict must be a mapping, got {type(state_dict).__name__}.")
    wanted = to_state_dict(config, None, None)
    if set(state_dict) != set(wanted):
        keys = ", ".join(map(str, state_dict))
        raise ValueError(f"The state_dict must have the keys {', '.join(wanted)}, got {keys}.")
    for key in ("version", "K", "mode", "assigner"):
        if type(state_dict[key]) is not type(wanted[key]) or state_dict[key] != wanted[key]:
            came = " ".join(repr(state_dict[key]).split())
            raise ValueError(f"The state_dict must have {key} {wanted[key]!r}, got {came}.")
    K, D = config.K, state_dict["D"]
    weight = _check(state_dict, "weight", K)
    mean = _check(state_dict, "mean", K, D)
    covariance = _check(state_dict, "covariance", K, D, D)
    waiting = _check(state_dict, "waiting", None, D)
    if D == 0:
        return None, None
    moments = Moments(weight=weight, mean=mean, covariance=covariance)
    return MixtureState(config=config, moments=moments), None if state_dict["started"] else waiting


def _check(state_dict: Mapping[str, Any], key: str, *shape: int | None) -> Tensor:
    """A copy of a tensor of the state_dict as float32; None in its shape is any length."""
    tensor = state_dict[key]
    if (
        not isinstance(tensor, Tensor)
        or not tensor.is_floating_point()
        or len(tensor.shape) != len(shape)
        or any(length not in (None, came) for length, came in zip(shape, tensor.shape, strict=True))
    ):
        came = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
        raise ValueError(f"The state_dict must have a real tensor of shape {shape} as {key}, got {came}.")
    return tensor.detach().to(torch.float32, copy=True)
