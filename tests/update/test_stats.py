"""Where the covariances live: what is handed out keeps its values, and no memory is taken twice."""

import copy
import math
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tests.wrapper.samples import bits, estimator, mixture

D = 200  # covariances of which only the lower blocks are written


def batches(count: int) -> list[Tensor]:
    return [mixture(D=D, seed=seed)[0] for seed in range(count)]


def expected(count: int) -> list[dict[str, Any]]:
    """What every step's statistics are, read at once."""
    one = estimator()
    return [bits(dict(one.update(x))) for x in batches(count)]


@pytest.mark.parametrize("age", [1, 2, 3])
def test_statistics_held_for_some_steps_are_those_of_their_step(age: int) -> None:
    one, held = estimator(), []
    for x, wanted in zip(batches(10), [*[None] * age, *expected(10)], strict=False):
        held.append(one.update(x))
        if wanted is not None:
            assert bits(dict(held.pop(0))) == wanted


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda stats: pickle.loads(pickle.dumps(stats)),
        lambda stats: tree_map(lambda t: t + 0, stats),
    ],
)
def test_copies_of_statistics_keep_their_values(copied: Any) -> None:
    one = estimator()
    copies = [copied(one.update(x)) for x in batches(6)]
    assert [bits(dict(stats)) for stats in copies] == expected(6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda stats: pickle.loads(pickle.dumps(stats))])
def test_copies_of_statistics_have_the_scalars_of_the_whole_step(copied: Any) -> None:
    one = estimator()
    for x in batches(2):
        stats = one.update(torch.cat([x, x]), step=1, views=2)
    assert stats.scalars()["n_rows"] > len(stats.R)
    assert copied(stats).scalars() == stats.scalars()
    assert not math.isnan(stats.scalars()["alignment"])


@pytest.mark.parametrize("empty", [0, 2, 3])
def test_empty_batches_between_do_not_mix_the_memories(empty: int) -> None:
    one, again, kept, wanted = estimator(strict=True), estimator(), [], []
    for number, x in enumerate(batches(12)):
        x = x[:0] if number in (empty, empty + 1, 8) else x
        kept.append(one.update(x))
        wanted.append(bits(dict(again.update(x))))
        if number % 4 == 3:
            before = bits(one.state_dict())
            with pytest.raises(ValueError, match="strict"):
                one.update(torch.full_like(batches(1)[0], float("nan")))
            assert bits(one.state_dict()) == before
    assert [bits(dict(stats)) for stats in kept] == wanted


@pytest.mark.parametrize("key", ["pi", "mu", "Sigma", "B", "R", "n_ignored"])
def test_changes_to_what_was_handed_out_do_not_reach_the_estimator(key: str) -> None:
    one = estimator()
    for x, wanted in zip(batches(6), expected(6), strict=True):
        assert bits(dict(one.update(x))) == wanted
        one.stats[key].zero_()
        state, state_dict = one.state, one.state_dict()
        assert state is not None
        for tensor in (state.moments.weight, state.moments.mean, state.moments.covariance, *state_dict.values()):
            if isinstance(tensor, Tensor):
                tensor.zero_()


def test_an_update_that_breaks_off_leaves_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    one = estimator()
    first, second, third = batches(3)
    one.update(first)
    before = bits(one.state_dict()), bits(dict(one.stats))

    def broken(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            sys.modules["mixture_core.step"], "StepStats", broken
        )  # the covariances have been written by then
        with pytest.raises(KeyboardInterrupt):
            one.update(second)
    assert (bits(one.state_dict()), bits(dict(one.stats))) == before
    again = estimator()
    again.update(first)
    assert bits(dict(one.update(third))) == bits(dict(again.update(third)))
