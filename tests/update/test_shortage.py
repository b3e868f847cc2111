"""An update for which there is not enough memory, and a state that takes a lot of it."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixture_torch import MixtureStats, activate, read_log, read_scores
from mixture_torch.update import mixture as update_wing
from mixture_torch.update.seeding import size_note
from tests.wrapper.samples import all_bits, bits, estimator, mixture

SHORTAGES: dict[str, Callable[[], Exception]] = {
    "Python": lambda: MemoryError("no memory"),
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "CPU": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
}
shortages = pytest.mark.parametrize("shortage", SHORTAGES.values(), ids=SHORTAGES.keys())


@pytest.fixture
def run_out(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Updates with an allocation that fails in the middle."""

    def update(wrapper: MixtureStats, shortage: Callable[[], Exception], seed: int = 0, *, step: Any = None) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            raise shortage()

        with monkeypatch.context() as patch:
            patch.setattr(update_wing, "advance", fail)
            return wrapper.update(mixture(seed=seed)[0], step=step)

    return update


@shortages
def test_update_without_memory_is_skipped_with_one_warning(
    shortage: Callable[[], Exception], run_out: Callable[..., Any]
) -> None:
    wrapper, expected = estimator(), estimator()
    for each in (wrapper, expected):
        each.update(mixture(seed=0)[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            run_out(wrapper, shortage)
    assert [str(warning.message).split(":")[0] for warning in caught] == [
        "`update` ran out of memory and skips such batches"
    ]
    assert bits(wrapper.update(mixture(seed=1)[0])) == bits(expected.update(mixture(seed=1)[0]))


@pytest.mark.filterwarnings("ignore:`update` ran out of memory")
@pytest.mark.parametrize("mode", ["ema", "per_batch"])
def test_skipped_part_leaves_its_step_to_the_others(mode: str, run_out: Callable[..., Any]) -> None:
    wrapper, expected = estimator(mode=mode), estimator(mode=mode)
    for each in (wrapper, expected):
        each.update(mixture(seed=0)[0], step=0)
        each.update(mixture(seed=1)[0], step=1)
    run_out(wrapper, SHORTAGES["CPU"], step=1)
    for each in (wrapper, expected):
        each.update(mixture(seed=2)[0], step=1)
    assert all_bits(wrapper) == all_bits(expected)


@pytest.mark.filterwarnings("ignore:`update` ran out of memory")
def test_skipped_update_takes_no_memory_for_its_rows(run_out: Callable[..., Any]) -> None:
    wrapper = estimator()
    wrapper.update(mixture(seed=0)[0])
    R = run_out(wrapper, SHORTAGES["CPU"]).R
    assert R.untyped_storage().nbytes() == 4 * R.shape[1]


@pytest.mark.filterwarnings("ignore:`update` ran out of memory")
@shortages
def test_skipped_update_ignores_all_its_rows(
    shortage: Callable[[], Exception], run_out: Callable[..., Any], tmp_path: Path
) -> None:
    with estimator(log_dir=tmp_path) as wrapper:
        before = wrapper.update(mixture()[0])
        wrapper.log_step(step=0, epoch=0)
        stats = run_out(wrapper, shortage)
        wrapper.log_step(step=1, epoch=0)
    assert (int(stats["n_ignored"]), bool(stats["R"].any())) == (60, False)
    assert torch.equal(stats["Sigma"], before["Sigma"])
    assert np.isnan(read_log(tmp_path)["trace_B"]).tolist() == [False, True]


@pytest.mark.filterwarnings("ignore:`update` ran out of memory")
@shortages
def test_very_first_update_without_memory_leaves_no_trace(
    shortage: Callable[[], Exception], run_out: Callable[..., Any], tmp_path: Path
) -> None:
    wrapper = estimator(log_dir=tmp_path / "run")
    assert not run_out(wrapper, shortage)
    wrapper.log_step(step=0, epoch=0)
    assert not (tmp_path / "run").exists()
    assert bits(wrapper.update(mixture()[0])) == bits(estimator().update(mixture()[0]))


@shortages
def test_update_without_memory_raises_where_strict(
    shortage: Callable[[], Exception], run_out: Callable[..., Any]
) -> None:
    wrapper = estimator(strict=True)
    before = all_bits(wrapper)
    with pytest.raises(type(shortage())):
        run_out(wrapper, shortage)
    assert all_bits(wrapper) == before


def test_other_errors_of_torch_are_not_taken_for_want_of_memory(run_out: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="assertion"):
        run_out(estimator(), lambda: RuntimeError("device-side assertion"))


def test_state_that_is_too_large_for_any_memory_harms_nothing() -> None:
    wrapper, x = estimator(K=2, assigner="label_supervised"), torch.zeros(1, 2**22)  # 2^47 bytes
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not wrapper.update(x, torch.zeros(1, dtype=torch.int64))
    assert [str(warning.message).split(":")[0][:30] for warning in caught] == [
        "The mixture (K=2, D=4194304) t",
        "`update` ran out of memory and",
    ]


@pytest.mark.parametrize(("K", "D", "said"), [(8, 5590, "1.0 GB"), (1000, 2048, "16.8 GB")])
def test_large_state_says_its_size(K: int, D: int, said: str) -> None:
    (note,) = size_note(K, D)
    assert f"(K={K}, D={D}) takes {said}" in note


@pytest.mark.filterwarnings("ignore:`update` ran out of memory", "ignore:.* rows were ignored")
def test_skipped_part_of_a_step_leaves_the_others_in_its_record(run_out: Callable[..., Any], tmp_path: Path) -> None:
    with estimator(log_dir=tmp_path, store_scores=True) as wrapper:
        with activate(wrapper, step=0):
            R = wrapper.update(mixture()[0])["R"]
            run_out(wrapper, SHORTAGES["CUDA"])
        wrapper.log_step(step=0, epoch=0)
    assert not np.isnan(read_log(tmp_path)["trace_B"]).any()
    assert torch.equal(read_scores(tmp_path)[0]["responsibilities"], torch.cat([R, torch.zeros(60, 3)]))
