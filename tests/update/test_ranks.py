"""Four real gloo processes against one: who sees whose rows, who writes, and what comes of a rank that is wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.tolerances import FLOAT32
from tests.update.cases import CASES, FAULTS, FEW, LABELLED, LOADED, OTHER_OPTIONS, SIZES, STEPS, WHEN, shares
from tests.update.matrix import EXCHANGES
from tests.update.ranks import WORLD, Results, start
from tests.wrapper.samples import assert_close, bits, estimator, mixture, unchanged

ranks = pytest.mark.parametrize("rank", range(WORLD))
exchanges = pytest.mark.parametrize("exchange", EXCHANGES)
whens = pytest.mark.parametrize("when", WHEN)
kinds = pytest.mark.parametrize("kind", FAULTS)
# Errors that are not ours, but those of what the caller gave.
FOREIGN = {
    "unreadable": "the rows are gone",
    "an error that cannot be said": "Unspeakable",
    "a subclass that raises": "hands off",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return start(tmp_path_factory.mktemp("ranks"), CASES)


def assert_state_close(found: dict[str, Any], expected: Any) -> None:
    """Compares all but R, which is each rank's own where ranks reduce."""
    assert_close(found["stats"], {key: value for key, value in expected.items() if key != "R"}, FLOAT32)


def test_all_ranks_that_were_not_killed_came_to_their_end(results: Results) -> None:
    assert results.exit_codes == [0, -9, 0, -9]


# Who sees whose rows


@exchanges
def test_ranks_may_differ_in_the_type_of_their_rows(exchange: str, results: Results) -> None:
    expected = estimator().update(mixture(19)[0].half().float())
    for found in results(f"many types, {exchange}"):
        assert_state_close(found, expected)


@exchanges
def test_ranks_together_have_the_pairs_of_one_process(exchange: str, results: Results) -> None:
    wrapper = estimator(**LABELLED)
    for step in range(3):
        halves = [(*x.chunk(2), *labels.chunk(2)) for x, labels in shares(step, (6, 2, 0, 4))]
        first, second, labels_1, labels_2 = (torch.cat(parts) for parts in zip(*halves, strict=True))
        wrapper.update(torch.cat([first, second]), torch.cat([labels_1, labels_2]), views=2)
    for found in results(f"pairs, {exchange}"):
        assert_close(found, {key: wrapper.state_dict()[key] for key in ("n_pairs", "V", "squares")}, FLOAT32)


@ranks
def test_ranks_apart_have_stats_of_their_own(rank: int, results: Results) -> None:
    wrapper = estimator()
    for found, (step, sizes) in zip(results("apart")[rank], enumerate(SIZES), strict=True):
        assert bits(found["stats"]) == bits(wrapper.update(*shares(step, sizes)[rank]))


@ranks
def test_dtensor_of_rows_is_each_ranks_own_rows(rank: int, results: Results) -> None:
    own = mixture(19)[0].chunk(WORLD)[rank]
    assert bits(results("dtensors")[rank]["rows alone"]["stats"]) == bits(estimator().update(own))


@ranks
@pytest.mark.parametrize("case", ["rows together", "rows reduced", "labelled rows", "copies alone"])
def test_dtensor_together_or_replicated_is_all_rows(rank: int, case: str, results: Results) -> None:
    expected = estimator(**(LABELLED if case == "labelled rows" else {})).update(*mixture(19))
    assert_state_close(results("dtensors")[rank][case], expected)


@ranks
@pytest.mark.parametrize("case", ["columns alone", "columns together"])
def test_dtensor_of_columns_is_refused(rank: int, case: str, results: Results) -> None:
    refused = results("dtensors")[rank][case]
    assert (refused["error"], refused["unchanged"]) == ("ValueError", True)
    assert refused["message"].startswith("`embeddings` must be sharded by rows or replicated, got a DTensor")


def test_main_rank_needs_a_number_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "node-3")
    with pytest.raises(ValueError, match=r"^The environment variable RANK must be an integer, got 'node-3'; correct"):
        estimator().is_main  # noqa: B018
    assert estimator(is_main=True).is_main


def test_tracker_of_the_main_rank_alone_is_called(results: Results) -> None:
    assert results("tracked") == [[(0, True), (1, True), (2, True)], [], [], []]


# Faults


@exchanges
def test_rank_in_another_collective_is_named(exchange: str, results: Results) -> None:
    found = results(f"out of step, {exchange}")
    for rank in (0, 2, 3):
        assert (found[rank]["error"], found[rank]["unchanged"]) == ("RuntimeError", True)
        assert found[rank]["message"].startswith(
            "Ranks are out of step: rank 1 called another collective instead of `upd"
        )


def test_estimator_does_not_go_on_alone_when_its_group_is_gone(tmp_path: Path) -> None:
    method = f"file://{tmp_path / 'rendezvous'}"
    wrapper, alone = estimator(cross_rank=True), estimator()
    dist.init_process_group("gloo", init_method=method, rank=0, world_size=1)
    wrapper.update(mixture()[0])
    wrapper._mixture._was_together = True  # as if there had been another rank
    dist.destroy_process_group()
    with unchanged(wrapper), pytest.raises(RuntimeError, match=r"^The process group of earlier updates has been destr"):
        wrapper.update(mixture()[0])
    alone.load_state_dict(wrapper.state_dict())
    assert alone.update(mixture()[0])


@exchanges
@whens
@kinds
def test_fault_of_one_rank_is_one_line_that_names_it_on_all_and_changes_nothing(
    kind: str, when: str, exchange: str, results: Results
) -> None:
    refused = [found[-2] for found in results(f"{kind}, {when}, {exchange}")]
    assert len({(one["error"], one["message"]) for one in refused}) == 1
    message = refused[0]["message"]
    assert message.startswith(FOREIGN.get(kind, ("`embeddings` must ", "`labels` must ")))
    assert message.endswith("on rank 1.")
    assert "\n" not in message
    assert [one["unchanged"] for one in refused] == [True] * WORLD


@exchanges
@whens
@kinds
def test_next_update_after_a_fault_works(kind: str, when: str, exchange: str, results: Results) -> None:
    wrapper = estimator(**FAULTS[kind][0])
    if when == "later":
        wrapper.update(*mixture(19, seed=0))
    expected = wrapper.update(*mixture(19, seed=1))
    for found in results(f"{kind}, {when}, {exchange}"):
        assert_state_close(found[-1], expected)


@exchanges
def test_of_two_faults_all_raise_the_first(exchange: str, results: Results) -> None:
    for refused, accepted in results(f"two faults, {exchange}"):
        assert refused["message"].startswith("`embeddings` must have shape ")
        assert refused["message"].endswith("on rank 1.")
        assert_state_close(accepted, estimator().update(mixture(19, seed=1)[0]))


@exchanges
def test_bad_row_of_one_rank_raises_on_all_where_strict(exchange: str, results: Results) -> None:
    for refused, accepted in results(f"strict, {exchange}"):
        assert (refused["error"], refused["unchanged"]) == ("ValueError", True)
        assert refused["message"].startswith("`strict` is set, but 1 of 19 rows were ignored (NaN")
        assert_state_close(accepted, estimator().update(mixture(19)[0]))


@exchanges
@pytest.mark.parametrize("option", OTHER_OPTIONS)
def test_other_options_on_one_rank_raise_on_all(option: str, exchange: str, results: Results) -> None:
    for refused in results(f"other {option}, {exchange}"):
        assert (refused.get("error"), refused.get("unchanged")) == ("ValueError", True)
        assert refused["message"].startswith(
            "`update` must be called on every rank with the same `step`, `views`, options"
        )
        assert "on rank 2" in refused["message"]


@exchanges
@pytest.mark.parametrize("what", LOADED)
def test_state_dict_must_be_loaded_by_all_ranks(what: str, exchange: str, results: Results) -> None:
    wrapper = estimator()
    wrapper.update(*mixture(30, seed=7))
    expected = wrapper.update(*mixture(19, seed=1))
    for refused, accepted in results(f"loaded {what}, {exchange}"):
        assert (refused.get("error"), refused.get("unchanged")) == ("ValueError", True)
        assert refused["message"].endswith("but one of these differs on rank 2.")
        assert_state_close(accepted, expected)


@pytest.mark.parametrize(("rank", "exchange"), [(0, "gather"), (2, "reduce")])
def test_rank_whose_peer_is_killed_raises_in_time(rank: int, exchange: str, results: Results) -> None:
    (left,) = results("killed", (rank,))
    assert left["error"] == "RuntimeError", left
    assert left["unchanged"]
    assert left["seconds"] < FEW.total_seconds() + 2


# Files


def test_only_the_main_rank_leaves_files(results: Results) -> None:
    assert sorted(path.name for path in results.folder.glob("run*")) == ["run", "run_of_0"]


# Process groups


@exchanges
@ranks
def test_group_of_ranks_has_a_mixture_of_its_own(rank: int, exchange: str, results: Results) -> None:
    wrapper, first = estimator(), rank // 2 * 2
    for step, found in enumerate(results(f"groups, {exchange}")[rank]):
        x = torch.cat([x for x, _ in shares(step)[first : first + 2]])
        assert_state_close(found, wrapper.update(x))


@exchanges
def test_rank_outside_of_its_group_is_refused_and_the_others_go_on(exchange: str, results: Results) -> None:
    found = results(f"outside, {exchange}")
    for refused in found[:2]:
        assert (refused["error"], refused["unchanged"]) == ("ValueError", True)
        assert refused["message"].startswith("`process_group` does not include this process")
    x = torch.cat([x for x, _ in shares(0)[2:]])
    for accepted in found[2:]:
        assert_state_close(accepted, estimator().update(x))


# Checkpoints and training


@exchanges
@pytest.mark.parametrize("world", [1, 3])
def test_run_of_two_ranks_resumes_on_another_number(world: int, exchange: str, results: Results) -> None:
    wrapper = estimator()
    expected = [wrapper.update(mixture(19, seed=step)[0]) for step in range(6)][3:]
    for rank in results(f"resumed on {world}, {exchange}", range(world)):
        for found, wanted in zip(rank, expected, strict=True):
            assert_state_close(found, wanted)


def test_training_in_parallel_ends_in_the_same_bits(results: Results) -> None:
    found = results("data parallel", (0, 1))
    for ends in found:
        assert bits(ends["with"]) == bits(ends["without"])
        assert [*ends["with"]] == [f"module.layers.{n}.{name}" for n in (0, 2) for name in ("weight", "bias")]
    assert found[0]["state"] == found[1]["state"]


def test_distributed_checkpoint_of_two_ranks_goes_on_in_the_same_bits(results: Results) -> None:
    for ends in results("distributed checkpoint", (0, 1)):
        assert ends["with"] == ends["without"]


# Ranks that reduce and do not wait for one another, as on GPUs


@ranks
def test_fault_that_nobody_has_seen_changes_nothing(rank: int, results: Results) -> None:
    found = results("unseen fault")[rank]
    assert bits({key: found[2]["stats"][key] for key in ("pi", "mu", "Sigma")}) == bits(
        {key: found[1]["stats"][key] for key in ("pi", "mu", "Sigma")}
    )
    assert not found[2]["stats"]["R"].any()


def test_fault_that_nobody_has_seen_is_raised_on_all_at_the_next_update(results: Results) -> None:
    found = [steps[3] for steps in results("unseen fault")]
    assert [refused["error"] for refused in found] == ["ValueError"] * WORLD
    assert found[1]["message"].startswith("`embeddings` must have shape (N, 4), got (3, 3)")
    assert all("Rank 1 refused its batch" in found[other]["message"] for other in (0, 2, 3))


@ranks
def test_state_that_one_rank_has_loaded_unseen_is_never_mixed_with_others(rank: int, results: Results) -> None:
    found = results("unseen loaded")[rank]
    assert [step.get("error") for step in found] == [None, None, None, "ValueError", None, "ValueError"]
    assert not found[4]["stats"]["R"].any()


# Odd steps, and memory that runs out


@exchanges
@pytest.mark.parametrize("kind", STEPS)
def test_step_that_is_none_raises_the_same_on_all(kind: str, exchange: str, results: Results) -> None:
    found = results(f"odd step {kind}, {exchange}")
    assert len({(steps[1]["error"], steps[1]["message"]) for steps in found}) == 1
    assert found[0][1]["message"].endswith("on rank 1.")
    assert [("stats" in steps[0], "stats" in steps[2]) for steps in found] == [(True, True)] * WORLD


@exchanges
def test_batch_for_which_one_rank_has_no_memory_counts_on_none(exchange: str, results: Results) -> None:
    wrapper = estimator()
    for step in (0, 2):
        stats = wrapper.update(*mixture(19, seed=step))
    for found in results(f"scarce before, {exchange}"):
        assert not found[1]["stats"]["R"].any()
        assert_state_close(found[2], stats)


@exchanges
def test_rank_whose_memory_runs_out_after_an_exchange_is_never_left_behind_in_silence(
    exchange: str, results: Results
) -> None:
    found = results(f"scarce after, {exchange}")
    assert [steps[1].get("error") for steps in found] == [None, "RuntimeError", None, None]
    assert "in the middle of an exchange" in found[1][1]["message"]
    assert [steps[2].get("error") for steps in found] == ["ValueError"] * WORLD
