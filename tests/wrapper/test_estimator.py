"""What the wrapper computes: the core's numbers, over many steps."""

import contextlib
import copy
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import mixture_core
from mixture_core import MixtureConfig
from mixture_torch import MixtureRuntimeConfig, MixtureStats, StepStats, read_log
from tests.wrapper.samples import assert_close, bits, estimator, mixture, unchanged

KINDS = [
    {"assigner": "kmeans_online", "mode": "ema"},
    {"assigner": "kmeans_online", "mode": "per_batch"},
    {"assigner": "label_supervised", "mode": "ema"},
    {"assigner": "label_supervised", "mode": "per_batch"},
    {"assigner": "kmeans_online", "mode": "label_supervised"},
]
SIZES = [60, 7, 128, 1, 31]  # of successive batches


def batches(*, apart: float = 3.0) -> list[tuple[Tensor, Tensor]]:
    return [mixture(N, apart=apart, seed=step) for step, N in enumerate(SIZES)]


def of_the_core(stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The statistics but for `n_relocated`, which is the wrapper's."""
    return {key: value for key, value in stats.items() if key != "n_relocated"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " ".join(kind.values()))
def test_update_is_the_step_of_the_core(kind: dict[str, Any]) -> None:
    wrapper, first = estimator(**kind), batches()[0][0]
    state = mixture_core.init(MixtureConfig(K=3, **kind), first, generator=torch.Generator().manual_seed(0))
    for x, labels in batches():
        state, stats = mixture_core.step(state, x, labels)
        assert bits(of_the_core(wrapper.update(x, labels))) == bits(stats)


@pytest.mark.parametrize("options", [{"max_assign_iters": 5}, {"relocate": False}, {"ema_decay": 0.8}, {"seed": 9}])
def test_update_hands_every_option_to_the_core(options: dict[str, Any]) -> None:
    wrapper, first = estimator(K=12, **options), batches()[0][0]
    generator = torch.Generator().manual_seed(options.pop("seed", 0))
    state = mixture_core.init(MixtureConfig(K=12, **options), first, generator=generator)
    for x, _ in batches():
        state, stats = mixture_core.step(state, x)
        assert bits(of_the_core(wrapper.update(x))) == bits(stats)


def test_stats_are_read_by_key_attribute_and_dict() -> None:
    stats = estimator().update(mixture()[0])
    assert torch.equal(stats["B"], stats.B)
    assert torch.equal(dict(stats)["B"], stats["B"])
    assert "R" in stats


def test_stats_are_a_tree_of_tensors_as_those_of_the_core_are() -> None:
    stats = estimator().update(mixture()[0])
    doubled = tree_map(Tensor.double, stats)
    assert_close(doubled, stats)
    assert doubled["B"].dtype == torch.float64


def test_assign_is_that_of_the_core_and_changes_nothing() -> None:
    wrapper = estimator()
    wrapper.update(mixture()[0])
    x, _ = mixture(40, seed=1)
    with unchanged(wrapper):
        found = wrapper.assign(x)
    assert torch.equal(found, mixture_core.assign(wrapper.state, x))


def test_update_does_not_depend_on_the_global_seed() -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(bits(estimator().update(mixture(apart=1.0)[0])))
    assert found[0] == found[1]


# What the estimator says of itself


def test_options_can_be_read_and_not_set() -> None:
    wrapper = estimator(mode="per_batch", assigner="label_supervised", ema_decay=0.5, is_main=False)
    found = wrapper.K, wrapper.mode, wrapper.assigner, wrapper.ema_decay, wrapper.is_main, wrapper.enabled
    assert found == (3, "per_batch", "label_supervised", 0.5, False, True)
    for name in ("K", "mode", "assigner", "ema_decay", "is_main"):
        with pytest.raises(AttributeError):
            setattr(wrapper, name, None)


def test_repr_says_what_the_estimator_is() -> None:
    wrapper = estimator(ema_decay=0.5)
    assert repr(wrapper) == "MixtureStats(K=3, ema_decay=0.5, enabled=True; 0 updates)"
    wrapper.update(mixture()[0])
    assert repr(wrapper) == "MixtureStats(K=3, ema_decay=0.5, enabled=True; D=4, 1 update)"


@pytest.mark.parametrize("wrapper", [MixtureStats(K=3, enabled=False), estimator()], ids=["disabled", "no update"])
def test_statistics_before_the_first_update_are_empty(wrapper: MixtureStats) -> None:
    stats = wrapper.stats
    assert isinstance(stats, StepStats)
    assert (bool(stats), len(stats), dict(stats), "pi" in stats, repr(stats)) == (False, 0, {}, False, "StepStats()")
    with pytest.raises(AttributeError, match=r"There is no `pi` yet: the estimator has had no update, or it is disabl"):
        stats.pi  # noqa: B018
    with pytest.raises(KeyError, match="There is no 'pi' yet"):
        stats["pi"]
    assert copy.deepcopy(stats) is pickle.loads(pickle.dumps(stats)) is stats


def test_estimator_that_was_not_enabled_says_so_once(tmp_path: Path) -> None:
    wrapper = MixtureStats(K=3, log_dir=tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not [stats for stats in (wrapper.update(mixture()[0]) for _ in range(3)) if stats]
    (warning,) = caught
    assert str(warning.message).startswith("MixtureStats is disabled, since `enabled` was left out")
    assert warning.filename == __file__


@pytest.mark.filterwarnings("error")
def test_estimator_that_was_disabled_on_purpose_is_silent(tmp_path: Path) -> None:
    disabled = MixtureStats(K=3, log_dir=tmp_path, enabled=False)
    for wrapper in (disabled, MixtureStats.from_config(MixtureRuntimeConfig(), log_dir=tmp_path)):
        assert not wrapper.update(mixture()[0])


@pytest.mark.filterwarnings("error")
def test_warning_that_is_an_error_comes_after_the_update(tmp_path: Path) -> None:
    bad, expected = mixture(seed=1)[0], estimator()
    bad[3, 1] = float("nan")
    with estimator(log_dir=tmp_path) as wrapper:
        for step, x in enumerate((mixture()[0], bad)):
            with contextlib.suppress(UserWarning):
                expected.update(x)
            if x is bad:
                with pytest.raises(UserWarning, match="1 of 60 rows were ignored"):
                    wrapper.update(x)
            else:
                wrapper.update(x)
            wrapper.log_step(step=step, epoch=0)
    assert bits(wrapper.state_dict()) == bits(expected.state_dict())
    assert read_log(tmp_path)["trace_B"][1] == pytest.approx(float(expected.stats.trace_B))


@pytest.mark.filterwarnings("error")
def test_every_warning_that_is_an_error_comes_after_the_update() -> None:
    wrapper, expected = estimator(K=30, mode="per_batch"), estimator(K=30, mode="per_batch")
    with pytest.raises(UserWarning, match="K=30 is too large"):
        wrapper.update(mixture()[0])
    with contextlib.suppress(UserWarning):
        expected.update(mixture()[0])
    assert wrapper._mixture.n_updates == 1
    assert bits(wrapper.stats) == bits(expected.stats)
