"""A wrong argument is refused in one line that names it, and changes nothing."""

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nested import nested_tensor

from mixture_torch import MixtureStats
from tests.wrapper.samples import all_bits, assert_says, estimator, mixture, unchanged

NAN = float("nan")
LABELLED = {"assigner": "label_supervised"}
X, LABELS = mixture()


class Wrong(NamedTuple):
    """A batch that must be refused, and a part of the message."""

    embeddings: Any
    labels: Any
    kind: type[Exception] | tuple[type[Exception], ...]
    name: str
    text: str


def quietly(make: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    """A tensor of a kind that torch calls experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*arguments, **options)


EITHER = (TypeError, ValueError)
EMBEDDINGS: dict[str, Wrong] = {
    "list": Wrong(X.tolist(), LABELS, TypeError, "embeddings", "a tensor or a NumPy array, got list"),
    "None": Wrong(None, LABELS, TypeError, "embeddings", "a tensor or a NumPy array, got NoneType"),
    "text": Wrong("x", LABELS, TypeError, "embeddings", "a tensor or a NumPy array, got str"),
    "scalar": Wrong(torch.tensor(1.0), LABELS, ValueError, "embeddings", "got ()"),
    "vector": Wrong(X[:, 0], LABELS, ValueError, "embeddings", "got (60,)"),
    "cube": Wrong(X[None], LABELS, ValueError, "embeddings", "got (1, 60, 4)"),
    "no width": Wrong(X[:, :0], LABELS, ValueError, "embeddings", "got (60, 0)"),
    "complex": Wrong(X * 1j, LABELS, TypeError, "embeddings", "real numbers, got torch.complex64"),
    "NumPy complex": Wrong(X.numpy() * 1j, LABELS, TypeError, "embeddings", "real numbers, got torch.complex64"),
    "NumPy objects": Wrong(X.numpy().astype(object), LABELS, TypeError, "embeddings", "got"),
    "NumPy text": Wrong(X.numpy().astype(str), LABELS, TypeError, "embeddings", "got"),
    "NumPy long double": Wrong(X.numpy().astype(np.longdouble), LABELS, EITHER, "embeddings", "got"),
    "sparse": Wrong(X.to_sparse(), LABELS, EITHER, "embeddings", "got"),
    "nested": Wrong(quietly(nested_tensor, [X[:3], X[:5]]), LABELS, EITHER, "embeddings", "got"),
    "jagged": Wrong(quietly(nested_tensor, [X[:3], X[:5]], layout=torch.jagged), LABELS, EITHER, "embeddings", "got"),
    "without data": Wrong(X.to("meta"), LABELS.to("meta"), EITHER, "embeddings", "got"),
}
LABEL_FAULTS: dict[str, Wrong] = {
    "missing": Wrong(X, None, ValueError, "labels", "be given if responsibilities come from labels: (60,)"),
    "list": Wrong(X, LABELS.tolist(), TypeError, "labels", "a tensor or a NumPy array, got list"),
    "float": Wrong(X, LABELS.float(), TypeError, "labels", "integers, got torch.float32"),
    "NumPy text": Wrong(X, LABELS.numpy().astype(str), TypeError, "labels", "got"),
    "short": Wrong(X, LABELS[:-1], ValueError, "labels", "(60,), one per embedding, got (59,)"),
    "column": Wrong(X, LABELS[:, None], ValueError, "labels", "(60,), one per embedding, got (60, 1)"),
    "K": Wrong(X, LABELS + 1, ValueError, "labels", "in [0, 3), or -1 or -100 for a row to ignore, got 3"),
    "-2": Wrong(X, LABELS - 2, ValueError, "labels", "in [0, 3), or -1 or -100 for a row to ignore, got -2"),
    "huge": Wrong(X, LABELS + 2**62, ValueError, "labels", f"or -1 or -100 for a row to ignore, got {2**62}"),
    "at a bad row": Wrong(X * NAN, LABELS + 3, ValueError, "labels", "in [0, 3), or -1 or -100"),
    "sparse": Wrong(X, LABELS.to_sparse(), EITHER, "labels", "got"),
}
WRONG = {f"embeddings {name}": wrong for name, wrong in EMBEDDINGS.items()} | {
    f"labels {name}": wrong for name, wrong in LABEL_FAULTS.items()
}


KINDS = {"kmeans": {}, "waiting": {"K": 30}, "assigner": LABELLED, "mode": {"mode": "label_supervised"}}
COMBINATIONS = {
    f"{name} {kind}": (options, wrong)
    for name, wrong in WRONG.items()
    for kind, options in KINDS.items()
    if wrong.name == "embeddings" or kind in ("assigner", "mode")  # k-means does not look at labels
}


@pytest.mark.parametrize(("options", "wrong"), COMBINATIONS.values(), ids=COMBINATIONS.keys())
@pytest.mark.parametrize("updates", [0, 2])
def test_wrong_batch_is_named_and_leaves_no_trace(options: dict[str, Any], wrong: Wrong, updates: int) -> None:
    wrapper, expected = estimator(**options), estimator(**options)
    for step in range(updates):
        wrapper.update(*mixture(seed=step))
        expected.update(*mixture(seed=step))
    with unchanged(wrapper), pytest.raises(wrong.kind) as error:
        wrapper.update(wrong.embeddings, wrong.labels)
    assert_says(error.value, wrong.name, wrong.text)
    wrapper.update(X, LABELS)
    expected.update(X, LABELS)
    assert all_bits(wrapper) == all_bits(expected)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_update_says_that_the_width_has_changed(options: dict[str, Any]) -> None:
    wrapper = estimator(**options)
    wrapper.update(X, LABELS)
    with unchanged(wrapper), pytest.raises(ValueError, match=r"^`embeddings` must have shape \(N, 4\), got \(60, 3\)"):
        wrapper.update(X[:, :3], LABELS)


@pytest.mark.parametrize("wrong", EMBEDDINGS.values(), ids=EMBEDDINGS.keys())
def test_assign_says_what_is_wrong_with_a_batch(wrong: Wrong) -> None:
    wrapper = estimator()
    wrapper.update(X)
    with unchanged(wrapper), pytest.raises(wrong.kind) as error:
        wrapper.assign(wrong.embeddings)
    assert_says(error.value, wrong.name, "got")


def test_assign_comes_after_update() -> None:
    with pytest.raises(ValueError, match=r"^There is no mixture to assign to: call `update` first\.$"):
        estimator().assign(X)


def test_assign_says_that_the_estimator_is_disabled() -> None:
    with pytest.raises(ValueError, match=r"^There is no mixture to assign to: the estimator is disabled\.$"):
        estimator(enabled=False).assign(X)


def updated() -> MixtureStats:
    wrapper = estimator()
    wrapper.update(X)
    return wrapper


@pytest.mark.parametrize("copied", [copy.copy, pickle.dumps])
@pytest.mark.parametrize("make", [estimator, updated, functools.partial(estimator, enabled=False)])
def test_estimator_says_how_to_copy_it(
    copied: Callable[[MixtureStats], object], make: Callable[[], MixtureStats]
) -> None:
    with pytest.raises(TypeError, match=r"^A MixtureStats cannot be pickled.*`load_state_dict`"):
        copied(make())


STEPS: list[tuple[Any, type[Exception], str]] = [
    (-1, ValueError, "at least 0, got -1"),
    (1.5, TypeError, "an integer, got 1.5"),
    ("1", TypeError, "an integer, got '1'"),
    (None, TypeError, "an integer, got None"),
    (True, TypeError, "an integer, got True"),
    (torch.tensor(1.5), TypeError, "an integer, got tensor(1.5000)"),
    (torch.tensor([1, 2]), TypeError, "an integer, got tensor([1, 2])"),
]


@pytest.mark.parametrize("name", ["step", "epoch"])
@pytest.mark.parametrize(("value", "kind", "text"), STEPS)
def test_log_step_says_what_is_wrong(tmp_path: Path, name: str, value: Any, kind: type[Exception], text: str) -> None:
    wrapper = estimator(log_dir=tmp_path / "run", store_scores=True)
    wrapper.update(X)
    with unchanged(wrapper), pytest.raises(kind) as error:
        wrapper.log_step(**{"step": 1, "epoch": 0, name: value})
    assert_says(error.value, name, text)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stats", [X, {"pi": X[0]}, [1]], ids=["tensor", "part", "list"])
def test_log_step_says_what_stats_it_wants(tmp_path: Path, stats: Any) -> None:
    wrapper = estimator(log_dir=tmp_path / "run")
    wrapper.update(X)
    with pytest.raises((TypeError, ValueError)) as error:
        wrapper.log_step(step=0, epoch=0, stats=stats)
    assert_says(error.value, "stats", "got")
    assert not (tmp_path / "run").exists()
