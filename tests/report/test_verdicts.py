"""Verdicts on synthetic logs: what is said, of which component, since when, and that it is said once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mixture_torch import read_run
from mixture_torch.report.verdicts import Verdict, verdicts
from tests.report.logs import Columns, healthy, lose, write

D, SINCE = 16, 120  # steps


def found(folder: Path, columns: Columns, *, extra: bool = True) -> tuple[Verdict, ...]:
    run = read_run(write(folder, columns, extra=extra))
    return verdicts(run)


def wide(folder: Path) -> Path:
    """A run folder that says how wide the embeddings are."""
    folder.mkdir()
    torch.save({"D": D, "K": 6}, folder / "mixture_last.pt")
    return folder


def test_healthy_run_has_one_verdict_with_its_figures(tmp_path: Path) -> None:
    (verdict,) = found(tmp_path, healthy())
    assert (verdict.level, verdict.since) == ("fine", None)
    assert "200 steps, 0 to 199" in verdict.text
    assert "the total variance is 0.9" in verdict.text


def test_lost_group_is_one_verdict_that_names_it(tmp_path: Path) -> None:
    columns = healthy()
    lose(columns, 2, slice(SINCE, None))
    columns["trace_T"][SINCE:] *= 1.2
    (verdict,) = found(tmp_path, columns)
    assert (verdict.level, verdict.kind, verdict.components, verdict.since) == ("wrong", "group gone", (2,), SINCE)
    assert "component 2 lost most of its samples at step 120" in verdict.title
    assert "no other component gained as much" in verdict.text
    assert "The total variance went from" in verdict.text


def test_group_that_is_lost_soon_after_another_is_named_too(tmp_path: Path) -> None:
    columns = healthy()
    lose(columns, 2, slice(SINCE, None))
    lose(columns, 4, slice(SINCE + 20, None))
    (verdict,) = found(tmp_path, columns)
    assert (verdict.kind, verdict.components, verdict.since) == ("group gone", (2, 4), SINCE)


def test_samples_that_move_to_another_component_have_not_gone(tmp_path: Path) -> None:
    columns = healthy()
    columns["n"][SINCE:, 3] += columns["n"][SINCE:, 2]
    columns["n"][SINCE:, 2] = 0
    (verdict,) = found(tmp_path, columns)
    assert (verdict.level, verdict.kind, verdict.components) == ("changed", "composition", (2, 3))


def test_batch_that_falls_into_one_component_is_wrong(tmp_path: Path) -> None:
    columns = healthy()
    columns["n"][SINCE:] = 4.0
    columns["n"][SINCE:, 1] = 580.0
    (verdict,) = found(tmp_path, columns)
    assert (verdict.level, verdict.components, verdict.since) == ("wrong", (1,), SINCE)
    assert "6 of 6 components" in verdict.text


def test_collapse_tells_the_changes_that_come_with_it(tmp_path: Path) -> None:
    columns = healthy()
    for name in ("trace_T", "trace_B"):
        columns[name][SINCE:] *= 0.01
    columns["pi"][SINCE + 5 :, 0] = 1e-5
    (verdict,) = found(tmp_path, columns)
    assert (verdict.level, verdict.kind, verdict.since) == ("wrong", "collapse", SINCE)
    assert "It lasts to the end of the log, step 199" in verdict.text


def test_level_that_is_over_has_passed(tmp_path: Path) -> None:
    columns = healthy()
    columns["pi"][60:100, [1, 4]] = 1e-5
    (verdict,) = found(tmp_path, columns)
    assert (verdict.level, verdict.kind, verdict.components) == ("changed", "dead component", (1, 4))
    assert verdict.title == "Components 1 and 4 had hardly any samples from step 60 to step 100"
    assert "It has passed" in verdict.text


def test_worst_comes_first(tmp_path: Path) -> None:
    columns = healthy(300)
    for name in ("trace_T", "trace_B"):
        columns[name][80:] *= 0.75
    columns["pi"][200:, 5] = 1e-5
    first, second = found(tmp_path, columns)
    assert (first.level, first.kind, first.components) == ("wrong", "dead component", (5,))
    assert (second.level, second.kind, second.since) == ("changed", "trace_T", 80)


def test_run_without_usable_rows_is_wrong(tmp_path: Path) -> None:
    columns = healthy()
    columns["n_ignored"][SINCE:] = 600
    columns["n"][SINCE:] = 0.0
    columns["trace_T"][SINCE:] = columns["trace_B"][SINCE:] = np.nan
    (verdict,) = found(tmp_path, columns)
    assert (verdict.level, verdict.kind, verdict.since) == ("wrong", "no rows", SINCE)


def test_steps_without_usable_rows_are_told_after_they_passed(tmp_path: Path) -> None:
    columns = healthy()
    columns["trace_T"][50:80] = columns["trace_B"][50:80] = np.nan
    (verdict,) = found(tmp_path, columns)
    assert (verdict.level, verdict.kind, verdict.since) == ("changed", "no rows", 50)
    assert "The first was step 50 and the last step 79" in verdict.text


def test_verdict_that_all_is_well_says_what_it_could_not_see(tmp_path: Path) -> None:
    columns = healthy()
    columns["n_relocated"][::10] = 1
    columns["n_ignored"][:], columns["n_rows"][:] = 200, 800
    (verdict,) = found(tmp_path, columns)
    assert verdict.level == "fine"
    assert "In 20 steps components moved" in verdict.text
    assert "25 % had NaN" in verdict.text


@pytest.mark.parametrize("S", [0, 1, 45])
def test_short_run_is_unknown(tmp_path: Path, S: int) -> None:
    (verdict,) = found(tmp_path, healthy(S))
    assert verdict.level == "unknown"


def test_run_of_empty_batches_is_unknown(tmp_path: Path) -> None:
    columns = healthy()
    columns["n"][:] = columns["n_rows"][:] = 0
    (verdict,) = found(tmp_path, columns)
    assert (verdict.level, "figures of no step" in verdict.text) == ("unknown", True)


def test_figures_are_those_of_the_worst_component(tmp_path: Path) -> None:
    columns = healthy()
    columns["pi"][60:, [1, 4]] = 1e-5, 1e-6
    (verdict,) = found(tmp_path, columns)
    assert verdict.title == "Components 1 and 4 have had hardly any samples since step 60"
    assert "the weight of component 4 was 1e-06; equal weights would be 0.17" in verdict.text


@pytest.mark.parametrize("extra", [True, False])
def test_one_step_is_singular(extra: bool, tmp_path: Path) -> None:
    assert "1 step, 0" in found(tmp_path, healthy(1), extra=extra)[0].text


def test_seven_columns_say_what_they_can(tmp_path: Path) -> None:
    columns = healthy()
    (verdict,) = found(tmp_path / "fine", columns, extra=False)
    assert verdict.level == "unknown"
    assert "0.167 to 0.167" in verdict.text
    columns["pi"][SINCE:, 0] = 1e-5
    (verdict,) = found(tmp_path / "dead", columns, extra=False)
    assert (verdict.level, verdict.kind, verdict.since) == ("wrong", "dead component", SINCE)
    columns["trace_B"][SINCE:] *= 1e-3
    (verdict,) = found(tmp_path / "collapsed", columns, extra=False)
    assert (verdict.level, verdict.kind, verdict.since) == ("wrong", "collapse", SINCE)
    columns["trace_B"][SINCE:] = np.nan
    (verdict,) = found(tmp_path / "nan", columns, extra=False)
    assert (verdict.level, verdict.kind, verdict.since) == ("wrong", "no rows", SINCE)


def test_few_directions_are_wrong_only_for_embeddings_of_norm_1(tmp_path: Path) -> None:
    columns = healthy() | {"participation_ratio": np.full(200, 0.05 * D)}
    columns["opnorm_B"] = 0.5 * columns["trace_B"]
    columns["trace_T"] = np.minimum(columns["trace_T"], 1.0)
    (collapsed,) = found(wide(tmp_path / "norm 1"), columns)
    assert (collapsed.level, collapsed.title[:20]) == ("wrong", "Dimensional collapse")
    (usual,) = found(wide(tmp_path / "classifier"), columns | {"trace_T": 50 * columns["trace_T"]})
    assert usual.level == "fine"


def test_small_jump_of_a_variance_does_not_matter(tmp_path: Path) -> None:
    columns = healthy()
    for name, level in (("trace_T", 0.9), ("share_B", 0.4)):
        columns[name] = level * (1 + 1e-4 * np.random.default_rng(0).normal(size=200))
    columns["share_B"][SINCE:] *= 1.005
    columns["trace_B"] = columns["trace_T"] * columns["share_B"]
    (verdict,) = found(tmp_path / "small", columns)
    assert (verdict.level, verdict.text[:32]) == ("fine", "No alarm in 200 steps, 0 to 199.")
    for name in ("share_B", "trace_B"):
        columns[name][SINCE + 10 :] *= 1.05
    (verdict,) = found(tmp_path / "large", columns)
    assert (verdict.level, verdict.kind) == ("changed", "share_B")


@pytest.mark.parametrize(("N", "rows", "level"), [(30, 2, "fine"), (600, 2, "wrong")])
def test_few_rows_that_two_batches_lack_have_not_gone(N: int, rows: int, level: str, tmp_path: Path) -> None:
    columns = healthy(N=N)
    columns["n"][:] = N / 6
    lose(columns, 2, slice(SINCE, SINCE + rows))
    (verdict,) = found(tmp_path, columns)
    assert verdict.level == level
    assert verdict.kind == ("fine" if level == "fine" else "group gone")


def test_share_that_is_back_has_passed(tmp_path: Path) -> None:
    columns = healthy()
    columns["n"][:] = 100
    lose(columns, 2, slice(SINCE, SINCE + 10), keep=0.6)
    (verdict,) = found(tmp_path, columns)
    assert verdict.title == "Component 2 had a different share of the batch from step 120 on"
    assert "it is 0.167 again" in verdict.text
