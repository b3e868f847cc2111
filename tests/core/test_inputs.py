"""What may be handed in, and one line for whatever may not."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixture_core import (
    MixtureConfig,
    MixtureState,
    assign,
    batch_moments,
    init,
    kmeans_plusplus,
    lloyd,
    merge,
    responsibilities_from_labels,
    step,
)
from tests.core.common import assert_same_bits, gaussians

ONE = "add a dimension with x[None] for one sample, or x[:, None] for one feature."
THREE = "flatten (N, T, D) with x.flatten(0, 1) to take each position as a sample, or average positions with x.mean(1)."


def got_list(name: str) -> str:
    return f"`{name}` must be a tensor or a NumPy array, got list; convert it with torch.as_tensor({name})."


SUPERVISED = MixtureConfig(K=3, assigner="label_supervised")


def warm(config: MixtureConfig, dtype: torch.dtype = torch.float32) -> tuple[MixtureState, Tensor, Tensor]:
    x, labels, _ = gaussians(0, N=30, D=4, K=3)
    x = x.to(dtype)
    return step(init(config, x), x, labels)[0], x, labels


# Types


def test_float64_stays_float64_throughout() -> None:
    state, x, _ = warm(MixtureConfig(K=3), torch.float64)
    _, stats = step(state, x)
    for name, value in stats.items():
        assert value.dtype == (torch.int64 if name.startswith("n_") else torch.float64), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.int8])
def test_other_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    state, x, _ = warm(MixtureConfig(K=3))
    rows = x.abs().to(dtype)
    new, stats = step(state, rows)
    assert stats.B.dtype == stats.R.dtype == torch.float32
    assert_same_bits(new.moments, step(state, rows.to(torch.float32))[0].moments)


@pytest.mark.parametrize("types", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_state_and_embeddings_of_two_types_meet_in_float64(types: tuple[torch.dtype, torch.dtype]) -> None:
    state, x, _ = warm(MixtureConfig(K=3), types[0])
    assert step(state, x.to(types[1]))[0].moments.covariance.dtype == torch.float64
    assert assign(state, x.to(types[1])).dtype == torch.float64


def test_strides_do_not_matter() -> None:
    state, x, _ = warm(MixtureConfig(K=3))
    expected = step(state, x)[0].moments
    wide = torch.randn(30, 8)
    wide[:, ::2] = x
    for rows in (x.T.contiguous().T, wide[:, ::2]):
        new = step(state, rows)[0].moments
        # Other strides may take another route through BLAS.
        torch.testing.assert_close(new.covariance, expected.covariance, rtol=1e-5, atol=1e-5)


def read_only(array: Any) -> Any:
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "layout",
    [np.array, read_only, np.asfortranarray, lambda array: np.ascontiguousarray(array[::-1])[::-1]],
    ids=["plain", "read-only", "column-major", "negative strides"],
)
@pytest.mark.parametrize("config", [MixtureConfig(K=3), SUPERVISED])
def test_numpy_arrays_go_in_where_tensors_do(config: MixtureConfig, layout: Callable[[Any], Any]) -> None:
    state, x, labels = warm(config)
    rows, own = layout(x.numpy()), layout(labels.numpy())
    assert_same_bits(init(config, rows, own).moments, init(config, x, labels).moments)
    assert torch.equal(assign(state, rows, own), assign(state, x, labels))
    new, stats = step(state, rows, own)
    torch.testing.assert_close(new.moments.covariance, step(state, x, labels)[0].moments.covariance)
    R = layout(stats.R.numpy())
    torch.testing.assert_close(batch_moments(rows, R).covariance, batch_moments(x, stats.R).covariance)
    assert torch.equal(responsibilities_from_labels(own, 3), responsibilities_from_labels(labels, 3))
    centroids = layout(state.moments.mean.numpy())
    torch.testing.assert_close(lloyd(rows, centroids, iterations=2), lloyd(x, state.moments.mean, iterations=2))
    seeds = [kmeans_plusplus(value, 3, generator=torch.Generator().manual_seed(0)) for value in (rows, x)]
    assert torch.equal(*seeds)


def test_numpy_array_is_not_shared() -> None:
    x = gaussians(0, N=30, D=4, K=3).embeddings.numpy()
    state = init(MixtureConfig(K=3), x)
    new, _ = step(state, x)
    before = new.moments.mean.clone()
    x[:] = 0
    assert torch.equal(new.moments.mean, before)


# Messages

X, L, GENERATOR = torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64), torch.Generator()
REALS = "must be real numbers, got"
MESSAGES = [
    (
        lambda s: step(s, [[1.0, 2.0]]),
        TypeError,
        got_list("embeddings"),
    ),
    (lambda s: step(s, None), TypeError, "`embeddings` must be a tensor or a NumPy array, got NoneType."),
    (lambda s: assign(s, 3.0), TypeError, "`embeddings` must be a tensor or a NumPy array, got float."),
    (lambda s: step(s, X.to(torch.complex64)), TypeError, f"`embeddings` {REALS} torch.complex64."),
    (lambda s: init(s.config, X.numpy().astype("complex128")), TypeError, f"`embeddings` {REALS} torch.complex128."),
    (lambda s: step(s, X[0]), ValueError, "`embeddings` must have shape (N, 4), got (4,); " + ONE),
    (lambda s: step(s, X[None]), ValueError, "`embeddings` must have shape (N, 4), got (1, 5, 4); " + THREE),
    (lambda s: step(s, X[:, :3]), ValueError, "`embeddings` must have shape (N, 4), got (5, 3)."),
    (lambda s: assign(s, X[:, :0]), ValueError, "`embeddings` must have shape (N, 4), got (5, 0)."),
    (lambda s: init(s.config, X[:, :0]), ValueError, "`embeddings` must have shape (N, D >= 1), got (5, 0)."),
    (lambda s: init(s.config, X[0]), ValueError, "`embeddings` must have shape (N, D >= 1), got (4,); " + ONE),
    (
        lambda s: step(s, X),
        ValueError,
        "`labels` must be given if responsibilities come from labels: (5,) integers, got None.",
    ),
    (
        lambda s: step(s, X, [0] * 5),
        TypeError,
        got_list("labels"),
    ),
    (lambda s: step(s, X, L.float()), TypeError, "`labels` must be integers, got torch.float32."),
    (lambda s: assign(s, X, L.bool()), TypeError, "`labels` must be integers, got torch.bool."),
    (lambda s: init(s.config, X, L.double()), TypeError, "`labels` must be integers, got torch.float64."),
    (lambda s: step(s, X, L[:4]), ValueError, "`labels` must have shape (5,), one per embedding, got (4,)."),
    (lambda s: step(s, X, L[:, None]), ValueError, "`labels` must have shape (5,), one per embedding, got (5, 1)."),
    (lambda s: init(s.config, X, L[:0]), ValueError, "`labels` must have shape (5,), one per embedding, got (0,)."),
    (lambda s: batch_moments("x", X), TypeError, "`x` must be a tensor or a NumPy array, got str."),
    (
        lambda s: batch_moments(X, [1]),
        TypeError,
        got_list("R"),
    ),
    (lambda s: batch_moments(X, X[:3]), ValueError, "`R` must have shape (5, K), one row per embedding, got (3, 4)."),
    (lambda s: batch_moments(X, X[:, 0]), ValueError, "`R` must have shape (5, K), one row per embedding, got (5,)."),
    (lambda s: lloyd(X[0], X, iterations=1), ValueError, "`x` must have shape (N, D >= 1), got (4,); " + ONE),
    (lambda s: lloyd(X, X, iterations=0), ValueError, "`iterations` must be at least 1, got 0."),
    (
        lambda s: lloyd(X, [1], iterations=1),
        TypeError,
        got_list("centroids"),
    ),
    (lambda s: kmeans_plusplus(X, 0, generator=GENERATOR), ValueError, "`K` must be at least 1, got 0."),
    (
        lambda s: kmeans_plusplus(X[0], 1, generator=GENERATOR),
        ValueError,
        "`x` must have shape (N, D >= 1), got (4,); " + ONE,
    ),
    (
        lambda s: responsibilities_from_labels([1], 2),
        TypeError,
        got_list("labels"),
    ),
    (lambda s: responsibilities_from_labels(X[0], 2), TypeError, "`labels` must be integers, got torch.float32."),
]


@pytest.mark.parametrize(("call", "error", "message"), MESSAGES, ids=[message for _, _, message in MESSAGES])
def test_wrong_input_is_told_what_was_expected_and_what_came(
    call: Callable[[MixtureState], Any], error: type[Exception], message: str
) -> None:
    state, _, _ = warm(SUPERVISED)
    with pytest.raises(error) as raised:
        call(state)
    assert str(raised.value) == message


NAMED = {
    "centroids of another width": (lambda: lloyd(X, X[:, :3], iterations=1), "`centroids` must have shape (K, 4), got"),
    "no centroids": (lambda: lloyd(X, X[:0], iterations=1), "`centroids` must"),
    "half an iteration": (lambda: lloyd(X, X, iterations=1.5), "`iterations` must be an integer, got 1.5."),
    "half a component": (lambda: kmeans_plusplus(X, 2.5, generator=GENERATOR), "`K` must be an integer, got 2.5."),
    "no component": (lambda: responsibilities_from_labels(L, 0), "`K` must be at least 1, got 0."),
    "fewer components than none": (lambda: responsibilities_from_labels(L, -1), "`K` must be at least 1, got -1."),
    "a single label": (lambda: responsibilities_from_labels(L[0], 2), "`labels` must have shape (N,), "),
    "R without components": (lambda: batch_moments(X, X[:, :0]), "`R` must"),
    "complex R": (lambda: batch_moments(X, X.to(torch.complex64)), "`R` must be real numbers, got torch.complex64."),
    "moments of another K": (lambda: merge(batch_moments(X, X[:, :1]), batch_moments(X, X)), "`b` must"),
    "moments of another D": (lambda: merge(batch_moments(X, X), batch_moments(X[:, :2], X)), "`b` must"),
    "text": (lambda: init(MixtureConfig(), np.array([["a"] * 4])), "`embeddings` must"),
    "objects": (lambda: init(MixtureConfig(), np.array([[None] * 4])), "`embeddings` must"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMED)
def test_wrong_input_is_called_by_its_name(name: str) -> None:
    call, start = NAMED[name]
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    assert str(raised.value).startswith(start)
    assert "\n" not in str(raised.value)
