"""Checks and converts arguments, and tells what may be done with them."""

from typing import Any

import torch
from torch import Tensor

SAMPLE = 9  # rows, a power of 3
RESHAPE = {  # what to do with embeddings of so many dimensions
    1: "add a dimension with x[None] for one sample, or x[:, None] for one feature",
    3: "flatten (N, T, D) with x.flatten(0, 1) to take each position as a sample, or average positions with x.mean(1)",
    4: "average the positions of (N, C, H, W) with x.mean((2, 3))",
}


def as_tensor(value: Any, *, name: str) -> Tensor:
    """Returns a dense tensor unchanged, and a copy of a NumPy array as a tensor.

    Raises:
        TypeError: It is neither, or an array of anything but numbers.
    """
    if isinstance(value, Tensor):
        if value.is_nested or value.layout != torch.strided or value.is_quantized or value.is_meta:
            kind = "meta" if value.is_meta else "nested" if value.is_nested else "quantized or sparse"
            raise TypeError(f"`{name}` must be a dense tensor that holds numbers, got a {kind} one.")
        return value
    if not hasattr(value, "__array__"):
        convert = f"; convert it with torch.as_tensor({name})" if isinstance(value, (list, tuple)) else ""
        raise TypeError(f"`{name}` must be a tensor or a NumPy array, got {type(value).__name__}{convert}.")
    array = value.__array__()
    try:  # a copy: torch takes neither negative strides nor read-only memory nor foreign byte orders
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    except TypeError as error:
        raise TypeError(f"`{name}` must be real numbers, got {array.dtype}.") from error


def as_embeddings(value: Any, *, D: int | None = None, name: str = "embeddings", rows: str = "N") -> Tensor:
    """Returns embeddings, (N, D): float64 if they are float64 already, else float32.

    Args:
        value: (N, D) tensor or NumPy array of real numbers; N may be 0.
        D: The expected width; None accepts any.
        name: Their name in errors.
        rows: The name of N in errors.

    Raises:
        TypeError: No tensor or array, or complex numbers.
        ValueError: The shape is not (N, D).
    """
    x = as_tensor(value, name=name)
    if x.is_complex():
        raise TypeError(f"`{name}` must be real numbers, got {x.dtype}.")
    if x.ndim != 2 or x.shape[1] < 1 or (D is not None and x.shape[1] != D):
        advice = f"; {RESHAPE[x.ndim]}" if x.ndim in RESHAPE else ""
        raise ValueError(f"`{name}` must have shape ({rows}, {D or 'D >= 1'}), got {tuple(x.shape)}{advice}.")
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def as_labels(value: Any, *, N: int, device: torch.device) -> Tensor:
    """Returns labels, (N,) int64, on the device of the embeddings.

    Args:
        value: (N,) tensor or NumPy array of integers.
        N: The number of embeddings.
        device: The device of the embeddings.

    Raises:
        TypeError: No tensor or array, or no integers.
        ValueError: Missing, or the shape is not (N,).
    """
    if value is None:
        raise ValueError(f"`labels` must be given if responsibilities come from labels: ({N},) integers, got None.")
    labels = as_tensor(value, name="labels")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"`labels` must be integers, got {labels.dtype}.")
    if labels.shape != (N,):
        raise ValueError(f"`labels` must have shape ({N},), one per embedding, got {tuple(labels.shape)}.")
    return labels.to(device=device, dtype=torch.int64)


def check_count(name: str, value: int) -> None:
    """Raises TypeError if the value is no integer, and ValueError if it is below 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


def usable_rows(x: Tensor) -> Tensor:
    """Returns which rows of x (N, D) the statistics may use, (N,) bool.

    A row is usable if no entry is NaN or infinite, or so large that a sum of squares over a batch could overflow:
    beyond 2^-20 times the square root of the type's largest number, which is 1.8e13 in float32.
    """
    bound = largest_usable(x.dtype)
    return (x.amax(dim=-1) <= bound) & (x.amin(dim=-1) >= -bound)  # a NaN is the largest and the least of its row


def largest_usable(dtype: torch.dtype) -> float:
    """Returns the size up to which an entry of a row may be used."""
    largest: float = torch.finfo(dtype).max ** 0.5 * 2.0**-20
    return largest


def middle_and_usable(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns `middle_row` and `usable_rows` of rows on the CPU; None for the latter if all are, as in most batches."""
    whole = float(torch.linalg.vector_norm(x)) <= largest_usable(x.dtype)
    usable = None if whole else usable_rows(x)
    return middle_row(x, usable), usable


def middle_row(x: Tensor, usable: Tensor | None) -> Tensor:
    """Returns a point amid the usable rows, (D,); 0 if there are none.

    Sums of squares about 0 lose all digits if the embeddings lie far from 0; about a point among the embeddings they do
    not. The point is the remedian of 9 rows, coordinate by coordinate: unlike a mean, single rows far out do not move
    it, and unlike a centroid, it follows the embeddings through a collapse.

    Args:
        x: (N, D) embeddings.
        usable: (N,) bool; None if all are.

    Rousseeuw and Bassett, "The remedian: a robust averaging method for large data sets" (1990), with base 3.
    """
    N = x.shape[0]
    if N == 0:
        return x.new_zeros(x.shape[1])
    if usable is None and N >= SAMPLE:
        return _remedian(x[:: N // SAMPLE][:SAMPLE])
    seen = torch.arange(1, N + 1, device=x.device) if usable is None else usable.cumsum(dim=0)
    spread = torch.arange(SAMPLE, device=x.device) * seen[-1] // SAMPLE
    rows = torch.searchsorted(seen, spread + 1).clamp(max=N - 1)  # past the end if no row is usable
    return torch.where(seen[-1] > 0, _remedian(x.detach().index_select(0, rows)), 0.0)


def _remedian(rows: Tensor) -> Tensor:
    """Medians of three of medians of three, and so on, of the rows (3^n, D), coordinate by coordinate: (D,)."""
    while rows.shape[0] > 1:
        a, b, c = rows.chunk(3)
        rows = torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))
    return rows[0]


def is_plain(*tensors: Tensor | None) -> bool:
    """Returns whether torch only computes with these tensors: no gradient, transform, tracing or compiler.

    Only then may code write to given memory and, on the CPU, branch on numbers. Functions that need to know ask once
    and pass the answer on as `plain`.
    """
    if torch.compiler.is_compiling():
        return False
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) is not Tensor or tensor.is_neg() or (grad and tensor.requires_grad):
            return False
    # torch has no public way to ask for these three
    return not (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def looks(*tensors: Tensor) -> bool:
    """Returns whether code may branch on the numbers in these tensors: plain ones on the CPU, where nothing waits."""
    return tensors[0].device.type == "cpu" and is_plain(*tensors)
