"""Which estimator is the active one."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import pytest

from mixture_torch import activate, active_estimator
from mixture_torch.context import active_step
from tests.wrapper.samples import assert_says, estimator


def test_active_estimator_is_none_by_default() -> None:
    assert active_estimator() is None


def test_activate_none_hides_the_outer_estimator() -> None:
    with activate(estimator()), activate(None) as given:
        assert given is None
        assert active_estimator() is None


def test_activate_may_be_entered_inside_itself() -> None:
    own = estimator()
    block = activate(own)
    with block:
        with block as given:
            assert given is active_estimator() is own
        assert active_estimator() is own
    assert active_estimator() is None


def test_activate_may_be_entered_by_threads_at_once() -> None:
    own, barrier = estimator(), Barrier(4)
    block = activate(own)

    def inside(depth: int) -> list[bool]:
        if depth:
            with block:
                deeper = inside(depth - 1)
                return [*deeper, active_estimator() is own]
        barrier.wait(10)  # all four are inside now, at depths of their own
        return []

    def around(depth: int) -> tuple[list[bool], object]:
        return inside(depth), active_estimator()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(around, range(4))) == [([True] * depth, None) for depth in range(4)]
    assert active_estimator() is None


def test_activate_of_a_generator_ends_alone() -> None:
    first, second = estimator(), estimator()

    def generator() -> Iterator[None]:
        with activate(first):
            yield

    suspended = generator()
    next(suspended)
    with activate(second):
        suspended.close()
        assert active_estimator() is second
    assert active_estimator() is None


def test_activate_decorates_functions() -> None:
    own = estimator()
    assert [activate(own)(active_estimator)() for _ in range(2)] == [own, own]


def test_end_of_no_block_is_one_line() -> None:
    with pytest.raises(RuntimeError, match=r"^`activate` ended in a thread in which it did not begin\.$"):
        activate(estimator()).__exit__()


@pytest.mark.parametrize("step", [0, 7, "warm-up", np.int64(7)])
def test_active_step_is_what_was_said(step: Any) -> None:
    own = estimator()
    with activate(own, step=step):
        assert active_step(own) == step
    assert active_step(own) is None


def test_active_step_is_told_to_its_estimator_alone() -> None:
    first, second = estimator(), estimator()
    with activate(first, step=1):
        assert active_step(second) is None
        with activate(second, step=2):
            assert active_step(first) is None
            assert active_step(second) == 2


@pytest.mark.parametrize("hide", [lambda own: activate(own), lambda own: activate(None)], ids=["same", "none"])
def test_inner_activate_without_a_step_hides_the_outer_step(hide: Any) -> None:
    own = estimator()
    with activate(own, step=1):
        with hide(own):
            assert active_step(own) is None
        assert active_step(own) == 1


@pytest.mark.parametrize("step", [True, 1.0, [1], (1,), np.float32(1)])
def test_activate_refuses_what_is_no_step(step: Any) -> None:
    with pytest.raises(TypeError) as error:
        activate(estimator(), step=step)
    assert_says(error.value, "step", f"got {step!r}")


def test_the_innermost_block_of_an_object_that_was_entered_twice_ends_first() -> None:
    outer, inner = estimator(), estimator()
    twice = activate(outer)
    with twice, activate(inner):
        with twice:
            assert active_estimator() is outer
        assert active_estimator() is inner
