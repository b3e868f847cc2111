"""The algebra of moments: merge and decay."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixture_core import MixtureConfig, MixtureState, Moments, batch_moments, decay, merge
from mixture_core.testing import embeddings, oracle_merge, states
from tests.core.common import assert_moments_close, assert_same_bits, soft, stack
from tests.tolerances import FAR_FROM_ZERO, FLOAT32, FLOAT64

SAME_SIZE = {"config": MixtureConfig(K=4), "D": 3}


def nothing_like(moments: Moments) -> Moments:
    return Moments(weight=0 * moments.weight, mean=moments.mean + 7.0, covariance=moments.covariance + 3.0)


def occupied(moments: Moments) -> Moments:
    """Without the mean and covariance of components of weight 0, of which merge keeps the first argument's."""
    some = moments.weight > 0
    return Moments(
        weight=moments.weight,
        mean=torch.where(some[:, None], moments.mean, 0.0),
        covariance=torch.where(some[:, None, None], moments.covariance, 0.0),
    )


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, FLOAT32), ({"dtype": torch.float64}, FLOAT64), ({"offset": 1000.0}, FAR_FROM_ZERO)],
)
@given(data=st.data())
def test_merge_equals_the_oracle(data: st.DataObject, options: dict[str, Any], tolerance: float) -> None:
    a, b = (data.draw(states(**SAME_SIZE, **options)).moments for _ in range(2))
    assert_moments_close(merge(a, b), oracle_merge(a, b), tolerance)


@given(states(**SAME_SIZE))
def test_merge_with_nothing_keeps_every_bit(state: MixtureState) -> None:
    assert_same_bits(merge(state.moments, nothing_like(state.moments)), state.moments)


@given(states(**SAME_SIZE, with_empty=False))
def test_merge_of_nothing_with_something_is_that_to_the_bit(state: MixtureState) -> None:
    assert_same_bits(merge(nothing_like(state.moments), state.moments), state.moments)


@given(states(**SAME_SIZE), states(**SAME_SIZE), states(**SAME_SIZE), states(**SAME_SIZE))
def test_merge_accepts_leading_batch_dimensions(
    a: MixtureState, b: MixtureState, c: MixtureState, d: MixtureState
) -> None:
    stacked = merge(stack(a.moments, b.moments), stack(c.moments, d.moments))
    assert_same_bits(stacked, stack(merge(a.moments, c.moments), merge(b.moments, d.moments)))


@given(embeddings(D=4, with_bad_rows=True), st.data())
def test_chunks_of_a_batch_merge_into_the_whole(x: Tensor, data: st.DataObject) -> None:
    N = x.shape[0]
    R = data.draw(soft(N=N, K=3))
    first, second = sorted((data.draw(st.integers(0, N)), data.draw(st.integers(0, N))))
    chunks = [batch_moments(x[rows], R[rows]) for rows in (slice(first), slice(first, second), slice(second, None))]
    whole = batch_moments(x, R)
    assert_moments_close(occupied(merge(merge(chunks[0], chunks[1]), chunks[2])), whole, FLOAT32)


@given(states(**SAME_SIZE), st.floats(0, 1))
def test_decay_scales_the_weight_and_nothing_else(state: MixtureState, factor: float) -> None:
    m = state.moments
    scaled = decay(m, factor)
    assert_same_bits(scaled, Moments(weight=m.weight * factor, mean=m.mean, covariance=m.covariance))
