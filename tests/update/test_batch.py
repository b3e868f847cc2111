"""Everything that may be handed in as embeddings and labels, and from wherever."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mixture_torch import MixtureStats
from tests.wrapper.samples import all_bits, assert_close, bits, estimator, mixture, unchanged


def plain() -> Tensor:
    """Embeddings that every type below holds exactly."""
    return mixture()[0].mul(4).round().div(4)


EMBEDDINGS: dict[str, Callable[[Tensor], Any]] = {
    "float64": Tensor.double,
    "half": Tensor.half,
    "bf16": Tensor.bfloat16,
    "parameter": nn.Parameter,
    "requires_grad": lambda x: x.clone().requires_grad_(),
    "inside a graph": lambda x: x.clone().requires_grad_() * 1,
    "column-major": lambda x: x.T.contiguous().T,
    "every second row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "every second column": lambda x: x.repeat_interleave(2, dim=1)[:, 1::2],
    "with an offset": lambda x: torch.cat([x, x])[60:],
    "a part of a complex number": lambda x: torch.complex(x * 0, x).imag,
    "negated lazily": lambda x: torch.complex(x * 0, -x).conj().imag,
    "NumPy float32": Tensor.numpy,
    "NumPy float64": lambda x: x.double().numpy(),
    "NumPy half": lambda x: x.half().numpy(),
    "NumPy backwards": lambda x: x.flip(0).numpy()[::-1],
    "NumPy column-major": lambda x: np.asfortranarray(x.numpy()),
    "NumPy read-only": lambda x: np.frombuffer(x.numpy().tobytes(), np.float32).reshape(60, 4),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("convert", EMBEDDINGS.values(), ids=EMBEDDINGS.keys())
def test_update_and_assign_take_embeddings_of_any_make_and_leave_them(convert: Callable[[Tensor], Any]) -> None:
    wrapper, x = estimator(), convert(plain())
    stats, expected = dict(wrapper.update(x)), estimator().update(plain())
    assert torch.equal(wrapper.assign(x), wrapper.assign(plain()))
    assert_close(stats, expected)
    assert {key: value.dtype for key, value in stats.items()} == {key: value.dtype for key, value in expected.items()}
    assert all(not value.requires_grad for value in stats.values())
    assert bool((torch.as_tensor(np.array(x)) if isinstance(x, np.ndarray) else x).eq(plain()).all())


def test_update_leaves_the_graph_of_its_embeddings_usable() -> None:
    x = mixture()[0].requires_grad_()
    z = x * 2
    estimator().update(z)
    z.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))


def run(wrapper: MixtureStats, *, inside: tuple[bool, ...]) -> MixtureStats:
    """Four updates, of which some are inside inference mode."""
    for step, inference in enumerate(inside):
        with torch.inference_mode(inference):
            wrapper.update(mixture(seed=step)[0])
    return wrapper


@pytest.mark.parametrize("K", [3, 20, 100])  # starts at once, later, and not at all
@pytest.mark.parametrize("inside", [(True,) * 4, (True, False, True, False), (False, True, False, True)])
def test_update_goes_on_across_inference_mode(inside: tuple[bool, ...], K: int) -> None:
    expected = all_bits(run(estimator(K=K), inside=(False,) * 4))
    assert all_bits(run(estimator(K=K), inside=inside)) == expected


def test_update_inside_a_functional_gradient_is_that_outside() -> None:
    wrapper, expected, (x, _) = estimator(), estimator(), mixture()

    def loss(weight: Tensor) -> Tensor:
        z = x * weight
        wrapper.update(z)
        return z.sum()

    torch.func.grad(loss)(torch.ones(4))
    expected.update(x)
    assert all_bits(wrapper) == all_bits(expected)


@pytest.mark.parametrize("assigner", ["kmeans_online", "label_supervised"])
def test_update_under_vmap_is_refused(assigner: str) -> None:
    wrapper, (x, labels) = estimator(assigner=assigner), mixture()
    wrapper.update(x, labels)

    def loss(weight: Tensor) -> Tensor:
        wrapper.update(x * weight, labels)
        return weight.sum()

    with unchanged(wrapper), pytest.raises(TypeError, match=r"^`embeddings` must be .*got a batched one; call it outs"):
        torch.func.vmap(loss)(torch.ones(3, 4))
    with unchanged(wrapper), pytest.raises(TypeError, match=r"^`embeddings` must be .*got a batched one"):
        torch.func.vmap(torch.func.grad(loss))(torch.ones(3, 4))
    assert wrapper.update(x, labels)


def test_update_with_labels_under_vmap_is_refused() -> None:
    wrapper, (x, labels) = estimator(assigner="label_supervised"), mixture()
    wrapper.update(x, labels)
    with unchanged(wrapper), pytest.raises(TypeError, match=r"^`labels` must be .*got a batched one"):
        torch.func.vmap(lambda labels: wrapper.update(x, labels).trace_B)(torch.stack([labels, labels]))


def test_update_of_fake_tensors_is_refused() -> None:
    wrapper, (x, _) = estimator(), mixture()
    wrapper.update(x)
    with FakeTensorMode():
        fake = torch.ones(60, 4)
        for value in (fake, x):
            with pytest.raises(TypeError, match=r"^`embeddings` must be .*got a fake one; call it outside of Fake"):
                wrapper.update(value)
    with unchanged(wrapper), pytest.raises(TypeError, match="got a fake one"):
        wrapper.update(fake)
    assert bits(wrapper.update(x)) != {}


class Subclass(torch.Tensor):
    """A tensor that makes all that is computed from it its like, as fastai's do."""


def test_stats_of_a_tensor_subclass_are_plain_tensors() -> None:
    wrapper, x = estimator(), plain()
    stats = wrapper.update(x.as_subclass(Subclass))
    held = [*stats.values(), *(value for value in wrapper.state_dict().values() if isinstance(value, Tensor))]
    assert {type(value) for value in held} == {Tensor}
    assert bits(stats) == bits(estimator().update(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_state_follows_the_embeddings_from_device_to_device() -> None:
    wrapper = estimator()
    for step, device in enumerate(("cpu", "cuda", "cpu", "cuda")):
        stats = wrapper.update(mixture(seed=step)[0].to(device))
        assert {value.device.type for value in stats.values()} == {device}
