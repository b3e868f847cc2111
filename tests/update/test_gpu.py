"""What is different on a GPU: nobody waits, rows come later, and steps may be replayed."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixture_torch import MixtureStats, read_log, read_scores
from tests.tolerances import FLOAT32, relative_error

K, N, D = 5, 96, 20
STATISTICS = ("pi", "mu", "Sigma", "B", "R", "trace_B", "opnorm_B", "participation_ratio", "n_ignored", "n_relocated")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def batches(count: int, *, rows: int = N) -> Iterator[Tensor]:
    """Batches of a mixture on the GPU, some with a NaN row."""
    generator = torch.Generator().manual_seed(0)
    means = 10 * torch.randn(K, D, generator=generator)
    for number in range(count):
        x = means[torch.randint(K, (rows,), generator=generator)] + torch.randn(rows, D, generator=generator)
        if number % 7 == 3:
            x[number % rows] = float("nan")
        yield x.cuda()


def estimator(**options: object) -> MixtureStats:
    return MixtureStats(**{"K": K, "enabled": True} | options)  # type: ignore[arg-type]  # whatever a test wants


def assert_same(actual: MixtureStats, expected: MixtureStats) -> None:
    for name in STATISTICS:
        assert torch.equal(actual.stats[name], expected.stats[name]), name
    for key, value in expected.state_dict().items():
        found = actual.state_dict()[key]
        assert torch.equal(found, value) if isinstance(value, Tensor) else found == value, key


@contextmanager
def no_syncs() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Replayed steps


@pytest.mark.filterwarnings("ignore:.*rows were ignored")
@pytest.mark.parametrize("options", [{}, {"mode": "per_batch"}, {"max_assign_iters": 1}, {"ema_decay": 0.5}])
def test_hundred_replayed_steps_equal_hundred_plain_ones(options: dict[str, object]) -> None:
    plain, compiled = estimator(**options), estimator(compile=True, **options)
    for x in batches(100):
        plain.update(x)
        compiled.update(x)
        assert_same(compiled, plain)


@pytest.mark.filterwarnings("ignore:.*rows were ignored")
def test_replayed_steps_by_labels_equal_plain_ones() -> None:
    plain, compiled = (estimator(assigner="label_supervised", compile=value) for value in (False, True))
    generator = torch.Generator().manual_seed(1)
    for x in batches(20):
        labels = torch.randint(-1, K, (N,), generator=generator).cuda()
        plain.update(x, labels)
        compiled.update(x, labels)
        assert_same(compiled, plain)


@pytest.mark.filterwarnings("ignore:.*rows were ignored")
def test_replayed_steps_of_changing_size_and_type_equal_plain_ones() -> None:
    plain, compiled = estimator(), estimator(compile=True)
    for number, x in enumerate(batches(40)):
        x = x[: N - 8 * (number % 5 == 4)]
        x = x.bfloat16() if number % 3 == 2 else x.requires_grad_() if number % 3 == 1 else x
        plain.update(x)
        compiled.update(x)
        assert_same(compiled, plain)


@pytest.mark.filterwarnings("ignore:.*rows were ignored")
@pytest.mark.parametrize("compiled", [False, True])
def test_everything_handed_out_keeps_its_values(compiled: bool) -> None:
    one = estimator(compile=compiled)
    kept, copies = [], []
    for x in batches(12):
        stats = one.update(x)
        kept.append((stats, one.state, one.state_dict()))
        copies.append({name: stats[name].clone() for name in STATISTICS})
    unread = [one.update(x) for x in batches(12)]
    again = estimator(compile=compiled)
    for x in batches(12):
        again.update(x)
    for stats, x in zip(unread, batches(12), strict=True):
        assert torch.equal(stats["Sigma"], again.update(x)["Sigma"])
    for (stats, state, state_dict), copy in zip(kept, copies, strict=True):
        for name in STATISTICS:
            assert torch.equal(stats[name], copy[name]), name
        assert torch.equal(state.moments.covariance, copy["Sigma"])
        assert torch.equal(state_dict["covariance"], copy["Sigma"])


@pytest.mark.filterwarnings("ignore:.*rows were ignored")
def test_replayed_steps_go_on_from_a_loaded_state() -> None:
    plain, compiled = estimator(), estimator(compile=True)
    for x in batches(10):
        plain.update(x)
    compiled.load_state_dict(plain.state_dict())
    for x in batches(10):
        plain.update(x)
        compiled.update(x)
        assert_same(compiled, plain)
    compiled.load_state_dict(estimator().state_dict())
    fresh = estimator()
    for x in batches(10):
        fresh.update(x)
        compiled.update(x)
        assert_same(compiled, fresh)


# Nobody waits


@pytest.mark.filterwarnings("ignore:.*rows were ignored", "ignore:Synchronization debug mode")
@pytest.mark.parametrize("options", [{}, {"compile": True}, {"store_scores": True}, {"mode": "per_batch"}])
def test_hundred_logged_steps_wait_for_nothing(options: dict[str, object], tmp_path: Path) -> None:
    one, many = estimator(log_dir=tmp_path, **options), list(batches(100))
    with no_syncs():
        for step, x in enumerate(many):
            one.log_step(step=step, epoch=0, stats=one.update(x))
        one.close()
    assert len(read_log(tmp_path)["step"]) == 100


@pytest.mark.filterwarnings("ignore:.*rows were ignored", "ignore:Synchronization debug mode")
def test_steps_by_labels_wait_for_nothing(tmp_path: Path) -> None:
    one = estimator(log_dir=tmp_path, assigner="label_supervised")
    labels, many = (torch.arange(N) % K).cuda(), list(batches(20))
    with no_syncs():
        for step, x in enumerate(many):
            one.log_step(step=step, epoch=0, stats=one.update(x, labels))
        one.close()
    assert len(read_log(tmp_path)["step"]) == 20


@pytest.mark.filterwarnings("ignore:.*rows were ignored")
@pytest.mark.parametrize("compiled", [False, True])
def test_rows_and_scores_are_those_of_their_steps(compiled: bool, tmp_path: Path) -> None:
    one = estimator(log_dir=tmp_path, store_scores=True, compile=compiled)
    logged = []
    for step, x in enumerate(batches(20)):
        stats = one.update(x)
        one.log_step(step=step, epoch=0)
        logged.append([*(float(v) for v in (stats["pi"].min(), stats["pi"].max(), stats["trace_B"])), stats["R"].cpu()])
        assert step == 0 or len(read_log(tmp_path)["step"]) >= step
    one.flush()
    log, scores = read_log(tmp_path), read_scores(tmp_path)
    for step, (least, most, trace, R) in enumerate(logged):
        assert [log[name][step] for name in ("pi_min", "pi_max")] == pytest.approx([least, most], rel=FLOAT32)
        assert log["trace_B"][step] == pytest.approx(trace, rel=FLOAT32)
        assert torch.equal(scores[step]["responsibilities"], R)


def test_rows_arrive_when_the_estimator_is_gone(tmp_path: Path) -> None:
    one = estimator(log_dir=tmp_path)
    one.update(next(batches(1)))
    one.log_step(step=7, epoch=0)
    del one
    assert list(read_log(tmp_path)["step"]) == [7]


def test_ignored_rows_are_warned_of_a_step_later_by_name(tmp_path: Path) -> None:
    one = estimator(log_dir=tmp_path)
    x = next(batches(1))
    bad = x.clone()
    bad[:3] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.update(bad)
        one.log_step(step=11, epoch=0)
        one.update(x)
    with pytest.warns(UserWarning, match=rf"3 of {N} rows were ignored at step 11 "):
        one.log_step(step=12, epoch=0)


@pytest.mark.parametrize("surface", ["log_step", "flush", "close"])
def test_a_wrong_label_raises_a_step_later_by_name_and_changes_nothing(surface: str, tmp_path: Path) -> None:
    one = estimator(log_dir=tmp_path, assigner="label_supervised")
    x, labels = next(batches(1)), (torch.arange(N) % K).cuda()
    one.log_step(step=0, epoch=0, stats=one.update(x, labels))
    before, wrong = one.state_dict(), labels.clone()
    wrong[4] = K + 3
    one.update(x, wrong)
    one.log_step(step=1, epoch=0)
    for key in ("weight", "mean", "covariance"):
        assert torch.equal(one.state_dict()[key], before[key])
    with pytest.raises(ValueError, match=rf"must be in \[0, {K}\).* got {K + 3} at step 1"):
        one.log_step(step=2, epoch=0, stats=one.update(x, labels)) if surface == "log_step" else getattr(one, surface)()


@pytest.mark.filterwarnings("ignore:.*rows were ignored")
def test_gpu_equals_cpu() -> None:
    on_gpu, on_cpu = estimator(), estimator()
    for x in batches(20):
        on_gpu.update(x)
        on_cpu.update(x.cpu())
        for name in STATISTICS:
            assert relative_error(on_gpu.stats[name].cpu(), on_cpu.stats[name]) <= FLOAT32, name
