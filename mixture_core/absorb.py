"""Adds a batch of rows, each of one component, to the moments so far: the dispatch, the operator, the derivatives."""

from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mixture_core import kernels
from mixture_core.absorb_cpu import CHUNK, Workspace, absorb_rows, complete_
from mixture_core.kernels.assign import group
from mixture_core.kernels.moments import absorb as absorb_by_kernels
from mixture_core.moments import Moments, merge_exactly
from mixture_core.scatter import one_hot, soft_moments

# torch has no public way to ask inside of which transforms a function runs.
FORWARD, REVERSE = torch._C._functorch.TransformType.Jvp, torch._C._functorch.TransformType.Grad

Absorbed: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]  # weight, mean, residual and covariance


def absorb(
    history: Moments, residual: Tensor, x: Tensor, index: Tensor, *, plain: bool, work: Workspace | None = None
) -> tuple[Moments, Tensor]:
    """Returns merge(history, batch_moments(x, R)) for hard R, and the rounding error of its means, (K, D).

    The plain ways sort rows by component and make one product for each, N D^2 operations whatever K is. Derivatives
    are those of `merge` and `batch_moments`. Large batches are merged chunk by chunk, since a float32 sum of a million
    squares loses its last three digits.

    Args:
        history: The moments so far.
        residual: (K, D) rounding error of the history's means.
        x: (N, D) embeddings.
        index: (N,) integers, the component of each row; K if the row is ignored, which may then hold anything.
        plain: Whether `is_plain` is true of all these tensors.
        work: Memory to use if `plain`; its covariance may be the history's. The new covariance is then a `Lower`,
            and so may be the history's.
    """
    if x.shape[0] == 0:
        kept = history.covariance.clone() if work is None else work.covariance.copy_(history.covariance)
        return Moments(weight=history.weight.clone(), mean=history.mean.clone(), covariance=kept), residual.clone()
    if x.shape[0] > CHUNK:
        for chunk, members in zip(torch.split(x, CHUNK), torch.split(index, CHUNK), strict=True):
            history, residual = absorb(history, residual, chunk, members, plain=plain, work=work)
        return history, residual
    arguments = (history.weight, history.mean, residual, history.covariance, x, index)
    if plain:
        memory = work or Workspace.like(history.covariance, N=x.shape[0])
        weight, mean, residual, covariance = _absorb_plainly(*arguments, memory)
        covariance = covariance if work else complete_(covariance)
    elif torch.compiler.is_compiling():  # the compiler rejects functions with a forward derivative
        form = _absorb_densely if _may_be_derived(*arguments) else torch.ops.mixture_core.absorb
        weight, mean, residual, covariance = form(*arguments)
    elif _is_forward_twice():
        weight, mean, residual, covariance = _absorb_densely(*arguments)
    else:
        weight, mean, residual, covariance = _Absorb.apply(*arguments)  # type: ignore[no-untyped-call]  # torch has not annotated it
    return Moments(weight=weight, mean=mean, covariance=covariance), residual


def _absorb_plainly(
    weight: Tensor, mean: Tensor, residual: Tensor, covariance: Tensor, x: Tensor, index: Tensor, work: Workspace
) -> Absorbed:
    """`absorb` by the fastest way that the device has; the covariance is a `Lower`."""
    if x.device.type == "cpu":
        return absorb_rows(weight, mean, residual, covariance, x, index, work)
    if kernels.usable_on(x, K=len(weight)):
        groups = group(index.to(torch.int32), len(weight))
        return absorb_by_kernels(weight, mean, residual, covariance, x.contiguous(), *groups, out=work.covariance)
    weight, mean, residual, covariance = _absorb_densely(weight, mean, residual, covariance, x, index)
    return weight, mean, residual, work.covariance.copy_(covariance)


def _absorb_densely(
    weight: Tensor, mean: Tensor, residual: Tensor, covariance: Tensor, x: Tensor, index: Tensor
) -> Absorbed:
    """`absorb` by its definition, K products of all rows: for derivatives, and for GPUs without Triton."""
    history = Moments(weight=weight, mean=mean, covariance=covariance)
    new, residual = merge_exactly((history, residual), soft_moments(x, one_hot(index, len(weight)).to(x.dtype)))
    return new.weight, new.mean, residual, new.covariance


def _may_be_derived(*tensors: Tensor) -> bool:
    """Whether the compiled function may be asked for a derivative."""
    return _levels(FORWARD, REVERSE) > 0 or (
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    )


def _is_forward_twice() -> bool:
    """Whether `_Absorb.jvp` would lose terms: a forward derivative around it does not derive its result again."""
    forward = _levels(FORWARD)
    return forward > 1 or (forward == 0 and torch.autograd.forward_ad._current_level >= 0)


def _levels(*kinds: Any) -> int:
    """How many transforms of these kinds the caller is inside of."""
    return sum(level.key() in kinds for level in torch._C._functorch.get_interpreter_stack() or [])


# All that `torch.compiler.assume_constant_result` does, except that it also imports the compiler, which takes a second.
_levels._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch reads it, and mypy knows no such attribute


# The operator makes the sorting one opaque call for tracers and vmap. `_Absorb` adds the derivatives, since
# `torch.func.grad` raises and `jvp` returns 0 if an operator has an autograd formula (torch 2.13).
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
    weight, mean, residual, covariance = (torch.stack(leaves) for leaves in zip(*results, strict=True))
    return (weight, mean, residual, covariance), (0, 0, 0, 0)


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
        _, pull = torch.func.vjp(partial(_absorb_densely, index=index), *values)  # type: ignore[misc]  # mypy also expects the third of has_aux=True
        return (*pull(gradients), None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Absorbed:
        *values, index = ctx.saved_tensors
        along = tuple(
            torch.zeros_like(value) if tangent is None else tangent
            for value, tangent in zip(values, tangents[:-1], strict=True)
        )
        _, derivative = torch.func.jvp(partial(_absorb_densely, index=index), tuple(values), along)  # type: ignore[misc]  # as for vjp
        new: Absorbed = derivative
        return new
