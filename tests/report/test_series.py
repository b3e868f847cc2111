"""Long series are made short without losing a spike."""

import time

import numpy as np
import pytest

from mixture_torch.report.series import buckets, least_even


@pytest.mark.parametrize("S", [1000, 1001, 123_457])
def test_buckets_keep_every_spike(S: int) -> None:
    values = np.zeros(S)
    values[[0, S // 3, S - 1]] = 1.0, np.nan, -5.0
    step, low, high = buckets(np.arange(S), values, 100)
    assert len(step) == len(low) == len(high) == 100
    assert (high[0], low[-1], high[-1], low.min(), high.max()) == (1.0, -5.0, 0.0, -5.0, 1.0)


def test_buckets_of_a_short_series_are_its_rows() -> None:
    values = np.array([[1.0, np.nan], [2.0, 3.0]])
    step, low, high = buckets(np.array([7, 9]), values, 2)
    assert step.tolist() == [7, 9]
    assert low is values
    assert high is values


@pytest.mark.parametrize("S", [0, 1])
def test_buckets_take_nothing_and_one_row(S: int) -> None:
    assert [len(part) for part in buckets(np.arange(S), np.ones(S), 1)] == [S] * 3


def test_buckets_of_nothing_known_are_unknown() -> None:
    assert np.isnan(buckets(np.arange(10), np.full((10, 3), np.nan), 4)[1]).all()


def test_buckets_of_a_million_rows_take_no_time() -> None:
    values = np.random.default_rng(0).normal(size=(1_000_000, 8))
    begin = time.perf_counter()
    buckets(np.arange(len(values)), values, 2000)
    assert time.perf_counter() - begin < 2.0


def test_row_with_a_dead_component_stands_for_its_bucket() -> None:
    pi = np.full((1003, 4), 0.25)
    pi[501], pi[7] = (0.0, 0.5, 0.25, 0.25), np.nan
    step, kept = least_even(np.arange(1003), pi, 10)
    assert len(step) == len(kept) == 10
    assert 501 in step
    assert kept.min() == 0.0
