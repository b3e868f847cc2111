"""Whatever is wrong with an option: one line that names it and says what was expected and what came."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mixture_torch import MixtureRuntimeConfig, MixtureStats, activate
from tests.wrapper.samples import assert_says, estimator

NAN = float("nan")

# Option, value, error, and what the message says of it.
OPTIONS: list[tuple[str, Any, type[Exception], str]] = [
    ("K", 0, ValueError, "at least 1, got 0"),
    ("K", -3, ValueError, "at least 1, got -3"),
    ("K", 2.5, TypeError, "an integer, got 2.5"),
    ("K", 8.0, TypeError, "an integer, got 8.0"),
    ("K", "8", TypeError, "an integer, got '8'"),
    ("K", True, TypeError, "an integer, got True"),
    ("K", None, TypeError, "an integer, got None"),
    ("assigner", "kmeans", ValueError, "one of kmeans_online, label_supervised, got 'kmeans'"),
    ("assigner", None, ValueError, "one of kmeans_online, label_supervised, got None"),
    ("assigner", ["kmeans_online"], ValueError, "one of kmeans_online, label_supervised, got ['kmeans_online']"),
    ("mode", "EMA", ValueError, "one of per_batch, ema, label_supervised, got 'EMA'"),
    ("mode", 1, ValueError, "one of per_batch, ema, label_supervised, got 1"),
    ("ema_decay", 0, ValueError, "greater than 0 and less than 1, got 0.0"),
    ("ema_decay", 1.0, ValueError, "greater than 0 and less than 1, got 1.0"),
    ("ema_decay", -0.5, ValueError, "greater than 0 and less than 1, got -0.5"),
    ("ema_decay", NAN, ValueError, "greater than 0 and less than 1, got nan"),
    ("ema_decay", float("inf"), ValueError, "greater than 0 and less than 1, got inf"),
    ("ema_decay", 10**400, ValueError, "greater than 0 and less than 1, got 1"),
    ("ema_decay", "0.9", TypeError, "a number, got '0.9'"),
    ("ema_decay", None, TypeError, "a number, got None"),
    ("ema_decay", True, TypeError, "a number, got True"),
    ("enabled", 1, TypeError, "true or false, got 1"),
    ("enabled", "yes", TypeError, "true or false, got 'yes'"),
    ("enabled", None, TypeError, "true or false, got None"),
    ("cross_rank", 0, TypeError, "true or false, or gather or reduce, got 0"),
    ("cross_rank", "all", ValueError, "true or false, or gather or reduce, got 'all'"),
    ("dim", 0, ValueError, "at least 1, got 0"),
    ("dim", 1.5, TypeError, "an integer, got 1.5"),
    ("store_scores", "append", TypeError, "true or false, got 'append'"),
    ("scores_mode", "shards", ValueError, "one of append, per_step, got 'shards'"),
    ("scores_mode", False, ValueError, "one of append, per_step, got False"),
    ("max_assign_iters", 0, ValueError, "at least 1, got 0"),
    ("max_assign_iters", 1.5, TypeError, "an integer, got 1.5"),
    ("seed", -1, ValueError, "at least 0, got -1"),
    ("seed", 0.5, TypeError, "an integer, got 0.5"),
    ("seed", 2**64, ValueError, f"got {2**64}"),
    ("seed", None, TypeError, "an integer, got None"),
    ("strict", "no", TypeError, "true or false, got 'no'"),
    ("relocate", 1, TypeError, "true or false, got 1"),
    ("relocate", "no", TypeError, "true or false, got 'no'"),
]
PLACES: list[tuple[str, Any, type[Exception], str]] = [
    ("is_main", "yes", TypeError, "true, false or None, got 'yes'"),
    ("is_main", 2, TypeError, "true, false or None, got 2"),
    ("is_main", torch.tensor([True, False]), TypeError, "true, false or None, got tensor("),
    ("log_dir", 5, TypeError, "a path or None, got 5"),
    ("log_dir", True, TypeError, "a path or None, got True"),
    ("log_dir", b"run", TypeError, "a path or None, got b'run'"),
]


@pytest.mark.parametrize(("name", "value", "kind", "text"), OPTIONS + PLACES, ids=lambda value: str(value)[:30])
def test_estimator_says_what_is_wrong_with_an_option(name: str, value: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as error:
        estimator(**{name: value})
    assert_says(error.value, name, text)


@pytest.mark.parametrize(("name", "value", "kind", "text"), OPTIONS, ids=lambda value: str(value)[:30])
def test_config_says_what_is_wrong_with_an_option(name: str, value: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as error:
        MixtureRuntimeConfig(**{name: value})
    assert_says(error.value, name, text)


@pytest.mark.parametrize(("name", "value", "kind", "text"), OPTIONS, ids=lambda value: str(value)[:30])
def test_disabled_estimator_checks_its_options_too(name: str, value: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as error:
        MixtureStats(**{"K": 8, name: value})
    assert_says(error.value, name, text)


def test_estimator_without_a_folder_stores_no_scores() -> None:
    with pytest.raises(ValueError, match=r"^`log_dir` must be given if `store_scores` is true, got None\.$"):
        estimator(store_scores=True)


@pytest.mark.parametrize("options", [{"is_main": False}, {"enabled": False}])
def test_estimator_that_writes_nothing_needs_no_folder(options: dict[str, Any]) -> None:
    assert not estimator(store_scores=True, **options).stats


@pytest.mark.parametrize("config", [{"K": 3}, None, "run.yaml"])
def test_from_config_says_what_it_wants(config: Any) -> None:
    with pytest.raises(TypeError) as error:
        MixtureStats.from_config(config)
    assert_says(error.value, "config", "got")


@pytest.mark.parametrize("value", [0, True, "estimator"])
def test_activate_says_what_it_wants(value: Any) -> None:
    with pytest.raises(TypeError) as error, activate(value):
        pass
    assert_says(error.value, "estimator", "got")


def test_unknown_option_is_a_type_error() -> None:
    make: Callable[..., MixtureStats] = MixtureStats
    with pytest.raises(TypeError, match="topR"):
        make(K=8, topR=4)
