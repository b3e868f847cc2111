"""From rows to moments: of soft responsibilities, and, at N D^2 cost, of rows that belong to one component each."""

from functools import partial, reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mixture_core import kernels
from mixture_core.grouped import CHUNK, Workspace, absorb_rows, complete_
from mixture_core.inputs import as_embeddings, as_tensor, is_plain, looks, middle_row, usable_rows
from mixture_core.moments import Moments, merge, merge_exactly, safe_divide

# torch has no public way to ask inside of which transforms a function runs.
FORWARD, REVERSE = torch._C._functorch.TransformType.Jvp, torch._C._functorch.TransformType.Grad


def component_means(x: Tensor, R: Tensor) -> Tensor:
    """Returns sum_n R_nk x_n / sum_n R_nk, (K, D); 0 where a component has no weight.

    Args:
        x: (N, D) finite embeddings, near 0 for accuracy.
        R: (N, K) responsibilities.
    """
    return safe_divide(R.mT @ x, R.sum(dim=0)[:, None])


def one_hot(index: Tensor, K: int) -> Tensor:
    """Returns membership, (N, K) bool; false throughout where the index (N,) lies outside [0, K)."""
    return index[:, None] == torch.arange(K, device=index.device)


def batch_moments(x: Tensor, R: Tensor) -> Moments:
    """Returns the moments of one batch under given responsibilities.

    With w_k = sum_n R_nk: mean_k = sum_n R_nk x_n / w_k and covariance_k = sum_n R_nk (x_n - mean_k)(x_n - mean_k)^T
    / w_k, by the corrected two-pass algorithm (Chan, Golub and LeVeque 1983, equation 1.7). A component without weight
    has mean and covariance 0. Rows that are not finite count for nothing.

    Args:
        x: (N, D) embeddings, tensor or NumPy array.
        R: (N, K) responsibilities, any non-negative numbers.

    Raises:
        TypeError: An argument is neither tensor nor array, or complex.
        ValueError: A shape is wrong.
    """
    x = as_embeddings(x, name="x")
    R = as_tensor(R, name="R")
    if R.is_complex():
        raise TypeError(f"`R` must be real numbers, got {R.dtype}.")
    if R.ndim != 2 or R.shape[0] != x.shape[0] or R.shape[1] < 1:
        raise ValueError(f"`R` must have shape ({x.shape[0]}, K), one row per embedding, got {tuple(R.shape)}.")
    R = torch.where(usable_rows(x)[:, None], R.to(x.dtype), 0.0)
    index = _hard_index(R) if looks(x, R) else None
    if index is None:
        chunks = zip(torch.split(x, CHUNK), torch.split(R, CHUNK), strict=True)
        return reduce(merge, (_whole(*_moments(*chunk)) for chunk in chunks))
    K, D = R.shape[1], x.shape[1]
    nothing = Moments(weight=x.new_zeros(K), mean=x.new_zeros(K, D), covariance=x.new_zeros(K, D, D))
    return _whole(*absorb(nothing, nothing.mean, x, index))


def _whole(moments: Moments, residual: Tensor) -> Moments:
    return Moments(weight=moments.weight, mean=moments.mean + residual, covariance=moments.covariance)


def absorb(
    history: Moments, residual: Tensor, x: Tensor, index: Tensor, *, work: Workspace | None = None
) -> tuple[Moments, Tensor]:
    """Returns merge(history, batch_moments(x, R)) for rows that belong to one component each, and the means' residual.

    Rows are sorted by component and enter one product each: the work is N D^2 multiply-adds whatever K is, or half of
    it, and no derivative is lost: those are taken of `merge` and `batch_moments`. Large batches are merged chunk by
    chunk, since a float32 sum of a million squares loses its last three digits.

    Args:
        history: The moments so far.
        residual: (K, D) rounding error of the history's means.
        x: (N, D) embeddings.
        index: (N,) integers, the component of each row; K where it counts for nothing, and may hold anything.
        work: Memory to use where `is_plain`; its covariance may be the history's. The upper triangle of the new
            covariance is then left undefined, and that of the history's is not read.
    """
    if x.shape[0] == 0:
        kept = history.covariance.clone() if work is None else work.covariance.copy_(history.covariance)
        return Moments(weight=history.weight.clone(), mean=history.mean.clone(), covariance=kept), residual.clone()
    if x.shape[0] > CHUNK:
        for chunk, members in zip(torch.split(x, CHUNK), torch.split(index, CHUNK), strict=True):
            history, residual = absorb(history, residual, chunk, members, work=work)
        return history, residual
    arguments = (history.weight, history.mean, residual, history.covariance, x, index)
    if is_plain(*arguments):
        memory = work or Workspace.like(history.covariance, N=x.shape[0])
        weight, mean, residual, covariance = _absorb_plainly(*arguments, memory)
        covariance = covariance if work else complete_(covariance)
    elif torch.compiler.is_compiling():  # which takes no function with a forward derivative
        form = _absorb_densely if _may_be_derived(*arguments) else torch.ops.mixture_core.absorb
        weight, mean, residual, covariance = form(*arguments)
    elif _is_forward_twice():
        weight, mean, residual, covariance = _absorb_densely(*arguments)
    else:
        weight, mean, residual, covariance = _Absorb.apply(*arguments)  # type: ignore[no-untyped-call]  # torch's own
    return Moments(weight=weight, mean=mean, covariance=covariance), residual


def _may_be_derived(*tensors: Tensor) -> bool:
    """Whether a derivative may be asked for of what is being compiled."""
    return _levels(FORWARD, REVERSE) > 0 or (
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    )


def _is_forward_twice() -> bool:
    """Whether `_Absorb.jvp` would lose terms: its result is not derived again by a forward derivative around it."""
    forward = _levels(FORWARD)
    return forward > 1 or (forward == 0 and torch.autograd.forward_ad._current_level >= 0)


def _levels(*kinds: Any) -> int:
    """How many transforms of these kinds the caller is inside of."""
    return sum(level.key() in kinds for level in torch._C._functorch.get_interpreter_stack() or [])


# What `torch.compiler.assume_constant_result` does, which imports torch._dynamo, and that takes a second.
_levels._dynamo_marked_constant = True  # type: ignore[attr-defined]  # read by torch._dynamo


def _hard_index(R: Tensor) -> Tensor | None:
    """The component of each row, (N,), K where there is none; None where a row is shared or weighs other than 1."""
    total = R.sum(dim=1)
    hard = ((R == 0) | (R == 1)).all() & (total <= 1).all()
    return torch.where(total > 0, R.argmax(dim=1), R.shape[1]) if hard else None


def _moments(x: Tensor, R: Tensor) -> tuple[Moments, Tensor]:
    """`batch_moments` for R that is 0 on unusable rows; the rounding error of its means is returned separately."""
    usable = usable_rows(x)
    x, center, weight = torch.where(usable[:, None], x, 0.0), middle_row(x, usable), R.sum(dim=0)
    mean = torch.where(weight[:, None] > 0, center + component_means(x - center, R).detach(), 0.0)
    # Differences from the rounded means are exact. Their sums hold the means' rounding error, and its derivatives.
    sums, scatter = _scatter(x, R, mean)
    lost = safe_divide(sums, weight[:, None])
    covariance = safe_divide(scatter, weight[:, None, None]) - lost[:, :, None] * lost[:, None, :]
    return Moments(weight=weight, mean=mean, covariance=covariance), lost


def _scatter(x: Tensor, R: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over n of R_nk d_nk, (K, D), and of R_nk d_nk d_nk^T, (K, D, D), symmetric to the bit; d = x - mean."""
    # One component at a time: an (N, K, D) tensor of differences would outgrow the embeddings K times.
    sums, scatters = [], []
    for weight, center in zip(R.unbind(dim=1), mean.unbind(dim=0), strict=True):
        difference = x - center
        weighted = weight[:, None] * difference
        sums.append(weighted.sum(dim=0))
        scatters.append(weighted.mT @ difference)
    scatter = torch.stack(scatters)
    return torch.stack(sums), (scatter + scatter.mT) / 2


Absorbed: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]  # weight, mean, residual and covariance


def _absorb_densely(
    weight: Tensor, mean: Tensor, residual: Tensor, covariance: Tensor, x: Tensor, index: Tensor
) -> Absorbed:
    """`absorb` by its definition, K products of all rows: for derivatives, and for devices without anything faster."""
    members = one_hot(index, len(weight))
    history = Moments(weight=weight, mean=mean, covariance=covariance)
    new, residual = merge_exactly((history, residual), _moments(x, members.to(x.dtype)))
    return new.weight, new.mean, residual, new.covariance


def _absorb_plainly(
    weight: Tensor, mean: Tensor, residual: Tensor, covariance: Tensor, x: Tensor, index: Tensor, work: Workspace
) -> Absorbed:
    """`absorb` by the fastest way that the device has; of the covariance only the lower triangle is right."""
    if x.device.type == "cpu":
        return absorb_rows(weight, mean, residual, covariance, x, index, work)
    if kernels.usable_on(x, K=len(weight)):
        groups = kernels.group(index.to(torch.int32), len(weight))
        return kernels.absorb(weight, mean, residual, covariance, x.contiguous(), *groups, out=work.covariance)
    *rest, new_covariance = _absorb_densely(weight, mean, residual, covariance, x, index)
    return (*rest, work.covariance.copy_(new_covariance))  # type: ignore[return-value]  # four


# The operator is for tracers and for vmap, to which the sorting is one opaque call. Derivatives are not its own, since
# `torch.func.grad` raises and `jvp` returns 0 where an operator has an autograd formula (torch 2.13).
OPERATOR = "mixture_core::absorb"
torch.library.define(
    OPERATOR,
    "(Tensor weight, Tensor mean, Tensor residual, Tensor covariance, Tensor x, Tensor index) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl(OPERATOR, "default")
def _operator(weight: Tensor, mean: Tensor, residual: Tensor, covariance: Tensor, x: Tensor, index: Tensor) -> Absorbed:
    new = _absorb_plainly(weight, mean, residual, covariance, x, index, Workspace.like(covariance, N=len(x)))
    complete_(new[3])
    return new


@torch.library.register_fake(OPERATOR)  # type: ignore[untyped-decorator]  # torch has not annotated it
def _shapes(weight: Tensor, mean: Tensor, residual: Tensor, covariance: Tensor, x: Tensor, index: Tensor) -> Absorbed:
    return torch.empty_like(weight), torch.empty_like(mean), torch.empty_like(residual), torch.empty_like(covariance)


@torch.library.register_vmap(OPERATOR)  # type: ignore[untyped-decorator]  # torch has not annotated it
def _over_batch(info: Any, in_dims: tuple[int | None, ...], *arguments: Tensor) -> tuple[Absorbed, tuple[int, ...]]:
    results = [
        torch.ops.mixture_core.absorb(
            *(t if dim is None else t.select(dim, item) for t, dim in zip(arguments, in_dims, strict=True))
        )
        for item in range(info.batch_size)
    ]
    stacked = tuple(torch.stack(leaves) for leaves in zip(*results, strict=True))
    return stacked, (0, 0, 0, 0)  # type: ignore[return-value]  # four, as there are in every result


class _Absorb(torch.autograd.Function):
    """The operator with the derivatives of `_absorb_densely`, of any order and in both directions."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Tensor) -> Absorbed:
        new: Absorbed = torch.ops.mixture_core.absorb(*arguments)
        return new

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Absorbed) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *values, index = ctx.saved_tensors
        _, pull = torch.func.vjp(partial(_absorb_densely, index=index), *values)  # type: ignore[misc]  # two, without aux
        return (*pull(gradients), None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Absorbed:
        *values, index = ctx.saved_tensors
        along = tuple(
            torch.zeros_like(value) if tangent is None else tangent
            for value, tangent in zip(values, tangents[:-1], strict=True)
        )
        _, derivative = torch.func.jvp(partial(_absorb_densely, index=index), tuple(values), along)  # type: ignore[misc]  # likewise
        new: Absorbed = derivative
        return new
