"""Three real gloo processes against one: who sees whose rows, who writes, and that nobody waits for ever."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from mixture_torch import read_log, read_scores
from tests.wrapper.ranks import FAULTS, KINDS, LABELLED, SIZES, WORLD, run_cases, shares
from tests.wrapper.samples import assert_close, bits, estimator, mixture

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
LIMIT = 60.0  # seconds for all cases

ranks = pytest.mark.parametrize("rank", range(WORLD))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the ranks worked, after they have ended."""
    folder = tmp_path_factory.mktemp("ranks")
    context = start_processes(run_cases, args=(folder,), nprocs=WORLD, join=False, start_method="spawn")
    deadline = time.monotonic() + LIMIT
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                pytest.fail(f"the ranks took more than {LIMIT:.0f} s")
    except (ProcessExitedException, ProcessRaisedException) as error:  # cases after the one that failed have no result
        (folder / "error.txt").write_text(str(error))
    finally:
        for process in context.processes:
            process.kill()
    return folder


@pytest.fixture
def results(folder: Path) -> list[dict[str, Any]]:
    """The results of every rank, by case; those of a case that never ended are missing."""
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(WORLD)]


def test_all_ranks_came_to_their_end(folder: Path) -> None:
    error = folder / "error.txt"
    assert not error.exists(), error.read_text()


def test_all_cases_came_to_their_end(results: list[dict[str, Any]]) -> None:
    assert [case for result in results for case in result.values() if isinstance(case, str)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_together_have_the_stats_of_one_process(kind: str, results: list[dict[str, Any]]) -> None:
    wrapper = estimator(**KINDS[kind])
    for step, sizes in enumerate(SIZES):
        stats = wrapper.update(*mixture(sum(sizes), seed=step))
        for result in results:
            found = result[kind][step]["stats"]
            assert torch.equal(found["R"], stats["R"])
            assert_close(found, stats, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_together_agree_to_the_bit(kind: str, results: list[dict[str, Any]]) -> None:
    for step in range(len(SIZES)):
        first, *others = (bits(result[kind][step]["stats"]) for result in results)
        assert others == [first] * (WORLD - 1)


@ranks
def test_ranks_may_differ_in_the_type_of_their_rows(rank: int, results: list[dict[str, Any]]) -> None:
    x = torch.cat([x for x, _ in shares(0, (7, 0, 12))]).half().float()
    assert_close(results[rank]["many types"]["stats"], estimator().update(x), 1e-6)


@ranks
def test_empty_batches_on_all_ranks_change_nothing(rank: int, results: list[dict[str, Any]]) -> None:
    wrapper = estimator()
    for found in results[rank]["idle"]:
        x = torch.zeros(0, 4) if len(found["stats"]["R"]) == 0 else mixture(19)[0]
        assert_close(found["stats"], wrapper.update(x), 1e-6)
    assert [len(found["stats"]["R"]) for found in results[rank]["idle"]] == [0, 19, 0]


@ranks
def test_ranks_alone_have_stats_of_their_own(rank: int, results: list[dict[str, Any]]) -> None:
    wrapper = estimator()
    for step, sizes in enumerate(SIZES):
        stats = wrapper.update(*shares(step, sizes)[rank])
        assert bits(results[rank]["alone"][step]["stats"]) == bits(stats)


@ranks
def test_bad_row_of_one_rank_counts_on_all(rank: int, results: list[dict[str, Any]]) -> None:
    x, _ = mixture(19)
    x[7 + 3] = float("nan")
    with pytest.warns(UserWarning, match="ignored"):
        expected = estimator().update(x)
    found = results[rank]["one bad row"][0]["stats"]
    assert int(found["n_ignored"]) == 1
    assert_close(found, expected, 1e-6)


@ranks
def test_bad_row_of_one_rank_raises_on_all_where_strict(rank: int, results: list[dict[str, Any]]) -> None:
    refused, accepted = results[rank]["one bad row, strict"]
    assert (refused["error"], refused["unchanged"]) == ("ValueError", True)
    assert refused["message"].startswith("`strict` expects every row to be usable, got 1 of 19 rows")
    assert "stats" in accepted


when = pytest.mark.parametrize("when", ["first", "later"])


@when
@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_one_rank_raises_on_all(name: str, when: str, results: list[dict[str, Any]]) -> None:
    for result in results:
        refused = result[f"{name}, {when}"][-2]
        assert refused.get("error") in ("ValueError", "TypeError"), refused
        assert refused["message"].startswith(("`embeddings` must ", "`labels` must ", "`update` must "))
        assert "\n" not in refused["message"]


@when
@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_one_rank_leaves_all_unchanged(name: str, when: str, results: list[dict[str, Any]]) -> None:
    assert [result[f"{name}, {when}"][-2].get("unchanged") for result in results] == [True] * WORLD


@when
@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_one_rank_is_the_same_error_on_all(name: str, when: str, results: list[dict[str, Any]]) -> None:
    refused = [result[f"{name}, {when}"][-2] for result in results]
    assert len({(one["error"], one["message"]) for one in refused}) == 1


@when
@pytest.mark.parametrize("name", FAULTS)
def test_fault_names_the_rank(name: str, when: str, results: list[dict[str, Any]]) -> None:
    assert "on rank 1." in results[0][f"{name}, {when}"][-2]["message"]


@when
@pytest.mark.parametrize("name", FAULTS)
def test_next_update_after_a_fault_works(name: str, when: str, results: list[dict[str, Any]]) -> None:
    wrapper = estimator(**FAULTS[name][0])
    if when == "later":
        wrapper.update(*mixture(19, seed=0))
    expected = wrapper.update(*mixture(19, seed=1))
    for result in results:
        assert_close(result[f"{name}, {when}"][-1]["stats"], expected, 1e-6)


def test_only_the_main_rank_leaves_files(folder: Path) -> None:
    assert sorted(path.name for path in folder.glob("run*")) == ["run", "run_of_0"]


@pytest.mark.parametrize("name", ["run", "run_of_0"])
def test_main_rank_writes_every_step_once(folder: Path, name: str) -> None:
    wrapper = estimator()
    R = [wrapper.update(*mixture(sum(sizes), seed=step))["R"].tolist() for step, sizes in enumerate(SIZES)]
    assert read_log(folder / name)["step"].tolist() == list(range(len(SIZES)))
    assert [entry["responsibilities"].tolist() for entry in read_scores(folder / name)] == R


@ranks
def test_dtensor_of_rows_is_each_ranks_own_rows(rank: int, results: list[dict[str, Any]]) -> None:
    own = mixture(19)[0].chunk(WORLD)[rank]
    assert bits(results[rank]["dtensors"]["rows alone"]["stats"]) == bits(estimator().update(own))


@ranks
@pytest.mark.parametrize("case", ["rows together", "copies alone"])
def test_dtensor_together_or_replicated_is_all_rows(rank: int, case: str, results: list[dict[str, Any]]) -> None:
    assert_close(results[rank]["dtensors"][case]["stats"], estimator().update(mixture(19)[0]), 1e-6)


@ranks
def test_dtensor_of_labels_goes_with_that_of_rows(rank: int, results: list[dict[str, Any]]) -> None:
    expected = estimator(**LABELLED).update(*mixture(19))
    assert_close(results[rank]["dtensors"]["labelled rows"]["stats"], expected, 1e-6)


@ranks
@pytest.mark.parametrize("case", ["columns alone", "columns together"])
def test_dtensor_of_columns_is_refused(rank: int, case: str, results: list[dict[str, Any]]) -> None:
    refused = results[rank]["dtensors"][case]
    assert (refused["error"], refused["unchanged"]) == ("ValueError", True)
    assert refused["message"].startswith(
        ("`embeddings` must be sharded by rows or replicated, got a DTensor", "`update`")
    )
