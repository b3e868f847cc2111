"""`MixtureConfig`: defaults, and one line for every wrong value."""

from fractions import Fraction
from typing import Any

import attrs
import numpy as np
import pytest

from mixture_core import MixtureConfig

INF, NAN = float("inf"), float("nan")
BETWEEN_0_AND_1 = "`ema_decay` must be greater than 0 and less than 1, got"
MODES = "`mode` must be one of per_batch, ema, label_supervised, got"
ASSIGNERS = "`assigner` must be one of kmeans_online, label_supervised, got"


def test_config_defaults_are_those_of_the_document() -> None:
    assert attrs.asdict(MixtureConfig()) == {
        "K": 8,
        "assigner": "kmeans_online",
        "mode": "ema",
        "ema_decay": 0.95,
        "max_assign_iters": 2,
        "relocate": True,
    }


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"K": 0}, ValueError, "`K` must be at least 1, got 0."),
        ({"K": -3}, ValueError, "`K` must be at least 1, got -3."),
        ({"K": 8.0}, TypeError, "`K` must be an integer, got 8.0."),
        ({"K": "8"}, TypeError, "`K` must be an integer, got '8'."),
        ({"K": True}, TypeError, "`K` must be an integer, got True."),
        ({"K": None}, TypeError, "`K` must be an integer, got None."),
        ({"max_assign_iters": 0}, ValueError, "`max_assign_iters` must be at least 1, got 0."),
        ({"max_assign_iters": 2.5}, TypeError, "`max_assign_iters` must be an integer, got 2.5."),
        ({"ema_decay": 0}, ValueError, f"{BETWEEN_0_AND_1} 0.0."),
        ({"ema_decay": 1}, ValueError, f"{BETWEEN_0_AND_1} 1.0."),
        ({"ema_decay": -0.5}, ValueError, f"{BETWEEN_0_AND_1} -0.5."),
        ({"ema_decay": NAN}, ValueError, f"{BETWEEN_0_AND_1} nan."),
        ({"ema_decay": INF}, ValueError, f"{BETWEEN_0_AND_1} inf."),
        ({"ema_decay": "0.95"}, TypeError, "`ema_decay` must be a number, got '0.95'."),
        ({"ema_decay": False}, TypeError, "`ema_decay` must be a number, got False."),
        ({"ema_decay": None}, TypeError, "`ema_decay` must be a number, got None."),
        ({"ema_decay": 1j}, TypeError, "`ema_decay` must be a number, got 1j."),
        ({"relocate": 1}, TypeError, "`relocate` must be true or false, got 1."),
        ({"relocate": "no"}, TypeError, "`relocate` must be true or false, got 'no'."),
        ({"mode": "EMA"}, ValueError, f"{MODES} 'EMA'."),
        ({"mode": None}, ValueError, f"{MODES} None."),
        ({"mode": ["ema"]}, ValueError, f"{MODES} ['ema']."),
        ({"assigner": "kmeans"}, ValueError, f"{ASSIGNERS} 'kmeans'."),
        ({"assigner": 1}, ValueError, f"{ASSIGNERS} 1."),
    ],
)
def test_config_says_what_was_expected_and_what_came(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        MixtureConfig(**options)
    assert str(raised.value) == message


def test_config_refuses_integers_too_large_for_a_float_by_name() -> None:
    with pytest.raises((ValueError, TypeError), match="`ema_decay` must be"):
        MixtureConfig(ema_decay=10**400)


def test_config_evolved_is_checked_again() -> None:
    with pytest.raises(ValueError, match="`K` must be at least 1, got 0"):
        attrs.evolve(MixtureConfig(), K=0)


def test_config_takes_numbers_of_numpy_and_others() -> None:
    config = MixtureConfig(K=np.int64(3), ema_decay=Fraction(1, 2), max_assign_iters=np.int8(1))
    assert config == MixtureConfig(K=3, ema_decay=0.5, max_assign_iters=1)
    assert [type(value) for value in (config.K, config.ema_decay)] == [int, float]
    assert MixtureConfig(ema_decay=np.float32(0.5)) == MixtureConfig(ema_decay=0.5)


def test_config_is_frozen() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        MixtureConfig().K = 9  # type: ignore[misc]


def test_config_is_hashed_and_compared_by_value() -> None:
    assert MixtureConfig(K=3) == MixtureConfig(K=3) != MixtureConfig(K=4)
    assert len({MixtureConfig(K=3), MixtureConfig(K=3), MixtureConfig(K=4)}) == 2


@pytest.mark.parametrize(
    ("options", "uses_labels", "averages", "relocates"),
    [
        ({}, False, True, True),
        ({"relocate": False}, False, True, False),
        ({"mode": "per_batch"}, False, False, False),
        ({"mode": "label_supervised"}, True, False, False),
        ({"assigner": "label_supervised"}, True, True, False),
        ({"assigner": "label_supervised", "mode": "per_batch"}, True, False, False),
    ],
)
def test_config_knows_what_follows_from_the_options(
    options: Any, uses_labels: bool, averages: bool, relocates: bool
) -> None:
    config = MixtureConfig(**options)
    assert (config.uses_labels, config.averages, config.relocates) == (uses_labels, averages, relocates)
