"""What ranks do beside the matrix: files, odd types, faults of some of them, groups of their own, a rank that dies."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixture_core import sharded
from mixture_torch import MixtureStats
from mixture_torch.update import mixture as update_wing
from mixture_torch.update.arrivals import Report
from mixture_torch.update.mixture import Mixture, Updated
from mixture_torch.update.ranks import Ranks
from tests.update.matrix import EXCHANGES
from tests.update.ranks import WORLD, Case, Here, attempt, kill_in_collective
from tests.wrapper.samples import all_bits, estimator, mixture

NAN = float("nan")
LABELLED = {"assigner": "label_supervised"}
SIZES = [
    (7, 0, 12, 0),
    (0, 12, 0, 7),
    (12, 7, 0, 3),
    (0, 0, 19, 0),
    (5, 5, 5, 5),
]  # rows per rank of successive batches
WHEN = ("first", "later")
LOADED = (*WHEN, "another")
FEW = timedelta(seconds=5)  # after which the ranks around one that was killed give up, if nothing told them


def shares(step: int, sizes: tuple[int, ...] = (7, 3, 5, 4)) -> list[tuple[Tensor, Tensor]]:
    """Each rank's batch of a step."""
    x, labels = mixture(sum(sizes), seed=step)
    return list(zip(x.split(sizes), labels.split(sizes), strict=True))


def of_many_types(here: Here, exchange: str) -> dict[str, Any]:
    x, labels = shares(0)[here.rank]
    x = x.half().float()
    return attempt(estimator(cross_rank=exchange), [x.half(), x.double(), x.numpy(), x][here.rank], labels)


def apart(here: Here) -> list[dict[str, Any]]:
    wrapper = estimator(cross_rank=False)
    return [attempt(wrapper, *shares(step, sizes)[here.rank]) for step, sizes in enumerate(SIZES)]


def pairs_of_views(here: Here, exchange: str) -> dict[str, Any]:
    wrapper = estimator(cross_rank=exchange, **LABELLED)
    for step in range(3):
        x, labels = shares(step, (6, 2, 0, 4))[here.rank]
        wrapper.update(x, labels, views=2)
    return wrapper.state_dict()


def strict_with_a_bad_row(here: Here, exchange: str) -> list[dict[str, Any]]:
    wrapper = estimator(cross_rank=exchange, strict=True)
    x, labels = shares(0)[here.rank]
    bad = x.clone()
    if here.rank == 2:
        bad[3] = NAN
    return [attempt(wrapper, batch, labels) for batch in (bad, x)]


def unseen(here: Here, what: str) -> list[dict[str, Any]]:
    """A fault of rank 1, or a state_dict that it has loaded alone, where ranks reduce and do not wait for entries."""
    commit = Mixture._commit

    def with_report(*arguments: Any, **options: Any) -> Updated:
        updated = commit(*arguments, **options)
        return updated._replace(report=Report.of(updated.stats, extra=False))

    with patch.object(Ranks, "on_gpu", True), patch.object(Mixture, "_commit", with_report):
        wrapper = estimator(cross_rank="reduce")
        steps = [attempt(wrapper, *shares(step)[here.rank]) for step in range(2)]
        if what == "loaded" and here.rank == 1:
            wrapper.load_state_dict(wrapper.state_dict())
        x, labels = shares(2)[here.rank]
        steps.append(attempt(wrapper, x[:, :3] if what == "fault" and here.rank == 1 else x, labels))
        return steps + [attempt(wrapper, *shares(step)[here.rank]) for step in range(3, 6)]


# Faults


class Unreadable:
    """What no conversion expects."""

    def __array__(self, *_: Any) -> Any:
        raise RuntimeError("the rows are gone")


class Unspeakable(Exception):
    """What cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("nor say why")


class Raising:
    """Embeddings, or a step, that raise something as soon as anybody looks at them."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __array__(self, *_: Any) -> Any:
        raise self.error

    def __index__(self) -> int:
        raise self.error

    def __eq__(self, other: object) -> bool:
        raise self.error

    def __repr__(self) -> str:
        raise self.error


class Touchy(Tensor):
    """A tensor that nobody may touch."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise RuntimeError("hands off")


Spoil = Callable[[Tensor, Tensor], tuple[Any, Any]]
FAULTS: dict[str, tuple[dict[str, Any], Spoil]] = {
    "another width": ({}, lambda x, labels: (torch.cat([x, x], dim=1), labels)),
    "no labels": (LABELLED, lambda x, labels: (x, None)),
    "a label of K": (LABELLED, lambda x, labels: (x, labels + 3)),
    "an error that cannot be said": ({}, lambda x, labels: (Raising(Unspeakable()), labels)),
    "an error in no encoding": ({}, lambda x, labels: (Raising(ValueError("`embeddings` must \udcff")), labels)),
    "a subclass that raises": ({}, lambda x, labels: (x.as_subclass(Touchy), labels)),
    "unreadable": ({}, lambda x, labels: (Unreadable(), labels)),
}


def fault(here: Here, kind: str, exchange: str, when: str) -> list[dict[str, Any]]:
    """Rank 1 has a wrong batch, and all have a good one next; at the very first, or after an update."""
    options, spoil = FAULTS[kind]
    wrapper = estimator(cross_rank=exchange, **options)
    steps = [] if when == "first" else [attempt(wrapper, *shares(0)[here.rank])]
    batch = shares(1)[here.rank]
    return [*steps, attempt(wrapper, *(spoil(*batch) if here.rank == 1 else batch)), attempt(wrapper, *batch)]


STEPS: dict[str, Any] = {
    "an array": np.array([1, 2]),
    "a tensor": torch.tensor([1, 2]),
    "a number and a half": 1.5,
    "one that raises": Raising(RuntimeError("no step")),
}


def odd_step(here: Here, kind: str, exchange: str) -> list[dict[str, Any]]:
    """Rank 1 gives a `step` that is none."""
    wrapper = estimator(cross_rank=exchange)
    return [
        attempt(wrapper, *shares(n)[here.rank], step=STEPS[kind] if n == 1 and here.rank == 1 else n) for n in range(3)
    ]


def scarce(here: Here, exchange: str, when: str) -> list[dict[str, Any]]:
    """Memory runs out on rank 1, before ranks exchange or after it."""

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    wrapper = estimator(cross_rank=exchange)
    steps = [attempt(wrapper, *shares(0)[here.rank])]
    with ExitStack() as stack:
        if here.rank == 1:
            name = "receive" if when == "before" else "advance" if exchange == "gather" else "_with_scatter"
            stack.enter_context(patch.object(sharded if name == "_with_scatter" else update_wing, name, fail))
        steps.append(attempt(wrapper, *shares(1)[here.rank]))
    return [*steps, attempt(wrapper, *shares(2)[here.rank])]


def two_faults(here: Here, exchange: str) -> list[dict[str, Any]]:
    wrapper = estimator(cross_rank=exchange)
    x, labels = shares(1)[here.rank]
    bad = {1: x[:, 0], 3: Unreadable()}.get(here.rank, x)
    return [attempt(wrapper, batch, labels) for batch in (bad, x)]


OTHER_OPTIONS: dict[str, dict[str, Any]] = {
    "K": {"K": 4},
    "ema_decay": {"ema_decay": 0.9},
    "max_assign_iters": {"max_assign_iters": 3},
    "seed": {"seed": 1},
    "strict": {"strict": True},
    "exchange": {},
}


def other_options(here: Here, option: str, exchange: str) -> dict[str, Any]:
    """Rank 2 has made another estimator than the others."""
    odd = here.rank == 2
    if odd and option == "exchange":
        exchange = next(other for other in EXCHANGES if other != exchange)
    return attempt(estimator(cross_rank=exchange, **(OTHER_OPTIONS[option] if odd else {})), *shares(0)[here.rank])


def loaded(here: Here, exchange: str, what: str) -> list[dict[str, Any]]:
    """Rank 2 goes on from a state_dict, and the others do not, or from another one; until all have the same."""
    wrapper, sources = estimator(cross_rank=exchange), [estimator(), estimator()]
    for n, source in enumerate(sources):
        source.update(*mixture(30 + n, seed=7))
    if what != "first":
        wrapper.update(*shares(0)[here.rank])
    if here.rank == 2:
        wrapper.load_state_dict(sources[1].state_dict())
    elif what == "another":
        wrapper.load_state_dict(sources[0].state_dict())
    refused = attempt(wrapper, *shares(1)[here.rank])
    wrapper.load_state_dict(sources[0].state_dict())
    return [refused, attempt(wrapper, *shares(1)[here.rank])]


def killed(here: Here) -> dict[str, Any]:
    """Of two groups of two ranks the second rank dies in the middle of an update."""
    own = here.rank // 2
    groups = [dist.new_group([2 * n, 2 * n + 1], timeout=FEW) for n in range(2)]
    wrapper = estimator(cross_rank=EXCHANGES[own], process_group=groups[own])
    wrapper.update(*shares(0)[here.rank])
    if here.rank % 2:
        kill_in_collective(2)  # the first is that of the entries
    begin = time.monotonic()
    return {**attempt(wrapper, *shares(1)[here.rank]), "seconds": time.monotonic() - begin}


def out_of_step(here: Here, exchange: str) -> dict[str, Any]:
    """Rank 1 is in a collective of its own that looks like an update's."""
    if here.rank == 1:
        zeros = torch.zeros(6, dtype=torch.int64)
        dist.all_gather([zeros.clone() for _ in range(WORLD)], zeros)
        return {}
    return attempt(estimator(cross_rank=exchange), *shares(0)[here.rank])


# Files and groups


def files(here: Here, name: str | None) -> None:
    """Logs not knowing which rank is the main one, and flushes and closes on all of them."""
    log_dir = here.folder / (name or f"run_of_{here.rank}")
    with estimator(cross_rank=True, log_dir=log_dir, store_scores=True) as wrapper:
        for step, sizes in enumerate(SIZES):
            wrapper.update(*shares(step, sizes)[here.rank])
            wrapper.log_step(step=step, epoch=0)
        wrapper.flush()


def tracked(here: Here) -> list[tuple[int, bool]]:
    """The steps that two ranks' trackers get, and whether with the rows of both."""
    sent: list[tuple[int, bool]] = []
    if here.rank < 2:
        wrapper = estimator(
            cross_rank=True,
            process_group=here.group(0, 1),
            tracker=lambda scalars, step: sent.append((step, scalars["n_rows"] == 40)),
        )
        for step in range(3):
            wrapper.update(mixture(20, seed=step)[0])
            wrapper.log_step(step=step, epoch=0)
    return sent


def groups(here: Here, exchange: str) -> list[dict[str, Any]]:
    """Two groups of two ranks, each with a mixture and files of its own."""
    first = here.rank // 2 * 2
    group, log_dir = here.group(first, first + 1), here.folder / f"{exchange} of {first}"
    with estimator(cross_rank=exchange, process_group=group, log_dir=log_dir) as wrapper:
        found = []
        for step in range(3):
            found.append(attempt(wrapper, *shares(step)[here.rank]))
            wrapper.log_step(step=step, epoch=0)
    return found


def outside(here: Here, exchange: str) -> dict[str, Any]:
    wrapper = estimator(cross_rank=exchange, process_group=here.group(2, 3))
    return attempt(wrapper, *shares(0)[here.rank])


def resumed(here: Here, exchange: str, world: int) -> list[dict[str, Any]]:
    """Two ranks save, and another number of them goes on."""
    path = here.folder / f"{exchange} for {world}.pt"
    if here.rank < 2:
        wrapper = estimator(cross_rank=exchange, process_group=here.group(0, 1))
        for step in range(3):
            wrapper.update(*shares(step, (8, 11))[here.rank])
        if here.rank == 0:
            torch.save(wrapper.state_dict(), path)
    dist.barrier()
    if here.rank >= world:
        return []
    wrapper = estimator(cross_rank=exchange, process_group=here.group(*range(world)))
    wrapper.load_state_dict(torch.load(path))
    return [attempt(wrapper, *shares(step, (19 - 6 * (world - 1), 6, 6)[:world])[here.rank]) for step in range(3, 6)]


class Watched(nn.Module):
    """A model that holds an estimator and feeds it."""

    def __init__(self, wrapper: MixtureStats | None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 4))
        self.wrapper = wrapper

    def forward(self, x: Tensor) -> Tensor:
        """Returns embeddings."""
        z: Tensor = self.layers(x)
        if self.wrapper is not None:
            self.wrapper.update(z)
        return z


def data_parallel(here: Here) -> dict[str, Any]:
    if here.rank >= 2:
        return {}
    group, ends = here.group(0, 1), []
    for wrapper in (None, estimator(cross_rank="reduce", process_group=group)):
        torch.manual_seed(here.rank)
        model = nn.parallel.DistributedDataParallel(Watched(wrapper), process_group=group)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(10, 4)).square().mean().backward()
            optimizer.step()
        ends.append(model.state_dict())
    assert wrapper is not None
    return {"without": ends[0], "with": ends[1], "state": all_bits(wrapper)[0]}


def distributed_checkpoint(here: Here) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp

    if here.rank >= 2:
        return {}
    group, ends = here.group(0, 1), []
    for is_loaded in (False, True):
        together = estimator(dim=4, cross_rank="reduce", process_group=group)
        alone, name = estimator(dim=4), f"mixture of rank {here.rank}"
        states = {"mixture": together, name: alone}
        if is_loaded:
            dcp.load(states, checkpoint_id=here.folder / "dcp", process_group=group)
        for step in range(3 if is_loaded else 0, 6):
            if step == 3 and not is_loaded:
                dcp.save(states, checkpoint_id=here.folder / "dcp", process_group=group)
            for wrapper in states.values():
                wrapper.update(mixture(20, seed=10 * step + here.rank)[0])
        ends.append([all_bits(wrapper) for wrapper in states.values()])
    return {"without": ends[0], "with": ends[1]}


def dtensors(here: Here) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    x, labels = mixture(19)
    rows, columns, copies = (distribute_tensor(x, mesh, [place]) for place in (Shard(0), Shard(1), Replicate()))
    return {
        "rows alone": attempt(estimator(), rows),
        "rows together": attempt(estimator(cross_rank=True), rows),
        "rows reduced": attempt(estimator(cross_rank="reduce"), rows),
        "labelled rows": attempt(
            estimator(cross_rank=True, **LABELLED), rows, distribute_tensor(labels, mesh, [Shard(0)])
        ),
        "copies alone": attempt(estimator(), copies),
        "columns alone": attempt(estimator(), columns),
        "columns together": attempt(estimator(cross_rank=True), columns),
    }


CASES: dict[str, Case] = {
    "unseen fault": partial(unseen, what="fault"),
    "unseen loaded": partial(unseen, what="loaded"),
    "apart": apart,
    "one folder": partial(files, name="run"),
    "a folder each": partial(files, name=None),
    "tracked": tracked,
    "data parallel": data_parallel,
    "dtensors": dtensors,
    "distributed checkpoint": distributed_checkpoint,
}
for how in EXCHANGES:
    CASES |= {
        f"many types, {how}": partial(of_many_types, exchange=how),
        f"pairs, {how}": partial(pairs_of_views, exchange=how),
        f"strict, {how}": partial(strict_with_a_bad_row, exchange=how),
        f"two faults, {how}": partial(two_faults, exchange=how),
        **{f"odd step {kind}, {how}": partial(odd_step, kind=kind, exchange=how) for kind in STEPS},
        **{f"scarce {when}, {how}": partial(scarce, exchange=how, when=when) for when in ("before", "after")},
        f"out of step, {how}": partial(out_of_step, exchange=how),
        f"groups, {how}": partial(groups, exchange=how),
        f"outside, {how}": partial(outside, exchange=how),
        **{f"resumed on {world}, {how}": partial(resumed, exchange=how, world=world) for world in (1, 3)},
        **{f"other {option}, {how}": partial(other_options, option=option, exchange=how) for option in OTHER_OPTIONS},
        **{f"loaded {what}, {how}": partial(loaded, exchange=how, what=what) for what in LOADED},
        **{
            f"{kind}, {when}, {how}": partial(fault, kind=kind, exchange=how, when=when)
            for kind in FAULTS
            for when in WHEN
        },
    }
CASES["killed"] = killed  # after it nobody can be reached
