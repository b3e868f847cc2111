"""An estimator that goes on from a state_dict goes on as if nothing had been."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from mixture_torch import MixtureStats
from mixture_torch.update.checkpoint import checksum
from tests.wrapper.samples import all_bits, bits, estimator, mixture, unchanged

KINDS = {
    "kmeans": {},
    "per batch": {"mode": "per_batch"},
    "labels": {"assigner": "label_supervised"},
    "labels alone": {"mode": "label_supervised"},
    "waiting": {"K": 30},
}
kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())


def run(wrapper: MixtureStats, steps: range) -> MixtureStats:
    for step in steps:
        wrapper.update(*mixture(40, seed=step))
    return wrapper


@kinds
@pytest.mark.parametrize("updates", [0, 1, 3])
def test_state_dict_goes_on_where_it_was(options: dict[str, Any], updates: int, tmp_path: Path) -> None:
    wrapper = run(estimator(**options), range(updates))
    torch.save(wrapper.state_dict(), tmp_path / "state.pt")
    loaded = estimator(**options)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt"))  # with torch's safe defaults
    assert all_bits(run(loaded, range(updates, 6))) == all_bits(run(wrapper, range(updates, 6)))


def test_state_dict_holds_plain_values_only() -> None:
    values = run(estimator(), range(2)).state_dict().values()
    assert {type(value) for value in values} <= {Tensor, int, str}


@pytest.mark.parametrize("updates", [0, 2])
@pytest.mark.parametrize("change", [torch.set_default_dtype, torch.set_default_device], ids=["dtype", "device"])
def test_state_dict_does_not_depend_on_defaults(updates: int, change: Callable[[Any], None]) -> None:
    wrapper = run(estimator(), range(updates))
    before = bits(wrapper.state_dict())
    change(torch.float64 if change is torch.set_default_dtype else "meta")
    try:
        state_dict = wrapper.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert bits(state_dict) == before


@kinds
def test_state_dict_shares_no_memory_with_either_estimator(options: dict[str, Any]) -> None:
    wrapper, loaded = run(estimator(**options), range(2)), estimator(**options)
    state_dict = wrapper.state_dict()
    loaded.load_state_dict(state_dict)
    with unchanged(wrapper), unchanged(loaded):
        for value in state_dict.values():
            if isinstance(value, Tensor):
                value.fill_(7)


@pytest.mark.parametrize("other", [run(estimator(), range(2)), estimator(dim=4)], ids=["used", "dim"])
def test_load_state_dict_of_another_width_is_refused(other: MixtureStats) -> None:
    wrapper = estimator()
    wrapper.update(mixture(D=6)[0])
    with unchanged(other), pytest.raises(ValueError, match=r"^The state_dict has D=6, but this estimator has D=4\."):
        other.load_state_dict(wrapper.state_dict())


def test_load_state_dict_from_before_the_first_update_forgets_all() -> None:
    wrapper = run(estimator(), range(2))
    wrapper.load_state_dict(estimator().state_dict())
    assert wrapper.state is None
    assert not wrapper.stats
    assert all_bits(run(wrapper, range(3))) == all_bits(run(estimator(), range(3)))


def test_load_state_dict_lets_options_of_the_run_differ() -> None:
    wrapper, loaded = run(estimator(), range(2)), estimator(ema_decay=0.5, max_assign_iters=1, seed=4, strict=True)
    loaded.load_state_dict(wrapper.state_dict())
    assert bits(loaded.state_dict()) == bits(wrapper.state_dict())


@pytest.mark.parametrize("around", [torch.inference_mode, torch.enable_grad, torch.no_grad])
def test_load_state_dict_works_wherever_it_is_called(around: Callable[[], Any]) -> None:
    wrapper, loaded = run(estimator(K=30), range(2)), estimator(K=30)
    with around():
        loaded.load_state_dict(wrapper.state_dict())
    assert all_bits(run(loaded, range(2, 6))) == all_bits(run(wrapper, range(2, 6)))


def test_state_stays_float32_whatever_is_loaded() -> None:
    wrapper = run(estimator(), range(2))
    doubled = {key: v.double() if isinstance(v, Tensor) else v for key, v in wrapper.state_dict().items()}
    wrapper.load_state_dict(doubled)
    stats = wrapper.update(mixture(seed=2)[0])
    assert {value.dtype for key, value in stats.items() if not key.startswith("n_")} == {torch.float32}


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda d: d | {"version": 99}, "version=99, but this estimator has version=4"),
    "K": (lambda d: d | {"K": 5}, "K=5, but this estimator has K=3"),
    "mode": (lambda d: d | {"mode": "per_batch"}, "mode='per_batch', but this estimator has mode='ema'"),
    "assigner": (lambda d: d | {"assigner": "label_supervised"}, "has assigner='label_supervised', but"),
    "missing key": (lambda d: {k: v for k, v in d.items() if k != "mean"}, r"lacks the keys \['mean'\]"),
    "more keys": (lambda d: d | {"loss": 1}, r"unknown keys \['loss'\]"),
    "empty": (lambda d: {}, "lacks the keys"),
    "weight too long": (lambda d: d | {"weight": torch.ones(5)}, "weight"),
    "weight a list": (lambda d: d | {"weight": [1.0, 2.0, 3.0]}, "weight"),
    "mean too wide": (lambda d: d | {"mean": torch.ones(3, 5)}, "mean"),
    "mean too long": (lambda d: d | {"mean": torch.ones(5, 4)}, "mean"),
    "covariance flat": (lambda d: d | {"covariance": torch.ones(3, 4)}, "covariance"),
    "covariance too long": (lambda d: d | {"covariance": torch.ones(5, 4, 4)}, "covariance"),
    "covariance not square": (lambda d: d | {"covariance": torch.ones(3, 4, 5)}, "covariance"),
    "waiting too wide": (lambda d: d | {"waiting": torch.ones(2, 5)}, "waiting"),
    "another D": (lambda d: d | {"D": 5}, "D=5, but this estimator has D=4"),
    "D negative": (lambda d: d | {"D": -4}, "D=-4 instead of an int from 0 on"),
    "D 0": (lambda d: d | {"D": 0, "mean": torch.ones(3, 0)}, "D=0, but this estimator has D=4"),
    "more waiting than can be": (lambda d: d | {"n_waiting": 12}, "n_waiting=12 instead of an int from 0 to 11"),
    "started a bool": (lambda d: d | {"started": True}, "started=True instead of an int from 0 to 1"),
    "D a text": (lambda d: d | {"D": "4"}, "D|mean|covariance"),
    "K a tensor": (lambda d: d | {"K": torch.tensor([3, 4])}, "K=tensor.*but this estimator has K=3"),
    "complex": (lambda d: d | {"mean": torch.ones(3, 4) * 1j}, "mean"),
    "None": (lambda d: None, "got None"),
    "list": (lambda d: list(d), "got "),
}


@pytest.mark.parametrize(("change", "text"), WRONG.values(), ids=WRONG.keys())
def test_wrong_state_dict_is_refused_in_one_line_and_changes_nothing(
    change: Callable[[dict[str, Any]], Any], text: str
) -> None:
    wrapper, state_dict = run(estimator(), range(2)), run(estimator(), range(3)).state_dict()
    with unchanged(wrapper), pytest.raises((TypeError, ValueError), match=text) as error:
        wrapper.load_state_dict(change(dict(state_dict)))
    assert "state_dict" in str(error.value)
    assert "\n" not in str(error.value)


# torch.distributed.checkpoint, which loads in place


@kinds
@pytest.mark.parametrize("updates", [0, 1, 3])
def test_distributed_checkpoint_restores_into_a_fresh_estimator(
    options: dict[str, Any], updates: int, tmp_path: Path
) -> None:
    wrapper, fresh = run(estimator(**options), range(updates)), estimator(**options)
    dcp.save({"mixture": wrapper.state_dict(dim=4)}, checkpoint_id=tmp_path)
    loaded = {"mixture": fresh.state_dict(dim=4)}
    dcp.load(loaded, checkpoint_id=tmp_path)
    fresh.load_state_dict(loaded["mixture"])
    assert all_bits(run(fresh, range(updates, 6))) == all_bits(run(wrapper, range(updates, 6)))


@kinds
@pytest.mark.parametrize("updates", [0, 1, 3])
def test_distributed_checkpoint_takes_estimators_as_they_are(
    options: dict[str, Any], updates: int, tmp_path: Path
) -> None:
    wrapper, fresh = run(estimator(dim=4, **options), range(updates)), estimator(dim=4, **options)
    dcp.save({"mixture": wrapper}, checkpoint_id=tmp_path)
    dcp.load({"mixture": fresh}, checkpoint_id=tmp_path)
    assert all_bits(run(fresh, range(updates, 6))) == all_bits(run(wrapper, range(updates, 6)))


def test_distributed_checkpoint_never_restores_half_without_dim(tmp_path: Path) -> None:
    wrapper, fresh = run(estimator(), range(3)), estimator()
    dcp.save({"mixture": wrapper.state_dict()}, checkpoint_id=tmp_path)
    with pytest.raises(dcp.api.CheckpointException, match="Size mismatch"):
        dcp.load({"mixture": fresh}, checkpoint_id=tmp_path)
    assert fresh.state is None


@pytest.mark.parametrize("dim", [None, 4])
@pytest.mark.parametrize("updates", [0, 2])
def test_state_dict_has_the_same_shapes_before_and_after(updates: int, dim: int | None) -> None:
    state_dict = run(estimator(), range(updates)).state_dict(dim=dim)
    D = 0 if updates == 0 and dim is None else 4
    shapes = {key: tuple(value.shape) for key, value in state_dict.items() if isinstance(value, Tensor)}
    packed = (3, D * (D + 1) // 2)
    assert shapes == {
        "weight": (3,), "mean": (3, D), "residual": (3, D), "covariance": packed, "waiting": (12, D),
        "n_pairs": (), "V": (D, D), "squares": (5,),
    }  # fmt: skip


@kinds
@pytest.mark.parametrize("updates", [0, 1, 3])
def test_deep_copy_has_the_mixture_and_no_files(options: dict[str, Any], updates: int, tmp_path: Path) -> None:
    wrapper = run(estimator(log_dir=tmp_path / "run", store_scores=True, seed=5, **options), range(updates))
    copied = copy.deepcopy(wrapper)
    assert all_bits(run(copied, range(updates, 6))) == all_bits(run(wrapper, range(updates, 6)))
    copied.log_step(step=0, epoch=0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("weight", float("nan"), "`weight` of the state_dict has NaN or infinite entries"),
        ("weight", -1.0, "The state_dict has a negative weight, -1;"),
        ("mean", float("inf"), "`mean` of the state_dict has NaN"),
        ("covariance", float("nan"), "`covariance` of the state_dict has NaN"),
        ("residual", float("nan"), "`residual` of the state_dict has NaN"),
        ("waiting", float("nan"), "`waiting` of the state_dict has NaN"),
    ],
)
def test_checkpoint_with_damaged_values_is_refused(key: str, value: float, text: str) -> None:
    wrapper, state_dict = run(estimator(), range(1)), run(estimator(), range(2)).state_dict()
    damaged = state_dict[key]
    assert isinstance(damaged, Tensor)
    damaged.view(-1)[1] = value
    state_dict["checksum"] = checksum(state_dict)
    with unchanged(wrapper), pytest.raises(ValueError, match=f"^{text}"):
        wrapper.load_state_dict(state_dict)
