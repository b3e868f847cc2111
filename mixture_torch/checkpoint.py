"""An estimator's state as plain tensors, ints and strings, and back."""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixture_core import MixtureConfig, MixtureState, Moments
from mixture_core.absorb_cpu import complete_, pack, unpack_

VERSION = 3
SEEDING_ROWS = 4  # times K: with fewer rows, k-means++ misses components


class Standing(NamedTuple):
    """How far an estimator has come; all that a later run needs to go on."""

    state: MixtureState | None = None  # None before the first update
    waiting: Tensor | None = None  # (n, D) rows until there are enough to start from, n < SEEDING_ROWS K; None where so
    n_steps: int = 0  # since the start; relocation counts windows by it

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
    K, (state, waiting, n_steps) = config.K, standing
    if state is None:
        D = dim or 0
        weight = torch.zeros(K, dtype=torch.float32, device="cpu")  # whatever torch's defaults are
        empty = Moments(weight=weight, mean=weight.new_zeros(K, D), covariance=weight.new_zeros(K, D, D))
        state = MixtureState(config=config, moments=empty)
    moments = state.moments
    D = moments.mean.shape[1]
    rows = moments.mean.new_zeros(SEEDING_ROWS * K, D)
    n_waiting = 0 if waiting is None else len(waiting)
    if waiting is not None:
        rows[:n_waiting] = waiting
    values: dict[str, Tensor | int | str] = {
        "version": VERSION,
        "K": K,
        "D": D,
        "mode": config.mode,
        "assigner": config.assigner,
        "weight": moments.weight.clone(),
        "mean": moments.mean.clone(),
        "residual": state.residual.clone(),
        "covariance": pack(moments.covariance),
        "n_steps": n_steps,
        "updated": int(standing.state is not None),
        "started": int(standing.state is not None and waiting is None),
        "n_waiting": n_waiting,
        "waiting": rows,
    }
    return values | {"checksum": checksum(values)}


def checksum(values: Mapping[str, Any]) -> int:
    """Returns the CRC-32 of all values but the checksum itself, in the order of their keys.

    It tells parts of one mixture from those of others, as in a checkpoint that several ranks have written, each with a
    mixture of its own, to the same place.
    """
    crc = 0
    for key in sorted(set(values) - {"checksum"}):
        value = values[key]
        is_tensor = isinstance(value, Tensor)
        content = value.detach().to("cpu", torch.float32).contiguous().numpy() if is_tensor else repr(value).encode()
        crc = zlib.crc32(content, crc)
    return crc


def from_state_dict(config: MixtureConfig, state_dict: Mapping[str, Any], *, D: int | None) -> Standing:
    """Returns what `to_state_dict` was given, as copies.

    Args:
        config: The choices.
        state_dict: To go on from.
        D: The width to insist on, None for any.

    Raises:
        TypeError: It is no mapping.
        ValueError: Keys are missing or unknown, the version is unknown, or K, D, mode, assigner or a shape differ.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"The state_dict must be a mapping, got {type(state_dict).__name__}.")
    wanted = to_state_dict(config, Standing(), dim=None)
    old = type(version := state_dict.get("version")) is int and version == 2
    if set(state_dict) != set(wanted) - ({"residual", "n_steps"} if old else set()):
        keys = ", ".join(map(str, state_dict))
        raise ValueError(f"The state_dict must have the keys {', '.join(wanted)}, got {keys}.")
    for key in ("K", "mode", "assigner") if old else ("version", "K", "mode", "assigner"):
        if type(state_dict[key]) is not type(wanted[key]) or state_dict[key] != wanted[key]:
            raise ValueError(f"The state_dict must have {key} {wanted[key]!r}, got {_shown(state_dict[key])}.")
    K, rows = config.K, SEEDING_ROWS * config.K
    came = _count(state_dict, "D", at_most=None)
    updated, started = _count(state_dict, "updated", at_most=1), _count(state_dict, "started", at_most=1)
    n_waiting = _count(state_dict, "n_waiting", at_most=rows - 1)
    if D is not None and came != D and (updated or came):
        raise ValueError(f"The state_dict must have D {D}, got {came}.")
    weight, mean = _tensor(state_dict, "weight", K), _tensor(state_dict, "mean", K, came)
    waiting = _tensor(state_dict, "waiting", rows, came)
    if old:
        covariance, residual, n_steps = _tensor(state_dict, "covariance", K, came, came), torch.zeros_like(mean), 0
        expected = _checksum_2(weight, mean, covariance)
    else:
        packed = _tensor(state_dict, "covariance", K, came * (came + 1) // 2)
        covariance = complete_(unpack_(packed, packed.new_zeros(K, came, came)))
        residual, n_steps = _tensor(state_dict, "residual", K, came), _count(state_dict, "n_steps", at_most=None)
        expected = checksum(state_dict)
    if _count(state_dict, "checksum", at_most=None) != expected:
        raise ValueError(
            "The state_dict must hold the values of one mixture, got parts that do not belong together; if each rank "
            "has a mixture of its own, save each under a key of its own."
        )
    if not updated:
        return Standing()
    if not came:
        raise ValueError("The state_dict must have D at least 1 after an update, got 0.")
    moments = Moments(weight=weight, mean=mean, covariance=covariance)
    state = MixtureState(config=config, moments=moments, residual=residual)
    return Standing(state, None if started else waiting[:n_waiting].clone(), n_steps)


def _checksum_2(weight: Tensor, mean: Tensor, covariance: Tensor) -> int:
    """The checksum as version 2 computed it."""
    parts = weight, mean, covariance.diagonal(dim1=-2, dim2=-1)
    return zlib.crc32(b"".join(part.cpu().numpy().tobytes() for part in parts))


def _count(state_dict: Mapping[str, Any], key: str, *, at_most: int | None) -> int:
    value = state_dict[key]
    if type(value) is not int or value < 0 or (at_most is not None and value > at_most):
        expected = "an int from 0 on" if at_most is None else f"an int from 0 to {at_most}"
        raise ValueError(f"The state_dict must have {expected} as {key}, got {_shown(value)}.")
    return value


def _tensor(state_dict: Mapping[str, Any], key: str, *shape: int) -> Tensor:
    """A copy of a tensor of the state_dict as float32."""
    tensor = state_dict[key]
    usable = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
    if not isinstance(tensor, Tensor) or not (usable and tensor.is_floating_point() and tuple(tensor.shape) == shape):
        came = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else _shown(tensor)
        raise ValueError(f"The state_dict must have a dense real tensor of shape {shape} as {key}, got {came}.")
    return tensor.detach().to(torch.float32, copy=True)


def _shown(value: object) -> str:
    return " ".join(repr(value).split())
