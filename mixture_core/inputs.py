"""From what a caller hands in to tensors that the mathematics can rely on."""

from typing import Any

import torch
from torch import Tensor


def as_tensor(value: Any, *, name: str) -> Tensor:
    """Returns a tensor unchanged and a NumPy array as a tensor of its own.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "__array__"):
        return torch.from_numpy(value.__array__().copy())  # torch takes neither negative strides nor read-only memory
    raise TypeError(f"`{name}` must be a tensor or a NumPy array, got {type(value).__name__}.")


def as_embeddings(value: Any, *, D: int | None = None, name: str = "embeddings") -> Tensor:
    """Returns embeddings as (N, D) float64 where they are float64 already and as float32 otherwise.

    Args:
        value: (N, D) tensor or NumPy array of real numbers; N may be 0.
        D: The width to insist on, if any.
        name: What the caller calls them.

    Raises:
        TypeError: No tensor or array, or complex numbers.
        ValueError: The shape is not (N, D).
    """
    x = as_tensor(value, name=name)
    if x.is_complex():
        raise TypeError(f"`{name}` must be real numbers, got {x.dtype}.")
    if x.ndim != 2 or x.shape[1] < 1 or (D is not None and x.shape[1] != D):
        raise ValueError(f"`{name}` must have shape (N, {D or 'D >= 1'}), got {tuple(x.shape)}.")
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def as_labels(value: Any, *, N: int, device: torch.device) -> Tensor:
    """Returns labels as an (N,) int64 tensor beside the embeddings.

    Args:
        value: (N,) tensor or NumPy array of integers.
        N: The number of embeddings.
        device: Where the embeddings are.

    Raises:
        TypeError: No tensor or array, or no integers.
        ValueError: Missing, or the shape is not (N,).
    """
    if value is None:
        raise ValueError(f"`labels` must be given where responsibilities come from labels: ({N},) integers, got None.")
    labels = as_tensor(value, name="labels")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"`labels` must be integers, got {labels.dtype}.")
    if labels.shape != (N,):
        raise ValueError(f"`labels` must have shape ({N},), one per embedding, got {tuple(labels.shape)}.")
    return labels.to(device=device, dtype=torch.int64)


def usable_rows(x: Tensor) -> Tensor:
    """Returns which rows of x (N, D) the statistics may use, (N,) bool.

    A row is usable if no entry is NaN or infinite, or so large that a sum of squares over a batch could overflow:
    beyond 2^-20 times the square root of the type's largest number, which is 1.8e13 in float32.
    """
    bound: float = torch.finfo(x.dtype).max ** 0.5 * 2.0**-20
    return (x.abs() <= bound).all(dim=-1)
