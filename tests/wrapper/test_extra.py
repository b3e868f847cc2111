"""More than seven columns: pairs of views, alarms, and the same after a kill and a resume."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixture_core import pairs, readings
from mixture_core.alarms import Alarm
from mixture_torch import MixtureStats, NTXentLoss, activate, read_extra, read_log
from tests.tolerances import FLOAT32, relative_error
from tests.wrapper.samples import contents, estimator, mixture

GONE = 120  # the step at which a cluster disappears


def views(step: int) -> Tensor:
    """Two noisy views of 64 samples of four clusters, one of which disappears."""
    generator = torch.Generator().manual_seed(step)
    label = torch.randint(4 if step < GONE else 3, (64,), generator=generator)
    sample = 3 * torch.eye(4, 12)[label] + 0.1 * torch.randn(64, 12, generator=generator)
    return torch.cat([sample + 0.05 * torch.randn(64, 12, generator=generator) for _ in range(2)])


def train(
    folder: Path, steps: range, state_dict: dict[str, Any] | None = None
) -> tuple[MixtureStats, list[str], list[dict[str, Any]]]:
    """Trains with a checkpoint every 30 steps; returns the estimator, the alarms and the checkpoints."""
    alarms: list[str] = []
    wrapper = estimator(K=4, log_dir=folder, on_alarm=lambda alarm: alarms.append(str(alarm)))
    if state_dict is not None:
        wrapper.load_state_dict(state_dict)
    checkpoints = []
    for step in steps:
        wrapper.update(views(step), views=2)
        wrapper.log_step(step=step, epoch=0)
        if step % 30 == 29:
            wrapper.flush()
            checkpoints.append(wrapper.state_dict())
    return wrapper, alarms, checkpoints


@pytest.mark.filterwarnings("ignore:.* is resumed at step")
def test_resumed_run_has_the_files_and_alarms_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, alarms, _ = train(tmp_path / "whole", range(GONE + 60))
    whole.close()
    _killed, before, checkpoints = train(tmp_path / "resumed", range(GONE + 10))
    resumed, after, _ = train(tmp_path / "resumed", range(GONE, GONE + 60), checkpoints[-1])
    resumed.close()
    assert after
    assert after == alarms  # those of the killed run after its checkpoint are raised again
    assert before == alarms[: len(before)]
    found, expected = contents(tmp_path / "resumed"), contents(tmp_path / "whole")
    assert {name: found[name] for name in expected} == expected
    assert "mixture_extra.superseded-1.csv" in found


def lose_a_cluster(wrapper: MixtureStats, steps: int) -> None:
    for step in range(steps):
        wrapper.update(views(step))
        wrapper.log_step(step=step, epoch=0)


def test_cluster_that_disappears_is_named(tmp_path: Path) -> None:
    alarms: list[Alarm] = []
    lose_a_cluster(estimator(K=4, log_dir=tmp_path, on_alarm=alarms.append), GONE + 3)
    lost = int(read_extra(tmp_path)["n"][-1].argmin())
    assert [(alarm.kind, alarm.component, alarm.since) for alarm in alarms] == [("composition", lost, GONE)]


def test_alarms_warn_once_for_each_kind_without_a_function(tmp_path: Path) -> None:
    wrapper = estimator(K=4, log_dir=tmp_path)
    with pytest.warns(UserWarning, match="Alarm: composition") as said:
        lose_a_cluster(wrapper, GONE + 60)
    assert len([one for one in said if "Alarm: composition" in str(one.message)]) == 1


class UnreadableError(Exception):
    def __str__(self) -> str:
        raise TypeError("no text")


@pytest.mark.parametrize(
    ("error", "text"),
    [(RuntimeError("no\nnetwork"), "RuntimeError: no network"), (UnreadableError(), "UnreadableError: Unr")],
)
def test_function_for_alarms_that_raises_ends_no_run(tmp_path: Path, error: Exception, text: str) -> None:
    def fail(alarm: Alarm) -> None:
        raise error

    wrapper = estimator(K=4, log_dir=tmp_path, on_alarm=fail)
    with pytest.warns(UserWarning, match=f"`on_alarm` raised {text}"):
        lose_a_cluster(wrapper, GONE + 3)


def test_alarms_need_no_folder(tmp_path: Path) -> None:
    told: list[list[Alarm]] = [[], []]
    for log_dir, alarms in zip((None, tmp_path), told, strict=True):
        lose_a_cluster(estimator(K=4, log_dir=log_dir, on_alarm=alarms.append), GONE + 3)
    assert told[0]
    assert told[0] == told[1]


def test_snapshots_that_could_not_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^`log_dir` must be given with `snapshot_every`, got None\.$"):
        estimator(snapshot_every=5)
    with pytest.raises(ValueError, match="`extra` must be true with `snapshot_every`"):
        estimator(log_dir=tmp_path, snapshot_every=5, extra=False)


@pytest.mark.parametrize("R", [[[0.5, 0.5]], torch.ones(3), None])
def test_mapping_of_the_users_own_is_checked_as_a_whole(tmp_path: Path, R: Any) -> None:
    stats = {"pi": torch.tensor([0.5, 0.5]), "B": torch.eye(3), "R": R}
    with pytest.raises(ValueError, match=r"^`stats` must hold R as a dense tensor \(N, K\), got .*\.$"):
        estimator(log_dir=tmp_path).log_step(step=0, epoch=0, stats=stats)


def test_components_are_not_dead_before_there_are_rows_to_seed_them_from(tmp_path: Path) -> None:
    alarms: list[Alarm] = []
    wrapper = estimator(K=100, ema_decay=0.999, log_dir=tmp_path, on_alarm=alarms.append)
    for step in range(60):
        wrapper.update(torch.randn(2, 4, generator=torch.Generator().manual_seed(step)))
        wrapper.log_step(step=step, epoch=0)
    assert [alarm for alarm in alarms if alarm.component is not None] == []


def test_function_for_alarms_is_checked(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`on_alarm` must be a function of an alarm, or None, got 'x'"):
        estimator(log_dir=tmp_path, on_alarm="x")
    with pytest.raises(ValueError, match="`extra` must be true with `on_alarm`"):
        estimator(log_dir=tmp_path, on_alarm=print, extra=False)


def test_function_for_alarms_may_load_a_checkpoint(tmp_path: Path) -> None:
    wrapper = estimator(K=4, log_dir=tmp_path, on_alarm=lambda _: wrapper.load_state_dict(state_dict))
    wrapper.update(views(0))
    state_dict = wrapper.state_dict()
    lose_a_cluster(wrapper, GONE + 2)
    assert not wrapper.stats  # it was called at the last row
    wrapper.flush()
    assert not (tmp_path / "mixture_snapshots").exists()


def test_extra_row_holds_the_readings_of_the_step(tmp_path: Path) -> None:
    with estimator(K=4, log_dir=tmp_path) as wrapper:
        for step in range(3):
            stats = wrapper.update(views(step), views=2)
            wrapper.log_step(step=step, epoch=1)
    rows, log, m = read_extra(tmp_path), read_log(tmp_path), stats.moments
    expected = {
        "n_rows": 128, "n_ignored": 0, "n_relocated": 0, "trace_T": readings.trace_T(m), "share_B": readings.share_B(m),
        "participation_ratio": stats.participation_ratio, "pi": stats.pi, "n": stats.R.sum(dim=0),
        "rel": stats.Sigma.diagonal(dim1=1, dim2=2).sum(dim=1) / readings.trace_T(m),
    }  # fmt: skip
    for name, value in expected.items():
        assert relative_error(torch.as_tensor(rows[name][-1]), torch.as_tensor(value)) <= FLOAT32, name
    assert rows["step"].tolist() == log["step"].tolist() == [0, 1, 2]
    assert 0.04 <= rows["alignment"][-1] <= 0.08  # 2 * 12 * 0.05^2
    assert 0 < rows["se_trace_B"][-1] < 0.5
    scalars = stats.scalars()
    assert scalars["trace_B"] == float(stats.trace_B)
    assert scalars["n_2"] == rows["n"][-1][2]


@pytest.mark.parametrize("mode", ["ema", "per_batch"])
def test_pairs_of_every_tenth_step_tell_what_those_of_all_tell(mode: str) -> None:
    wrapper, every = estimator(K=4, mode=mode), pairs.none(K=4, D=12)
    for step in range(65):
        a, b, c, d = views(step).chunk(4)
        first, second = torch.cat([a, c]), torch.cat([b, d])
        for x, decay in (first, 0.95 if mode == "ema" else 0.0), (second, 1.0):  # a step in two parts
            stats = wrapper.update(x, step=step, views=2)
            every = pairs.observe(every, x, stats.R, stats.moments, decay=decay)
    found = stats.scalars()
    tolerance = 0.1 if mode == "ema" else FLOAT32
    assert abs(found["alignment"] / float(pairs.alignment(every)) - 1) <= tolerance
    assert abs(found["se_trace_B"] / float(every.standard_errors[-2]) - 1) <= tolerance


def test_extra_row_of_a_step_without_usable_rows_has_counts_alone(tmp_path: Path) -> None:
    with estimator(log_dir=tmp_path) as wrapper:
        wrapper.update(mixture()[0])
        with pytest.warns(UserWarning, match="rows were ignored"):
            wrapper.update(torch.full((8, 4), math.nan))
        wrapper.log_step(step=0, epoch=0)
    rows = read_extra(tmp_path)
    assert (rows["n_rows"].tolist(), rows["n_ignored"].tolist(), rows["n"].tolist()) == ([8], [8], [[0.0] * 3])
    assert all(math.isnan(rows[name][0]) for name in ("trace_T", "share_B", "participation_ratio", "alignment"))


def test_without_extra_there_is_nothing_but_the_log(tmp_path: Path) -> None:
    with estimator(log_dir=tmp_path, extra=False) as wrapper:
        wrapper.update(mixture()[0])
        wrapper.log_step(step=0, epoch=0)
    assert set(contents(tmp_path)) == {"mixture.csv"}


def test_last_mixture_is_left_in_the_folder(tmp_path: Path) -> None:
    with estimator(log_dir=tmp_path) as wrapper:
        wrapper.update(mixture()[0])
        wrapper.log_step(step=0, epoch=0)
    other = estimator()
    other.load_state_dict(torch.load(tmp_path / "mixture_last.pt"))
    assert torch.equal(other.state.moments.mean, wrapper.state.moments.mean)  # type: ignore[union-attr]


def test_loss_feeds_pairs(tmp_path: Path) -> None:
    wrapper = estimator(log_dir=tmp_path)
    with activate(wrapper), wrapper:
        NTXentLoss()(*views(0).chunk(2))
        wrapper.log_step(step=0, epoch=0)
    assert read_extra(tmp_path)["alignment"][0] > 0


def test_views_are_checked() -> None:
    wrapper = estimator()
    with pytest.raises(ValueError, match="even number of rows with views=2"):
        wrapper.update(torch.randn(5, 4), views=2)
    for wrong in (3, 2.0, True, torch.tensor(2), torch.tensor([1, 2]), "2", None):
        with pytest.raises(ValueError, match=r"^`views` must be 1 or 2, got .*\.$"):
            wrapper.update(torch.randn(6, 4), views=wrong)
    assert wrapper.update(torch.randn(40, 4), views=np.int64(2))
