"""Ranks that gather, ranks that reduce, and one process come to the same; and what goes between them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tolerances import FLOAT32
from tests.update.matrix import CASES, COMBINATIONS, EXCHANGES, SCENARIOS, WORLDS, alone, name, sizes
from tests.update.ranks import Results, start
from tests.wrapper.samples import assert_close, bits

KEYS = ("pi", "mu", "Sigma", "B", "trace_B", "opnorm_B", "n_ignored", "n_relocated")
ENTRIES = 6  # numbers that every rank tells all others before an update

Found = list[dict[tuple[int, str], list[dict[str, Any]]]]  # of each rank, by combination and exchange, call by call


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return start(tmp_path_factory.mktemp("ranks"), CASES)


@pytest.fixture(params=[(scenario, world) for scenario in SCENARIOS for world in WORLDS], ids=lambda p: name(*p))
def case(request: pytest.FixtureRequest, results: Results) -> tuple[str, int, Found]:
    scenario, world = request.param
    return scenario, world, results(name(scenario, world), range(world))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_ranks_together_have_the_stats_of_one_process(exchange: str, case: tuple[str, int, Found]) -> None:
    scenario, _, found = case
    for combination in range(len(COMBINATIONS)):
        for n, expected in enumerate(alone(scenario, combination)):
            for rank in found:
                stats = rank[combination, exchange][n]["stats"]
                assert_close(stats, {key: expected[key] for key in KEYS}, FLOAT32)


def test_ranks_that_gather_have_all_of_R(case: tuple[str, int, Found]) -> None:
    scenario, _, found = case
    for combination in range(len(COMBINATIONS)):
        for n, expected in enumerate(alone(scenario, combination)):
            for rank in found:
                assert torch.equal(rank[combination, "gather"][n]["stats"]["R"], expected["R"])


def test_ranks_that_reduce_have_their_own_rows_of_R(case: tuple[str, int, Found]) -> None:
    scenario, world, found = case
    for combination in range(len(COMBINATIONS)):
        for n, expected in enumerate(alone(scenario, combination)):
            own = expected["R"].split(sizes(SCENARIOS[scenario][1][n], n, world))
            for rank, R in zip(found, own, strict=True):
                assert torch.equal(rank[combination, "reduce"][n]["stats"]["R"], R)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_ranks_together_agree_to_the_bit(exchange: str, case: tuple[str, int, Found]) -> None:
    _, _, found = case
    for combination in range(len(COMBINATIONS)):
        first, *others = ([_shared(call["stats"]) for call in rank[combination, exchange]] for rank in found)
        assert others == [first] * len(others)


def _shared(stats: dict[str, Tensor]) -> dict[str, Any]:
    return bits({key: value for key, value in stats.items() if key != "R"})


def test_scenario_of_a_dead_component_moves_it() -> None:
    moved = [sum(int(stats["n_relocated"]) for stats in alone("dead", n)) for n in range(len(COMBINATIONS))]
    assert [n for n, count in enumerate(moved) if count] == [
        COMBINATIONS.index({"assigner": "kmeans_online", "mode": "ema"})
    ]


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("scenario", ["uneven", "empty batches", "dead", "unusable rows"])
def test_ranks_that_reduce_send_sums_alone(scenario: str, world: int, results: Results) -> None:
    K, D = 3, 4
    _, parts = SCENARIOS[scenario]
    for rank in results(name(scenario, world), range(world)):
        for combination, choices in enumerate(COMBINATIONS):
            for n, (part, call) in enumerate(zip(parts, rank[combination, "reduce"], strict=True)):
                iterations = 1 if "label_supervised" in choices.values() else 2
                sent = ENTRIES + iterations * K * (1 + D) + K * D * (D + 1) // 2 + 2
                if n == 0 and "label_supervised" not in choices.values():
                    sent += max(sizes(part, n, world)) * D  # of which the first means come
                assert call["sent"] == sent


@pytest.mark.parametrize("world", WORLDS[1:])
def test_ranks_that_gather_send_their_rows_once(world: int, results: Results) -> None:
    _, parts = SCENARIOS["uneven"]
    for rank in results(name("uneven", world), range(world)):
        for combination, choices in enumerate(COMBINATIONS):
            each = 4 + ("label_supervised" in choices.values())
            sent = [ENTRIES + max(sizes(part, n, world)) * each for n, part in enumerate(parts)]
            assert [call["sent"] for call in rank[combination, "gather"]] == sent


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_rank_that_is_alone_sends_nothing(scenario: str, results: Results) -> None:
    (only,) = results(name(scenario, 1), range(1))
    assert {call["sent"] for calls in only.values() for call in calls} == {0}
