"""Full float32 whatever training has set up around the estimator, and everything put back behind it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, backends

import mixture_core
import mixture_torch.estimator
from mixture_torch import MixtureStats
from tests.tolerances import relative_error
from tests.wrapper.samples import assert_close, estimator, mixture

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
CHANGED = 1e-4  # relative difference of a product that was not made in full float32
MATMULS = (backends.cuda.matmul, backends.mkldnn.matmul)
Surroundings = Callable[[str], AbstractContextManager[Any]]


def reset() -> None:
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    for matmul in MATMULS:
        matmul.fp32_precision = "none"
    backends.mkldnn.fp32_precision = "none"
    backends.fp32_precision = "none"


@pytest.fixture(autouse=True)
def settings_of_their_own() -> Iterator[None]:
    reset()
    yield
    reset()


def after(change: Callable[..., object], *arguments: object) -> Surroundings:
    """A setting, which stays until `reset`."""

    @contextmanager
    def surroundings(device: str) -> Iterator[None]:
        change(*arguments)
        yield

    return surroundings


def setting(backend: Any, value: str) -> Surroundings:
    return after(setattr, backend, "fp32_precision", value)


SURROUNDINGS: dict[str, Surroundings] = {
    "autocast bf16": lambda device: torch.autocast(device, torch.bfloat16),
    "autocast half": lambda device: torch.autocast(device, torch.float16),
    "inference mode": lambda device: torch.inference_mode(),
    "gradients": lambda device: torch.enable_grad(),
    "anomaly detection": lambda device: torch.autograd.set_detect_anomaly(True),
    "medium products": after(torch.set_float32_matmul_precision, "medium"),
    "high products": after(torch.set_float32_matmul_precision, "high"),
    "bf16 products of one backend": setting(backends.mkldnn.matmul, "bf16"),
    "tf32 products of one backend": setting(backends.cuda.matmul, "tf32"),
    "bf16 everywhere": setting(backends, "bf16"),
    "tf32 everywhere": setting(backends, "tf32"),
    "deterministic algorithms": after(torch.use_deterministic_algorithms, True),
    "default dtype float64": after(torch.set_default_dtype, torch.float64),
    "default dtype bf16": after(torch.set_default_dtype, torch.bfloat16),
    "default device meta": after(torch.set_default_device, "meta"),
}
surrounded = pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS.keys())


def settings() -> dict[str, object]:
    return {
        "autocast": [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")],
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "products": [backend.fp32_precision for backend in (*MATMULS, backends, backends.mkldnn, backends.cudnn)],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "seed": torch.initial_seed(),
    }


def batches(device: str) -> list[Tensor]:
    return [mixture(N, K=8, D=32, apart=3.0, seed=seed)[0].to(device) for seed, N in enumerate((200, 64, 5))]


def run(inputs: list[Tensor], *, read: bool = True) -> tuple[MixtureStats, dict[str, Tensor]]:
    wrapper = estimator(K=8)
    for x in inputs:
        stats = wrapper.update(x)
    return wrapper, dict(stats) if read else {}


@pytest.mark.parametrize("device", DEVICES)
@surrounded
def test_updates_statistics_and_assignments_inside_are_full_float32(surroundings: Surroundings, device: str) -> None:
    inputs = batches(device)
    wrapper, plain = run(inputs)
    assigned = wrapper.assign(inputs[1])
    unread = run(inputs, read=False)[0]
    with surroundings(device):
        found, late = run(inputs)[1], {key: value.clone() for key, value in unread.stats.items()}
        assigned_inside = wrapper.assign(inputs[1])
    for values in (found, late):
        assert_close(values, plain)
        assert {key: value.dtype for key, value in values.items()} == {key: plain[key].dtype for key in values}
    assert assigned_inside.dtype == torch.float32
    assert torch.equal(assigned_inside, assigned)


@surrounded
def test_update_reading_and_failure_put_all_settings_back(surroundings: Surroundings) -> None:
    x = batches("cpu")[0]
    with surroundings("cpu"):
        before = settings()
        wrapper = estimator(K=8)
        dict(wrapper.update(x))
        wrapper.assign(x)
        assert settings() == before
        with pytest.raises(ValueError, match="embeddings"):
            wrapper.update(x[:, 1:])
        assert settings() == before


@pytest.mark.parametrize("allowed", [True, False])
def test_update_leaves_the_older_switch_for_tf32(allowed: bool) -> None:
    backends.cuda.matmul.allow_tf32 = allowed
    try:
        run(batches("cpu"))
        assert backends.cuda.matmul.allow_tf32 is allowed
    finally:
        backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize(
    ("matmul", "value"),
    [(backends.cuda.matmul, "tf32"), (backends.mkldnn.matmul, "tf32"), (backends.mkldnn.matmul, "bf16")],
    ids=["cuda tf32", "mkldnn tf32", "mkldnn bf16"],
)
def test_products_that_follow_a_common_setting_go_on_to_follow_it(matmul: Any, value: str) -> None:
    backends.fp32_precision = value
    assert matmul.fp32_precision == value
    run(batches("cpu"))
    backends.fp32_precision = "ieee"
    assert matmul.fp32_precision in ("ieee", "none")


def test_products_inside_an_update_are_set_to_full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append((torch.is_autocast_enabled("cpu"), *(matmul.fp32_precision for matmul in MATMULS)))
        return advance(*arguments, **options)

    advance = mixture_torch.update.mixture.advance
    monkeypatch.setattr(mixture_torch.update.mixture, "advance", spy)
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", torch.bfloat16):
        estimator().update(mixture()[0])
    assert seen == [(False, "ieee", "ieee")]


@pytest.mark.parametrize("device", DEVICES)
def test_core_without_the_wrapper_does_change_inside_autocast(device: str) -> None:
    x = batches(device)[0]
    R = torch.rand(len(x), 8, generator=torch.Generator().manual_seed(0)).to(device)
    plain = mixture_core.batch_moments(x, R).covariance
    with torch.autocast(device, torch.bfloat16):
        assert relative_error(mixture_core.batch_moments(x, R).covariance, plain) > CHANGED
