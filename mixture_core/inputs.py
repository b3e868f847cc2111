"""From what a caller hands in to tensors that the mathematics can rely on."""

from typing import Any

import torch
from torch import Tensor

CENTER_ROWS = 32


def as_tensor(value: Any, *, name: str) -> Tensor:
    """Returns a dense tensor unchanged and a NumPy array as a tensor of its own.

    Raises:
        TypeError: It is neither, or an array of anything but numbers.
    """
    if isinstance(value, Tensor):
        if value.is_nested or value.layout != torch.strided or value.is_quantized or value.is_meta:
            kind = "meta" if value.is_meta else "nested" if value.is_nested else "quantized or sparse"
            raise TypeError(f"`{name}` must be a dense tensor that holds numbers, got a {kind} one.")
        return value
    if not hasattr(value, "__array__"):
        raise TypeError(f"`{name}` must be a tensor or a NumPy array, got {type(value).__name__}.")
    array = value.__array__()
    try:  # a copy: torch takes neither negative strides nor read-only memory nor foreign byte orders
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    except TypeError as error:
        raise TypeError(f"`{name}` must be real numbers, got {array.dtype}.") from error


def as_embeddings(value: Any, *, D: int | None = None, name: str = "embeddings", rows: str = "N") -> Tensor:
    """Returns embeddings as (N, D) float64 where they are float64 already and as float32 otherwise.

    Args:
        value: (N, D) tensor or NumPy array of real numbers; N may be 0.
        D: The width to insist on, if any.
        name: What the caller calls them.
        rows: What the caller calls N.

    Raises:
        TypeError: No tensor or array, or complex numbers.
        ValueError: The shape is not (N, D).
    """
    x = as_tensor(value, name=name)
    if x.is_complex():
        raise TypeError(f"`{name}` must be real numbers, got {x.dtype}.")
    if x.ndim != 2 or x.shape[1] < 1 or (D is not None and x.shape[1] != D):
        raise ValueError(f"`{name}` must have shape ({rows}, {D or 'D >= 1'}), got {tuple(x.shape)}.")
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


def center_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns which rows are usable, (N, 1) bool; a point among them, (D,); and x about that point, (N, D).

    Sums of squares lose all digits of embeddings that are far from 0. They do not about a point among the embeddings,
    which is here the median, coordinate by coordinate, of 32 rows: unlike a mean it stays there beside rows that are
    far out, and unlike the centroids it goes with a collapse. Rows that are not usable are 0 in the result.

    Args:
        x: (N, D) embeddings.
    """
    usable = usable_rows(x)
    if x.shape[0] == 0:
        return usable[:, None], x.new_zeros(x.shape[1]), x
    count = usable.sum()
    usable_first = usable.to(torch.int8).sort(descending=True, stable=True).indices
    spread = torch.arange(CENTER_ROWS, device=x.device) * count // CENTER_ROWS
    rows = x.detach().index_select(0, usable_first.gather(0, spread)).sort(dim=0).values
    center = torch.where(count > 0, rows[CENTER_ROWS // 2], 0.0)
    return usable[:, None], center, torch.where(usable[:, None], x - center, 0.0)
