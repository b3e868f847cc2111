"""When the wrapper moves components, what it says of it, and what it says of a K that is too large."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mixture_core
from mixture_torch import MixtureStats
from tests.wrapper.samples import all_bits, bits, estimator, mixture, unchanged, update_quietly

WINDOW = 4  # steps, with the decay below


def lonely(**options: Any) -> MixtureStats:
    """An estimator two of whose four components die with its first batch."""
    wrapper = estimator(K=4, ema_decay=0.7, **options)
    x, _ = mixture(60, K=4, D=4, seed=99)
    x[:2] *= 1e4
    wrapper.update(x)
    return wrapper


def batch(step: int) -> Tensor:
    return mixture(60, K=4, D=4, seed=step)[0]


def moves(wrapper: MixtureStats, steps: range) -> list[int]:
    return [int(wrapper.update(batch(step))["n_relocated"]) for step in steps]


def test_components_move_before_the_first_step_of_a_window_only() -> None:
    found = moves(lonely(), range(1, 6 * WINDOW))
    assert sum(found) > 0
    assert {step for step, n in enumerate(found, start=1) if n} <= {WINDOW * n for n in range(1, 6)}


def test_a_step_after_a_move_is_the_step_of_the_relocated_state() -> None:
    wrapper = lonely()
    assert sum(moves(wrapper, range(1, WINDOW))) == 0
    before = wrapper.state
    assert before is not None
    state, n_relocated = mixture_core.relocate(before)
    _, expected = mixture_core.step(state, batch(WINDOW))
    stats = wrapper.update(batch(WINDOW))
    assert stats["n_relocated"] == n_relocated > 0
    assert bits({key: stats[key] for key in expected}) == bits(expected)


@pytest.mark.parametrize("stop", range(1, 2 * WINDOW + 1))
def test_resumed_run_moves_at_the_same_steps(stop: int) -> None:
    wrapper, resumed = lonely(), estimator(K=4, ema_decay=0.7)
    first = moves(wrapper, range(1, stop))
    resumed.load_state_dict(wrapper.state_dict())
    rest = range(stop, 3 * WINDOW)
    assert moves(resumed, rest) == (found := moves(wrapper, rest))
    assert sum(first + found) > 0
    assert bits(resumed.state_dict()) == bits(wrapper.state_dict())


@pytest.mark.parametrize("x", [torch.zeros(0, 4), torch.full((5, 4), float("nan"))], ids=["no row", "NaN"])
def test_idle_step_moves_nothing_and_delays_nothing(x: Tensor) -> None:
    wrapper, again = lonely(), lonely()
    moves(wrapper, range(1, WINDOW))
    moves(again, range(1, WINDOW))
    before = bits(wrapper.state_dict())
    assert update_quietly(wrapper, x)["n_relocated"] == 0
    assert bits(wrapper.state_dict()) == before
    assert moves(wrapper, range(WINDOW, WINDOW + 2)) == moves(again, range(WINDOW, WINDOW + 2))
    assert all_bits(wrapper) == all_bits(again)


def test_parts_of_a_step_count_once_and_move_once() -> None:
    wrapper, again = lonely(), lonely()
    found, wanted = [], moves(again, range(1, 2 * WINDOW))
    for step in range(1, 2 * WINDOW):
        parts = [wrapper.update(part, step=step)["n_relocated"] for part in batch(step).split(20)]
        assert not any(int(n) for n in parts[1:])
        found.append(int(parts[0]))
    assert [n > 0 for n in found] == [n > 0 for n in wanted]
    assert wrapper.state_dict()["n_steps"] == again.state_dict()["n_steps"] == 2 * WINDOW


# K larger than the data can bear


def said(wrapper: MixtureStats, sizes: list[int], *, parts: int = 1) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, N in enumerate(sizes):
            for part in mixture(N, K=2, D=4, seed=step)[0].chunk(parts):
                wrapper.update(part, step=step if parts > 1 else None)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("options", "N", "n_rows"),
    [
        ({"K": 100, "mode": "per_batch"}, 64, 64),
        ({"K": 100, "ema_decay": 0.8}, 64, 320),
        ({"K": 8, "ema_decay": 0.5}, 15, 30),
    ],
)
def test_window_with_too_few_rows_for_K_is_remarked_once(options: dict[str, Any], N: int, n_rows: int) -> None:
    wrapper = estimator(**options)
    (line,) = said(wrapper, [N] * 30)
    assert line.startswith(f"K={options['K']} is too large: the first window, ")
    assert f"had {n_rows} rows, fewer than 4 K = {4 * options['K']}." in line
    assert said(wrapper, [N] * 30) == []


@pytest.mark.parametrize("options", [{"K": 8, "ema_decay": 0.5}, {"K": 4, "mode": "per_batch"}])
@pytest.mark.parametrize("parts", [1, 4])
def test_window_with_enough_rows_is_not_remarked(options: dict[str, Any], parts: int) -> None:
    assert said(estimator(**options), [0, 16, 16, 16, 16], parts=parts) == []


# Checkpoints


@pytest.mark.parametrize(("name", "options", "updates"), [("started", {}, 3), ("waiting", {"K": 12}, 1)])
def test_state_dict_of_version_2_loads(name: str, options: dict[str, Any], updates: int) -> None:
    old = torch.load(Path(__file__).parent / "state_dicts" / f"version_2_{name}.pt")
    assert old["version"] == 2
    loaded, wrapper = estimator(**options), estimator(**options)
    loaded.load_state_dict(old)
    for step in range(updates):
        wrapper.update(mixture(40, seed=step)[0])
    for step in range(updates, 6):
        found, wanted = (one.update(mixture(40, seed=step)[0]) for one in (loaded, wrapper))
        torch.testing.assert_close(dict(found), dict(wanted), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="mixes the values of several mixtures"):
        loaded.load_state_dict(old | {"weight": old["weight"] + 1})


@pytest.mark.parametrize("key", ["weight", "mean", "residual", "covariance", "waiting", "n_steps"])
def test_checksum_is_of_every_value(key: str) -> None:
    wrapper = lonely()
    state_dict = wrapper.state_dict()
    value: Any = state_dict[key]
    if isinstance(value, Tensor):
        value.view(-1)[value.numel() // 2] += 1
    else:
        state_dict[key] = value + 1
    with unchanged(wrapper), pytest.raises(ValueError, match="mixes the values of several mixtures"):
        wrapper.load_state_dict(state_dict)
