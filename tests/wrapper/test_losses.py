"""NT-Xent against plain loops in float64, and what it feeds to the active estimator."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mixture_torch import NTXentLoss, activate
from tests.tolerances import FLOAT32, FLOAT64, relative_error
from tests.wrapper.samples import all_bits, bits, estimator, mixture

TEMPERATURES = [0.05, 0.1, 0.5, 1, 10.0]


def plain_ntxent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """The definition, pair by pair."""
    z = [row / row.square().sum().sqrt() for row in (*z1, *z2)]
    N, losses = len(z1), []
    for i in range(2 * N):
        j = (i + N) % (2 * N)
        others = [torch.exp((z[i] * z[k]).sum() / temperature) for k in range(2 * N) if k != i]
        losses.append(-torch.log(torch.exp((z[i] * z[j]).sum() / temperature) / torch.stack(others).sum()))
    return torch.stack(losses).mean()


def views(N: int = 5, D: int = 3, *, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(N)
    z = scale * torch.randn(2, N, D, generator=generator, dtype=torch.float64)
    return z[0].to(dtype), z[1].to(dtype)


def value_and_gradients(loss: Any, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    z1, z2 = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    value = loss(z1, z2)
    value.backward()
    return value.detach(), torch.cat([z1.grad, z2.grad])


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("N", "D"), [(2, 1), (2, 4), (5, 3), (8, 16)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_loss_is_the_plain_loops_value_and_gradients(temperature: float, N: int, D: int, scale: float) -> None:
    z1, z2 = views(N, D, scale=scale)
    value, gradients = value_and_gradients(NTXentLoss(temperature), z1, z2)
    expected = value_and_gradients(lambda *z: plain_ntxent(*z, temperature), z1, z2)
    assert relative_error(value, expected[0]) < FLOAT64
    # In one dimension all gradients are rounding.
    assert (gradients - expected[1]).abs().max() < FLOAT64 / scale / temperature


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_loss_in_float32_is_the_plain_loops_value_and_gradients(temperature: float) -> None:
    z1, z2 = views(8, 16, dtype=torch.float32)
    value, gradients = value_and_gradients(NTXentLoss(temperature), z1, z2)
    expected = value_and_gradients(lambda *z: plain_ntxent(*z, temperature), z1.double(), z2.double())
    # A cosine is good to 1e-7, and divided by the temperature.
    tolerance = FLOAT32 * max(1.0, 0.1 / temperature)
    assert value.dtype == torch.float32
    assert relative_error(value, expected[0]) < tolerance
    assert relative_error(gradients, expected[1]) < tolerance


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_loss_of_half_inputs_is_that_of_their_float32(dtype: torch.dtype) -> None:
    z1, z2 = views(8, 16, dtype=dtype)
    value, gradients = value_and_gradients(NTXentLoss(0.1), z1, z2)
    expected = value_and_gradients(NTXentLoss(0.1), z1.float(), z2.float())
    assert torch.equal(value, expected[0])
    assert torch.equal(gradients, expected[1].to(dtype))


@pytest.mark.parametrize("z", [torch.zeros(4, 3), torch.ones(4, 3)], ids=["zeros", "all the same"])
def test_loss_of_a_collapse_is_log_of_the_rivals(z: Tensor) -> None:
    value, gradients = value_and_gradients(NTXentLoss(0.1), z, z)
    assert relative_error(value, torch.tensor(7.0).log()) < FLOAT32
    assert bool(gradients.isfinite().all())


@pytest.mark.parametrize("active", [True, False])
def test_loss_is_the_same_with_and_without_an_estimator(active: bool) -> None:
    z1, z2 = views(30, 4, dtype=torch.float32)
    expected = value_and_gradients(NTXentLoss(0.1), z1, z2)
    with activate(estimator(enabled=active)):
        found = value_and_gradients(NTXentLoss(0.1), z1, z2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_loss_feeds_both_views_normalised() -> None:
    wrapper, expected = estimator(), estimator()
    z1, z2 = views(30, 4, scale=7.0, dtype=torch.float32)
    with activate(wrapper):
        NTXentLoss()(z1, z2)
    expected.update(functional.normalize(torch.cat([z1, z2]), dim=1), views=2)
    assert all_bits(wrapper) == all_bits(expected)


@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "NumPy"])
def test_loss_feeds_labels_once_for_either_view(numpy: bool) -> None:
    wrapper, (x, labels) = estimator(assigner="label_supervised"), mixture()
    with activate(wrapper):
        NTXentLoss()(x, x + 1, labels.numpy() if numpy else labels)
    assert torch.equal(wrapper.stats["R"].argmax(dim=1), torch.cat([labels, labels]))


def test_loss_feeds_full_float32_inside_autocast() -> None:
    wrapper, expected, (x, _) = estimator(), estimator(), mixture()
    with activate(expected):
        NTXentLoss()(x, x + 1)
    with activate(wrapper), torch.autocast("cpu", torch.bfloat16):
        NTXentLoss()(x, x + 1)
    assert bits(wrapper.stats) == bits(expected.stats)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([0] * 60, "a tensor or a NumPy array, got list"),
        (mixture()[1].float(), "integers, got torch.float32"),
        (mixture()[1][1:], "shape (120,), one per embedding, got (118,)"),
        (mixture()[1] + 1, "in [0, 3), or -1 or -100 for a row to ignore, got 3"),
        (None, "given if responsibilities come from labels"),
    ],
    ids=["list", "float", "short", "K", "missing"],
)
def test_loss_says_what_labels_the_estimator_wants(labels: Any, text: str) -> None:
    wrapper, (x, _) = estimator(assigner="label_supervised"), mixture()
    with activate(wrapper), pytest.raises((TypeError, ValueError), match=r"^`labels` must ") as error:
        NTXentLoss()(x, x + 1, labels)
    assert text in str(error.value)
    assert not wrapper.stats


@pytest.mark.parametrize(
    ("z1", "z2"),
    [
        (torch.zeros(3, 2), torch.zeros(4, 2)),
        (torch.zeros(3, 2), torch.zeros(3, 5)),
        (torch.zeros(0, 2), torch.zeros(0, 2)),
        (torch.zeros(3), torch.zeros(3)),
        (torch.zeros(3, 2, 2), torch.zeros(3, 2, 2)),
    ],
    ids=lambda z: str(tuple(z.shape)),
)
def test_loss_says_what_shapes_it_wants(z1: Tensor, z2: Tensor) -> None:
    wrapper = estimator()
    with activate(wrapper), pytest.raises(ValueError, match=r"^`z1` and `z2` must have the same shape") as error:
        NTXentLoss()(z1, z2)
    assert f"got {tuple(z1.shape)} and {tuple(z2.shape)}." in str(error.value)
    assert not wrapper.stats


@pytest.mark.parametrize(
    "temperature",
    [0, -0.1, float("nan"), float("inf"), 10**400, "0.1", None, True, [0.1]],
    ids=lambda value: str(value)[:5],
)
def test_loss_says_what_temperature_it_wants(temperature: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^`temperature` must be a number greater than 0, got "):
        NTXentLoss(temperature)


def test_loss_shows_its_temperature() -> None:
    assert repr(NTXentLoss(0.5)) == "NTXentLoss(temperature=0.5)"


@pytest.mark.parametrize("options", [{}, {"enabled": False}], ids=str)
def test_labels_that_nobody_looks_at_may_be_anything(options: dict[str, Any]) -> None:
    z = torch.randn(6, 4)
    with activate(estimator(**options)):
        assert NTXentLoss()(z, z, labels=np.array(["cat"] * 6)).isfinite()


def test_warning_of_the_estimator_points_at_the_call_of_the_loss() -> None:
    z, _ = views()
    wrapper = estimator()
    wrapper.update(torch.randn(60, 3))
    with activate(wrapper), pytest.warns(UserWarning, match="rows were ignored") as caught:
        NTXentLoss()(z * torch.nan, z)
    assert caught[0].filename == __file__
