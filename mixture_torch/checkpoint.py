"""An estimator's state as plain tensors, ints and strings, and back."""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixture_core import MixtureConfig, MixtureState, Moments

VERSION = 2
SEEDING_ROWS = 4  # times K: with fewer rows, k-means++ misses components


class Standing(NamedTuple):
    """How far an estimator has come; all that a later run needs to go on."""

    state: MixtureState | None = None  # None before the first update
    waiting: Tensor | None = None  # (n, D) rows until there are enough to start from, n < SEEDING_ROWS K; None where so

    @property
    def D(self) -> int | None:
        """Width of the embeddings, None before the first update."""
        return None if self.state is None else self.state.moments.mean.shape[1]


def to_state_dict(config: MixtureConfig, standing: Standing, *, dim: int | None) -> dict[str, Tensor | int | str]:
    """Returns copies, so that nothing that happens to either side reaches the other.

    Keys, types and, for a given D, shapes are always the same: those that load in place can.

    Args:
        config: The choices.
        standing: What to keep.
        dim: D, where nothing has told it yet; None is 0 then.
    """
    K, state, waiting = config.K, standing.state, standing.waiting
    if state is None:
        D = dim or 0
        weight = torch.zeros(K, dtype=torch.float32, device="cpu")  # whatever torch's defaults are
        moments = Moments(weight=weight, mean=weight.new_zeros(K, D), covariance=weight.new_zeros(K, D, D))
    else:
        moments = state.moments
    D = moments.mean.shape[1]
    rows = moments.mean.new_zeros(SEEDING_ROWS * K, D)
    n_waiting = 0 if waiting is None else len(waiting)
    if waiting is not None:
        rows[:n_waiting] = waiting
    return {
        "version": VERSION,
        "K": K,
        "D": D,
        "mode": config.mode,
        "assigner": config.assigner,
        "weight": moments.weight.clone(),
        "mean": moments.mean.clone(),
        "covariance": moments.covariance.clone(),
        "updated": int(state is not None),
        "started": int(state is not None and waiting is None),
        "n_waiting": n_waiting,
        "waiting": rows,
        "checksum": checksum(moments),
    }


def checksum(moments: Moments) -> int:
    """Returns a number by which parts of one mixture are told from those of others: CRC-32 of it but for covariances.

    Of those the diagonals count, since all would take long. A checkpoint that several ranks have written, each with a
    mixture of its own, to the same place is noticed by it.
    """
    parts = moments.weight, moments.mean, moments.covariance.diagonal(dim1=-2, dim2=-1)
    return zlib.crc32(b"".join(part.detach().to("cpu", torch.float32).numpy().tobytes() for part in parts))


def from_state_dict(config: MixtureConfig, state_dict: Mapping[str, Any], *, D: int | None) -> Standing:
    """Returns what `to_state_dict` was given, as copies.

    Args:
        config: The choices.
        state_dict: To go on from.
        D: The width to insist on, None for any.

    Raises:
        TypeError: It is no mapping.
        ValueError: Keys are missing or unknown, or the state is of another version, K, D, mode, assigner or shape.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"The state_dict must be a mapping, got {type(state_dict).__name__}.")
    wanted = to_state_dict(config, Standing(), dim=None)
    if set(state_dict) != set(wanted):
        keys = ", ".join(map(str, state_dict))
        raise ValueError(f"The state_dict must have the keys {', '.join(wanted)}, got {keys}.")
    for key in ("version", "K", "mode", "assigner"):
        if type(state_dict[key]) is not type(wanted[key]) or state_dict[key] != wanted[key]:
            raise ValueError(f"The state_dict must have {key} {wanted[key]!r}, got {_shown(state_dict[key])}.")
    K, rows = config.K, SEEDING_ROWS * config.K
    came = _count(state_dict, "D", at_most=None)
    updated, started = _count(state_dict, "updated", at_most=1), _count(state_dict, "started", at_most=1)
    n_waiting = _count(state_dict, "n_waiting", at_most=rows - 1)
    if D is not None and came != D and (updated or came):
        raise ValueError(f"The state_dict must have D {D}, got {came}.")
    moments = Moments(
        weight=_tensor(state_dict, "weight", K),
        mean=_tensor(state_dict, "mean", K, came),
        covariance=_tensor(state_dict, "covariance", K, came, came),
    )
    waiting = _tensor(state_dict, "waiting", rows, came)
    if _count(state_dict, "checksum", at_most=None) != checksum(moments):
        raise ValueError(
            "The state_dict must have weight, mean and covariance of one mixture, got parts that do not belong "
            "together; where ranks have mixtures of their own, save each under a key of its own."
        )
    if not updated:
        return Standing()
    if not came:
        raise ValueError("The state_dict must have D at least 1 after an update, got 0.")
    return Standing(MixtureState(config=config, moments=moments), None if started else waiting[:n_waiting].clone())


def _count(state_dict: Mapping[str, Any], key: str, *, at_most: int | None) -> int:
    value = state_dict[key]
    if type(value) is not int or value < 0 or (at_most is not None and value > at_most):
        expected = "an int from 0 on" if at_most is None else f"an int from 0 to {at_most}"
        raise ValueError(f"The state_dict must have {expected} as {key}, got {_shown(value)}.")
    return value


def _tensor(state_dict: Mapping[str, Any], key: str, *shape: int) -> Tensor:
    """A copy of a tensor of the state_dict as float32."""
    tensor = state_dict[key]
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tuple(tensor.shape) != shape:
        came = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else _shown(tensor)
        raise ValueError(f"The state_dict must have a real tensor of shape {shape} as {key}, got {came}.")
    return tensor.detach().to(torch.float32, copy=True)


def _shown(value: object) -> str:
    return " ".join(repr(value).split())
