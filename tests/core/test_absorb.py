"""The grouped way from rows to moments equals the dense one, in its numbers and under every transform."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from mixture_core import Moments
from mixture_core.absorb import _absorb_densely, absorb
from mixture_core.absorb_cpu import BLOCK, Workspace, complete_
from mixture_core.inputs import is_plain
from tests.tolerances import FAR_FROM_ZERO, FLOAT32, FLOAT64, relative_error

SHAPES = [
    (200, 3, 5), (67, 65, 3), (150, BLOCK + 2, 2), (90, 2 * BLOCK + 40, 3), (40, 1, 1), (1, 3, 2), (1, 1, 1),
    (3, 2, 20), (130, 4, 70), (900, 3 * BLOCK, 2),
]  # fmt: skip
RESULTS = ("weight", "mean", "residual", "covariance")


def problem(N: int, D: int, K: int, *, offset: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """History, rows and index, with empty components, one of a single row, weights of 0, and rows of nobody."""
    generator = torch.Generator().manual_seed(N + D + K)
    x = torch.randn(N, D, generator=generator) + offset
    index = torch.randint(0, K + 1, (N,), generator=generator)
    index[(index % 3 == 2) & (index < K)] = 0
    index[index == 1] = 0
    index[N // 2] = min(1, K - 1)
    x[index == K] = torch.tensor([float("nan"), float("inf"), 1e30])[torch.arange(int((index == K).sum())) % 3][:, None]
    factor = torch.randn(K, D, D, generator=generator)
    weight = 30 * torch.rand(K, generator=generator)
    weight[3::4] = 0
    mean = torch.randn(K, D, generator=generator) + offset
    residual = torch.finfo(dtype).eps / 4 * mean * torch.rand(K, D, generator=generator)
    return weight.to(dtype), mean.to(dtype), residual.to(dtype), (factor @ factor.mT / D).to(dtype), x.to(dtype), index


def absorbed(
    weight: Tensor, mean: Tensor, residual: Tensor, covariance: Tensor, x: Tensor, index: Tensor
) -> tuple[Tensor, ...]:
    """`absorb` of tensors."""
    plain = is_plain(weight, mean, residual, covariance, x, index)
    history = Moments(weight=weight, mean=mean, covariance=covariance)
    new, residual = absorb(history, residual, x, index, plain=plain)
    return new.weight, new.mean, residual, new.covariance


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for name, found, wanted in zip(RESULTS, actual, expected, strict=True):
        if name != "residual":  # which is about another rounded mean
            assert relative_error(found, wanted) <= tolerance, name


# The numbers


@pytest.mark.parametrize(("N", "D", "K"), SHAPES)
@pytest.mark.parametrize(
    ("dtype", "offset", "tolerance"),
    [(torch.float32, 0.0, FLOAT32), (torch.float64, 0.0, FLOAT64), (torch.float32, 1000.0, FAR_FROM_ZERO)],
)
def test_absorb_equals_the_dense_form(
    N: int, D: int, K: int, dtype: torch.dtype, offset: float, tolerance: float
) -> None:
    arguments = problem(N, D, K, dtype=dtype, offset=offset)
    expected = _absorb_densely(*(t.double() for t in arguments[:5]), arguments[5])
    assert_close(absorbed(*arguments), expected, tolerance)


@pytest.mark.parametrize("spread", [1e-3, 1e-4])
def test_absorb_at_a_collapse_equals_the_dense_form(spread: float) -> None:
    weight, mean, _, covariance, x, index = problem(400, 20, 3)
    x = torch.where((index < 3)[:, None], 1 + spread * x, x)
    nothing = (0 * weight, mean, 0 * mean, covariance)
    expected = _absorb_densely(*(t.double() for t in nothing), x.double(), index)
    rows = torch.bincount(index, minlength=3)[:3] > 1  # of a single row there is nothing to measure by
    assert relative_error(absorbed(*nothing, x, index)[3][rows], expected[3][rows]) <= FLOAT32


@pytest.mark.parametrize(("N", "D", "K"), SHAPES)
def test_absorb_keeps_components_without_a_row_to_the_bit_and_covariances_symmetric(N: int, D: int, K: int) -> None:
    weight, mean, residual, covariance, x, index = problem(N, D, K)
    covariance = (covariance + covariance.mT) / 2
    absent = torch.bincount(index, minlength=K)[:K] == 0
    history = weight, mean, residual, covariance
    results = absorbed(*history, x, index)
    for found, wanted in zip(results, history, strict=True):
        assert torch.equal(found[absent], wanted[absent])
    assert torch.equal(results[3], results[3].mT)


@pytest.mark.parametrize("own", [False, True])
def test_absorb_into_given_memory_equals_absorb(own: bool) -> None:
    weight, mean, residual, covariance, x, index = problem(90, 2 * BLOCK + 40, 3)
    expected = absorbed(weight, mean, residual, covariance, x, index)
    above = torch.ones_like(covariance).triu(diagonal=1) > 0
    garbage = torch.full_like(covariance, float("nan"))
    history = torch.where(above, garbage, covariance)  # whose upper triangle must not be read
    work = Workspace(history if own else garbage, torch.full((2, 200, x.shape[1]), float("nan")))
    new, _ = absorb(Moments(weight=weight, mean=mean, covariance=history), residual, x, index, plain=True, work=work)
    assert new.covariance is work.covariance
    assert torch.equal(complete_(new.covariance), expected[3])
    assert torch.equal(new.mean, expected[1])


# The transforms


def scalar(function: Callable[..., tuple[Tensor, ...]], index: Tensor) -> Callable[..., Tensor]:
    """A number that depends on all results in a way that no symmetry hides, as a function of what has derivatives."""

    def number(*arguments: Tensor) -> Tensor:
        weight, mean, _, covariance = function(*arguments, index)
        slope = torch.linspace(0.5, 2.0, covariance.numel(), dtype=covariance.dtype).reshape(covariance.shape)
        total = (slope * covariance).square().sum() + mean.pow(3).sum() + (weight**2).sum()
        return total * mean.square().sum()

    return number


def small() -> tuple[tuple[Tensor, ...], Tensor]:
    *values, index = problem(12, 3, 3, dtype=torch.float64)
    values[4] = values[4].nan_to_num(0.0, 0.0, 0.0)  # finite differences between them would be NaN in either form
    return tuple(values), index


@pytest.mark.parametrize("argnum", range(4))
@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd, hessian])
def test_derivatives_equal_those_of_the_dense_form(
    transform: Callable[..., Callable[..., Tensor]], argnum: int
) -> None:
    values, index = small()
    expected = transform(scalar(_absorb_densely, index), argnums=argnum)(*values)
    actual = transform(scalar(absorbed, index), argnums=argnum)(*values)
    assert relative_error(actual, expected) <= 10 * FLOAT64
    assert actual.abs().max() > 0


@pytest.mark.parametrize("transform", [grad, jacfwd])
def test_compiled_derivatives_equal_plain_ones(transform: Callable[..., Callable[..., Tensor]]) -> None:
    torch._dynamo.reset()
    values, index = small()
    function = transform(lambda x: scalar(absorbed, index)(*values[:4], x))
    compiled = torch.compile(function, backend="aot_eager")
    assert relative_error(compiled(values[4]), function(values[4])) <= 10 * FLOAT64
    torch._dynamo.reset()


def test_dual_numbers_outside_of_transforms_carry_the_derivative() -> None:
    values, index = small()
    tangent = torch.ones_like(values[4])
    expected = jvp(lambda x: _absorb_densely(*values[:4], x, index)[3], (values[4],), (tangent,))[1]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(values[4], tangent)
        actual = torch.autograd.forward_ad.unpack_dual(absorbed(*values[:4], dual, index)[3]).tangent
    assert relative_error(actual, expected) <= 10 * FLOAT64


def test_plain_autograd_equals_the_dense_form_twice() -> None:
    values, index = small()
    results = []
    for function in (absorbed, _absorb_densely):
        leaves = [v.clone().requires_grad_() for v in values]
        first = torch.autograd.grad(scalar(function, index)(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append([*first, *second])
    for found, wanted in zip(*results, strict=True):
        assert relative_error(found, wanted) <= 10 * FLOAT64


@pytest.mark.parametrize(
    "in_dims",
    [(0, 0, 0, 0, 0, 0), (None, None, None, None, 0, 0), (0, 0, 0, 0, None, None), (None, 1, 0, None, 1, 1)],
)
def test_vmap_equals_a_loop(in_dims: tuple[int | None, ...]) -> None:
    single = [problem(12, 3, 3, dtype=torch.float64, offset=o) for o in (0.0, 1.0, 2.0)]
    stacked = [
        ts[0] if dim is None else torch.stack(ts, dim=dim)
        for ts, dim in zip(zip(*single, strict=True), in_dims, strict=True)
    ]
    results = vmap(absorbed, in_dims=in_dims)(*stacked)
    for item in range(3):
        one = [t if dim is None else t.select(dim, item) for t, dim in zip(stacked, in_dims, strict=True)]
        for found, wanted in zip(results, absorbed(*one), strict=True):
            torch.testing.assert_close(found[item], wanted, rtol=FLOAT64, atol=FLOAT64, equal_nan=True)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_compiled_equals_plain(needs_gradient: bool) -> None:
    torch._dynamo.reset()
    values, index = small()
    x = values[4].clone().requires_grad_(needs_gradient)
    compiled = torch.compile(absorbed, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*values[:4], x, index), absorbed(*values[:4], x, index), FLOAT64)
    torch._dynamo.reset()


def test_operator_is_what_torch_expects_of_one() -> None:
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.mixture_core.absorb.default, problem(12, 3, 3), test_utils=checks)
