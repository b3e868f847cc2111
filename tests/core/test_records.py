"""The records: immutable, trees of tensors, and a mapping of statistics."""

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import attrs
import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from mixture_core import MixtureConfig, MixtureState, Moments, StepStats, init, step
from tests.core.common import gaussians

NAMES = ["pi", "mu", "Sigma", "B", "R", "trace_B", "opnorm_B", "participation_ratio", "n_ignored", "counts"]


@pytest.fixture(name="records")
def make_records() -> tuple[MixtureState, StepStats]:
    x = gaussians(0, N=40, D=3, K=4).embeddings
    return step(init(MixtureConfig(K=4), x), x)


@pytest.fixture(name="stats")
def make_stats(records: tuple[MixtureState, StepStats]) -> StepStats:
    return records[1]


def assert_same_records(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    assert tree_flatten(actual)[1] == tree_flatten(expected)[1]
    for found, wanted in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda record: pickle.loads(pickle.dumps(record))])
def test_records_survive_copies_and_pickles(records: Any, duplicate: Any) -> None:
    for record in records:
        assert_same_records(duplicate(record), record)


def test_records_evolve(records: Any) -> None:
    state, stats = records
    config = MixtureConfig(K=4, ema_decay=0.5)
    evolved = attrs.evolve(state, config=config)
    assert evolved.config is config
    assert evolved.moments is state.moments
    assert attrs.evolve(stats, R=stats.R * 2).R.max() == 2
    assert not attrs.evolve(state.moments, weight=torch.zeros(4)).pi.any()


def test_records_are_immutable(records: Any) -> None:
    state, stats = records
    for record, names in ((state, ("config", "moments")), (stats, ("R", "B")), (state.moments, ("weight", "pi"))):
        for name in (*names, "new_attribute"):
            with pytest.raises((attrs.exceptions.FrozenInstanceError, AttributeError)):
                setattr(record, name, None)
    with pytest.raises((attrs.exceptions.FrozenInstanceError, AttributeError)):
        del state.moments.weight


@pytest.mark.parametrize("values", [{}, {"weight": 1}, {"weight": 1, "mean": 2, "covariance": 3, "other": 4}])
def test_moments_say_which_fields_they_take(values: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="`Moments` takes exactly weight, mean, covariance by keyword, got"):
        Moments(**values)


def test_records_take_no_positional_arguments() -> None:
    with pytest.raises(TypeError):
        Moments(torch.zeros(1), torch.zeros(1, 1), torch.zeros(1, 1, 1))


# Trees


def test_records_round_trip_through_trees(records: Any) -> None:
    for record in records:
        leaves, structure = tree_flatten(record)
        assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        assert_same_records(tree_unflatten(leaves, structure), record)


# The mapping


def test_stats_are_a_mapping_of_all_statistics(stats: StepStats) -> None:
    assert isinstance(stats, Mapping)
    assert list(stats) == list(StepStats.KEYS) == NAMES
    assert len(stats) == len(NAMES)
    assert bool(stats)


@pytest.mark.parametrize("name", NAMES)
def test_stats_by_key_are_those_by_attribute(stats: StepStats, name: str) -> None:
    assert name in stats
    assert torch.equal(stats[name], getattr(stats, name))
    assert torch.equal(dict(stats)[name], stats[name])
    assert torch.equal({**stats}[name], stats[name])
    assert torch.equal(stats.get(name), stats[name])


@pytest.mark.parametrize("name", ["moments", "weight", "b", "", "KEYS", "get", 0, None, ("B",)])
def test_stats_have_no_other_keys(stats: StepStats, name: Any) -> None:
    assert name not in stats
    assert stats.get(name) is None
    with pytest.raises(KeyError) as raised:
        stats[name]
    assert raised.value.args == (f"{name!r} is not a statistic; choose one of {', '.join(NAMES)}.",)


def test_stats_have_the_shapes_and_types_of_the_document(stats: StepStats) -> None:
    K, D, scalar = 4, 3, ()
    shapes = [(K,), (K, D), (K, D, D), (D, D), (40, K), scalar, scalar, scalar, scalar, (K,)]  # in the order of NAMES
    assert [tuple(value.shape) for value in stats.values()] == shapes
    integers = {name for name, value in stats.items() if value.dtype == torch.int64}
    assert integers == {"n_ignored"}
    assert all(value.dtype == torch.float32 for name, value in stats.items() if name not in integers)
