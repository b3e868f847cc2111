"""Steps that have to come to the same on one process and on ranks that gather or reduce."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from tests.update.ranks import Case, Here
from tests.wrapper.samples import estimator, mixture, update_quietly

WORLDS = (1, 4)  # the first so many ranks together
EXCHANGES = ("gather", "reduce")
COMBINATIONS = [
    {"assigner": "kmeans_online", "mode": "ema"},
    {"assigner": "kmeans_online", "mode": "per_batch"},
    {"assigner": "label_supervised", "mode": "ema"},
    {"assigner": "kmeans_online", "mode": "label_supervised"},
]


class Part(NamedTuple):
    """What one call of `update` gets on all ranks together."""

    x: Tensor
    labels: Tensor
    step: Any = None
    without: bool = False  # whether one of the ranks has no row


def _parts(*sizes: int, steps: str | None = None, without: bool = False) -> list[Part]:
    tokens: Any = steps or [None] * len(sizes)
    return [Part(*mixture(N, seed=n), tokens[n], without) for n, N in enumerate(sizes)]


def _dead() -> list[Part]:
    """The third component loses its rows, and a window this short forgets it at once."""
    first, *others = _parts(60, 60, 60, 60, 60)
    return [first, *(Part(x[labels < 2], labels[labels < 2]) for x, labels, *_ in others)]


def _unusable() -> list[Part]:
    parts = _parts(30, 31, 32)
    for x, labels, *_ in parts:
        x[::5, 1] = float("nan")
        labels[3::7] = -100
    return parts


SCENARIOS: dict[str, tuple[dict[str, Any], list[Part]]] = {
    "uneven": ({}, _parts(30, 31, 29)),
    "empty batches": ({}, _parts(30, 31, 29, 24, without=True)),
    "all empty": ({}, _parts(0, 24, 0, 25)),
    "waiting": ({"K": 12}, _parts(17, 18, 19, 20)),
    "in parts": ({}, _parts(14, 15, 16, 17, 0, 18, steps="aabbbb")),
    "waiting in parts": ({"K": 12}, _parts(9, 10, 11, 12, 13, 14, 15, steps="aabbbcc")),
    "dead": ({"ema_decay": 0.05}, _dead()),
    "unusable rows": ({}, _unusable()),
}


def sizes(part: Part, n: int, world: int) -> list[int]:
    """How many rows each rank has of a part: more the later it is, and one of them perhaps none."""
    shares = [0 if part.without and world > 1 and rank == n % world else rank + 1 for rank in range(world)]
    rows = [len(part.x) * share // sum(shares) for share in shares]
    rows[shares.index(max(shares))] += len(part.x) - sum(rows)
    return rows


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts the numbers that this rank sends in collectives, one entry for each."""
    sent: list[int] = []
    gather, reduce = dist.all_gather, dist.all_reduce

    def all_gather(tensors: Any, tensor: Tensor, **options: Any) -> Any:
        sent.append(tensor.numel())
        return gather(tensors, tensor, **options)

    def all_reduce(tensor: Tensor, **options: Any) -> Any:
        sent.append(tensor.numel())
        return reduce(tensor, **options)

    dist.all_gather, dist.all_reduce = all_gather, all_reduce
    try:
        yield sent
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce


def name(scenario: str, world: int) -> str:
    """The case's."""
    return f"{scenario} on {world}"


def together(here: Here, scenario: str, world: int) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """What the first ranks come to, by combination and exchange."""
    if here.rank >= world:
        return {}
    options, parts = SCENARIOS[scenario]
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for combination, choices in enumerate(COMBINATIONS):
        for exchange in EXCHANGES:
            group = here.group(*range(world))
            wrapper = estimator(cross_rank=exchange, process_group=group, **{**choices, **options})
            found[combination, exchange] = []
            for n, part in enumerate(parts):
                x, labels = (rows.split(sizes(part, n, world))[here.rank] for rows in part[:2])
                with counted() as sent:
                    stats = update_quietly(wrapper, x, labels, step=part.step)
                found[combination, exchange].append({"stats": stats, "sent": sum(sent)})
    return found


@cache
def alone(scenario: str, combination: int) -> list[dict[str, Tensor]]:
    """What one process comes to that gets all rows."""
    options, parts = SCENARIOS[scenario]
    wrapper = estimator(**{**COMBINATIONS[combination], **options})
    return [update_quietly(wrapper, part.x, part.labels, step=part.step) for part in parts]


CASES: dict[str, Case] = {
    name(scenario, world): partial(together, scenario=scenario, world=world)
    for scenario in SCENARIOS
    for world in WORLDS
}
