"""The functions change nothing but what they return, and draw nothing."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mixture_core import (
    MixtureConfig,
    assign,
    batch_moments,
    decay,
    init,
    kmeans_plusplus,
    lloyd,
    merge,
    responsibilities_from_labels,
    step,
)
from tests.core.common import DERIVED, assert_same_bits, gaussians

CALLS: dict[str, Callable[..., Any]] = {
    "init": lambda state, x, labels: init(state.config, x, labels),
    "step": step,
    "assign": assign,
    "merge": lambda state, x, labels: merge(state.moments, state.moments),
    "decay": lambda state, x, labels: decay(state.moments, 0.5),
    "batch_moments": lambda state, x, labels: batch_moments(x, assign(state, x, labels)),
    "lloyd": lambda state, x, labels: lloyd(x, state.moments.mean, iterations=3),
    "kmeans_plusplus": lambda state, x, labels: kmeans_plusplus(x, 4, generator=torch.Generator().manual_seed(0)),
    "responsibilities_from_labels": lambda state, x, labels: responsibilities_from_labels(labels, 4),
    "derived": lambda state, x, labels: [getattr(state.moments, name) for name in DERIVED],
}
MODES = [{}, {"mode": "per_batch"}, {"assigner": "label_supervised"}]
DEFAULT_DTYPES = [torch.float64, torch.bfloat16, torch.float16]


def problem(options: dict[str, str]) -> tuple[Any, Tensor, Tensor]:
    """A state after a step, embeddings with bad rows, labels; k-means will move a dead component."""
    x, labels, _ = gaussians(0, N=60, D=5, K=4)
    state, _ = step(init(MixtureConfig(K=4, **options), x), x, labels)
    state.moments.weight[1] = 0.0
    x, labels = x.flip(0), labels.flip(0)
    x[3, 2], x[7, 0], labels[5] = float("nan"), float("inf"), -1
    return state, x, labels


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("name", CALLS)
def test_call_leaves_its_inputs_unchanged(name: str, options: dict[str, str]) -> None:
    arguments = problem(options)
    before = tree_map(torch.clone, arguments)
    CALLS[name](*arguments)
    for now, then in zip(tree_leaves(arguments), tree_leaves(before), strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CALLS)
def test_call_draws_no_global_random_number(name: str) -> None:
    arguments = problem({})
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    CALLS[name](*arguments)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("merge", "decay", "derived")])
def test_result_shares_no_memory_with_the_batch(name: str) -> None:
    # A training loop may overwrite its embeddings as soon as the call returns.
    state, x, labels = problem({})
    results = tree_leaves(CALLS[name](state, x, labels))
    batch = {tensor.untyped_storage().data_ptr() for tensor in (x, labels)}
    assert not batch & {tensor.untyped_storage().data_ptr() for tensor in results}


@pytest.mark.parametrize("options", MODES)
def test_calls_run_under_deterministic_algorithms(options: dict[str, str]) -> None:
    state, x, labels = problem(options)
    expected = step(state, x, labels)[0].moments
    torch.use_deterministic_algorithms(True)
    try:
        for call in CALLS.values():
            call(state, x, labels)
        actual = step(state, x, labels)[0].moments
        torch.func.grad(lambda rows: step(state, rows, labels)[1].trace_B)(x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("default", DEFAULT_DTYPES)
@pytest.mark.parametrize("options", MODES)
def test_default_dtype_does_not_matter(options: dict[str, str], default: torch.dtype) -> None:
    state, x, labels = problem(options)
    expected = [call(state, x, labels) for call in CALLS.values()]
    torch.set_default_dtype(default)
    try:
        actual = [call(state, x, labels) for call in CALLS.values()]
    finally:
        torch.set_default_dtype(torch.float32)
    for found, wanted in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_default_device_does_not_matter() -> None:
    state, x, labels = problem({})
    expected = [call(state, x, labels) for call in CALLS.values()]
    with torch.device("meta"):
        generator = torch.Generator(device="cpu").manual_seed(0)
        calls = CALLS | {"kmeans_plusplus": lambda state, x, labels: kmeans_plusplus(x, 4, generator=generator)}
        actual = [call(state, x, labels) for call in calls.values()]
    for found, wanted in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_mode_does_not_matter(mode: Callable[[], Any]) -> None:
    arguments = problem({})
    with mode():
        new, stats = step(*arguments)
    expected, expected_stats = step(*arguments)
    assert_same_bits(new.moments, expected.moments)
    assert torch.equal(stats.R, expected_stats.R)
