"""Which estimator is the active one."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from mixture_torch import MixtureStats, activate, active_estimator
from tests.wrapper.samples import estimator


def test_active_estimator_is_none_by_default() -> None:
    assert active_estimator() is None


def test_activate_gives_its_block_the_estimator() -> None:
    first = estimator()
    with activate(first) as given:
        assert given is active_estimator() is first


def test_activate_ends_with_its_block() -> None:
    with activate(estimator()):
        pass
    assert active_estimator() is None


def test_activate_nests() -> None:
    first, second = estimator(), estimator()
    with activate(first):
        with activate(second):
            assert active_estimator() is second
        assert active_estimator() is first


def test_activate_of_the_same_estimator_nests() -> None:
    first = estimator()
    with activate(first):
        with activate(first):
            pass
        assert active_estimator() is first


def test_activate_none_hides_the_outer_estimator() -> None:
    with activate(estimator()), activate(None) as given:
        assert given is None
        assert active_estimator() is None


def test_activate_restores_on_exceptions() -> None:
    first = estimator()
    with activate(first):
        with pytest.raises(KeyError), activate(estimator()):
            raise KeyError
        assert active_estimator() is first


def test_threads_see_their_own_estimator() -> None:
    barrier = Barrier(4)

    def inside(own: MixtureStats) -> bool:
        with activate(own):
            barrier.wait(10)  # all four are active now
            return active_estimator() is own

    with ThreadPoolExecutor(4) as pool, activate(estimator()):
        assert list(pool.map(inside, [estimator() for _ in range(4)])) == [True] * 4


def test_thread_leaves_the_estimator_of_its_parent() -> None:
    def inside() -> None:
        with activate(None):
            pass

    own = estimator()
    with activate(own), ThreadPoolExecutor(1) as pool:
        pool.submit(inside).result()
        assert active_estimator() is own
