"""An estimator's state as plain tensors, ints and strings, and back."""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, NewType

import torch
from torch import Tensor
from torch.utils._pytree import tree_map  # torch has no public pytree module

from mixture_core import MixtureConfig, MixtureState, Moments
from mixture_core.absorb_cpu import complete_, pack, unpack_
from mixture_core.config import shown
from mixture_core.pairs import Pairs, none

VERSION = 4
ADDED = {3: {"residual", "n_steps"}, 4: {"n_pairs", "V", "squares"}}  # keys that a version added
SEEDING_ROWS = 4  # times K: with fewer rows, k-means++ misses components

LowerState = NewType("LowerState", MixtureState)  # only the lower triangles of its covariances are defined


class Progress(NamedTuple):
    """Everything that a resumed run needs."""

    state: LowerState | None = None  # None before the first update
    waiting: Tensor | None = None  # (n, D) rows so far, n < SEEDING_ROWS K; None once there were enough to seed means
    n_steps: int = 0  # steps with a usable row since the means were chosen; relocation counts windows with it
    pairs: Pairs | None = None  # None before the first pair of views

    @property
    def D(self) -> int | None:
        """Width of the embeddings, None before the first update."""
        return None if self.state is None else self.state.moments.mean.shape[1]

    @property
    def digest(self) -> int:
        """A number that is the same on two ranks if their weights and means are the same."""
        if self.state is None:
            return 0
        parts = self.state.moments.weight, self.state.moments.mean, self.state.residual
        return zlib.crc32(b"".join(part.cpu().numpy().tobytes() for part in parts))


def completed(state: LowerState) -> MixtureState:
    """Returns a copy of a state whose covariances are symmetric to the bit."""
    copied: MixtureState = tree_map(torch.clone, state)
    complete_(copied.moments.covariance)
    return copied


def to_device(state: LowerState, device: torch.device) -> LowerState:
    """Returns the state on a device."""
    if state.moments.weight.device == device:
        return state
    return LowerState(tree_map(lambda tensor: tensor.to(device), state))


def to_state_dict(config: MixtureConfig, progress: Progress, *, dim: int | None) -> dict[str, Tensor | int | str]:
    """Returns the progress as tensors, ints and strings, all copied; `dim` is D before the first update, None is 0.

    Keys, types and, for a given D, shapes are always the same, which libraries that load in place require.
    """
    K, (state, waiting, n_steps, pairs) = config.K, progress
    if state is None:
        D = dim or 0
        weight = torch.zeros(K, dtype=torch.float32, device="cpu")  # whatever torch's defaults are
        empty = Moments(weight=weight, mean=weight.new_zeros(K, D), covariance=weight.new_zeros(K, D, D))
        state = LowerState(MixtureState(config=config, moments=empty))
    moments = state.moments
    D = moments.mean.shape[1]
    rows = moments.mean.new_zeros(SEEDING_ROWS * K, D)
    n_waiting = 0 if waiting is None else len(waiting)
    if waiting is not None:
        rows[:n_waiting] = waiting
    is_updated = progress.state is not None
    pairs = pairs or none(K=K, D=D)
    values: dict[str, Tensor | int | str] = {
        "version": VERSION, "K": K, "D": D, "mode": config.mode, "assigner": config.assigner,
        "weight": moments.weight.clone(), "mean": moments.mean.clone(), "residual": state.residual.clone(),
        "covariance": pack(moments.covariance), "n_steps": n_steps, "updated": int(is_updated),
        "started": int(is_updated and waiting is None), "n_waiting": n_waiting, "waiting": rows,
        "n_pairs": pairs.weight.clone(), "V": pairs.V.clone(), "squares": pairs.squares.clone(),
    }  # fmt: skip
    return values | {"checksum": checksum(values)}


def checksum(values: Mapping[str, Any]) -> int:
    """Returns the CRC-32 of all values but the checksum itself, in the order of their keys.

    It detects checkpoints that mix the parts of several mixtures, for example because several ranks, each with a
    mixture of its own, wrote to the same place.
    """
    crc = 0
    for key in sorted(set(values) - {"checksum"}):
        value = values[key]
        is_tensor = isinstance(value, Tensor)
        content = value.detach().to("cpu", torch.float32).contiguous().numpy() if is_tensor else repr(value).encode()
        crc = zlib.crc32(content, crc)
    return crc


def from_state_dict(config: MixtureConfig, state_dict: Mapping[str, Any], *, D: int | None) -> Progress:
    """Returns a copy of the progress that `to_state_dict` was given; `D` is the width to insist on, None any."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"The state_dict must be a mapping, got {type(state_dict).__name__}.")
    wanted = to_state_dict(config, Progress(), dim=None)
    version = state_dict.get("version")
    version = version if type(version) is int and version in (2, 3) else VERSION
    missing = set[str]().union(*(keys for since, keys in ADDED.items() if since > version))
    if set(state_dict) != set(wanted) - missing:
        lacks = shown([key for key in wanted if key not in state_dict])
        more = shown([key for key in state_dict if key not in wanted])
        raise ValueError(f"The state_dict lacks the keys {lacks} and has the unknown keys {more}.")
    for key in ("K", "mode", "assigner") if version < VERSION else ("version", "K", "mode", "assigner"):
        if type(state_dict[key]) is not type(wanted[key]) or state_dict[key] != wanted[key]:
            raise _differs(key, state_dict[key], wanted[key])
    K, rows, came = config.K, SEEDING_ROWS * config.K, _count(state_dict, "D")
    updated, started = _count(state_dict, "updated", at_most=1), _count(state_dict, "started", at_most=1)
    n_waiting = _count(state_dict, "n_waiting", at_most=rows - 1)
    n_steps = 0 if version < 3 else _count(state_dict, "n_steps")
    if D is not None and came != D and (updated or came):
        raise _differs("D", came, D)
    shapes: dict[str, tuple[int, ...]] = {
        "weight": (K,), "mean": (K, came), "residual": (K, came), "waiting": (rows, came),
        "covariance": (K, came, came) if version < 3 else (K, came * (came + 1) // 2),
        "n_pairs": (), "V": (came, came), "squares": (K + 2,),
    }  # fmt: skip
    tensors = {key: _tensor(state_dict, key, *shape) for key, shape in shapes.items() if key in state_dict}
    if _count(state_dict, "checksum") != (_checksum_2(tensors) if version < 3 else checksum(state_dict)):
        raise ValueError(
            "The state_dict mixes the values of several mixtures; if each rank has a mixture of its own, save each "
            "under its own key."
        )
    if bad := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"`{bad[0]}` of the state_dict has NaN or infinite entries; load another checkpoint.")
    weight, mean, covariance, waiting = (tensors[key] for key in ("weight", "mean", "covariance", "waiting"))
    if weight.min() < 0:
        raise ValueError(f"The state_dict has a negative weight, {float(weight.min()):g}; load another checkpoint.")
    if not updated:
        return Progress()
    if not came:
        raise ValueError("The state_dict has D=0 after an update; load another checkpoint.")
    if version >= 3:
        covariance = unpack_(covariance, covariance.new_zeros(K, came, came))
    moments = Moments(weight=weight, mean=mean, covariance=covariance)
    residual = tensors.get("residual", torch.zeros_like(mean))
    state = LowerState(MixtureState(config=config, moments=moments, residual=residual))
    has_pairs = version >= 4 and bool(tensors["n_pairs"] > 0)
    pairs = Pairs(weight=tensors["n_pairs"], V=tensors["V"], squares=tensors["squares"]) if has_pairs else None
    return Progress(state, None if started else waiting[:n_waiting].clone(), n_steps, pairs)


def _differs(key: str, came: object, own: object) -> ValueError:
    return ValueError(f"The state_dict has {key}={shown(came)}, but this estimator has {key}={own!r}.")


def _checksum_2(tensors: Mapping[str, Tensor]) -> int:
    """The checksum as version 2 computed it."""
    parts = tensors["weight"], tensors["mean"], tensors["covariance"].diagonal(dim1=-2, dim2=-1)
    return zlib.crc32(b"".join(part.cpu().numpy().tobytes() for part in parts))


def _count(state_dict: Mapping[str, Any], key: str, *, at_most: int | None = None) -> int:
    value = state_dict[key]
    if type(value) is not int or value < 0 or (at_most is not None and value > at_most):
        expected = "an int from 0 on" if at_most is None else f"an int from 0 to {at_most}"
        raise ValueError(f"The state_dict has {key}={shown(value)} instead of {expected}.")
    return value


def _tensor(state_dict: Mapping[str, Any], key: str, *shape: int) -> Tensor:
    """A copy of a tensor of the state_dict as float32."""
    tensor = state_dict[key]
    is_real = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.layout == torch.strided
    if not is_real or tensor.is_meta or tuple(tensor.shape) != shape:
        came = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else shown(tensor)
        raise ValueError(f"`{key}` of the state_dict is {came} instead of a dense real tensor of shape {shape}.")
    copied: Tensor = tensor.detach().to(torch.float32, copy=True)
    return copied
