"""What the ranks of test_distributed do: every case on every rank, in the same order, results into one file each."""

import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixture_torch import MixtureStats
from tests.wrapper.samples import all_bits, estimator, mixture

WORLD = 3
NAN = float("nan")
LABELLED = {"assigner": "label_supervised"}
SIZES = [(7, 0, 12), (0, 12, 7), (12, 7, 0), (0, 0, 19), (5, 5, 5)]  # rows per rank of successive batches
KINDS: dict[str, dict[str, Any]] = {
    "kmeans ema": {},
    "kmeans per_batch": {"mode": "per_batch"},
    "labels ema": LABELLED,
    "labels per_batch": {**LABELLED, "mode": "per_batch"},
    "labels alone": {"mode": "label_supervised"},
    "waiting": {"K": 12},  # 48 rows to start from: three batches
}


def shares(step: int, sizes: tuple[int, ...], **options: Any) -> list[tuple[Tensor, Tensor]]:
    """Each rank's batch of a step."""
    x, labels = mixture(sum(sizes), seed=step, **options)
    return list(zip(x.split(sizes), labels.split(sizes), strict=True))


def attempt(wrapper: MixtureStats, *batch: Any) -> dict[str, Any]:
    """Updates, and says what came of it."""
    before = all_bits(wrapper)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* rows ignored")
            stats = dict(wrapper.update(*batch))
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error), "unchanged": all_bits(wrapper) == before}
    return {"stats": stats}


def together(rank: int, folder: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    wrapper = estimator(cross_rank=True, **options)
    return [attempt(wrapper, *shares(step, sizes)[rank]) for step, sizes in enumerate(SIZES)]


def of_many_types(rank: int, folder: Path) -> dict[str, Any]:
    x, labels = shares(0, (7, 0, 12))[rank]
    x = x.half().float()
    return attempt(estimator(cross_rank=True), [x.half(), x.double(), x.numpy()][rank], labels)


def idle(rank: int, folder: Path) -> list[dict[str, Any]]:
    wrapper = estimator(cross_rank=True)
    nothing = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    return [attempt(wrapper, *batch) for batch in (nothing, shares(0, (7, 0, 12))[rank], nothing)]


def alone(rank: int, folder: Path) -> list[dict[str, Any]]:
    wrapper = estimator(cross_rank=False)
    return [attempt(wrapper, *shares(step, sizes)[rank]) for step, sizes in enumerate(SIZES)]


def one_bad_row(rank: int, folder: Path, strict: bool) -> list[dict[str, Any]]:
    wrapper = estimator(cross_rank=True, strict=strict)
    x, labels = shares(0, (7, 0, 12))[rank]
    bad = x.clone()
    if rank == 2:
        bad[3] = NAN
    return [attempt(wrapper, batch, labels) for batch in (bad, x)]


FAULTS: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], tuple[Any, Any]]]] = {
    "another width": ({}, lambda x, labels: (torch.cat([x, x], dim=1), labels)),
    "a vector": ({}, lambda x, labels: (x[:, 0], labels)),
    "complex": ({}, lambda x, labels: (x * 1j, labels)),
    "None": ({}, lambda x, labels: (None, labels)),
    "no labels": (LABELLED, lambda x, labels: (x, None)),
    "float labels": (LABELLED, lambda x, labels: (x, labels.float())),
    "short labels": (LABELLED, lambda x, labels: (x, labels[1:])),
    "a label of K": (LABELLED, lambda x, labels: (x, labels + 3)),
    "a label of -2": (LABELLED, lambda x, labels: (x, labels * 0 - 2)),
    "NumPy text": ({}, lambda x, labels: (x.numpy().astype(str), labels)),
    "no tensor of rows": ({}, lambda x, labels: (x.to_sparse(), labels)),
}


def fault(rank: int, folder: Path, name: str, first: bool) -> list[dict[str, Any]]:
    """Rank 1 has a wrong batch, and all have a good one next; at the very first, or after an update."""
    options, spoil = FAULTS[name]
    wrapper = estimator(cross_rank=True, **options)
    steps = [] if first else [attempt(wrapper, *shares(0, (7, 0, 12))[rank])]
    x, labels = shares(1, (6, 6, 7))[rank]
    wrong = spoil(x, labels) if rank == 1 else (x, labels)
    return [*steps, attempt(wrapper, *wrong), attempt(wrapper, x, labels)]


def files(rank: int, folder: Path, name: str) -> None:
    """Logs not knowing which rank is the main one, and flushes and closes on all of them."""
    with estimator(cross_rank=True, log_dir=folder / name, store_scores=True) as wrapper:
        for step, sizes in enumerate(SIZES):
            wrapper.update(*shares(step, sizes)[rank])
            wrapper.log_step(step=step, epoch=0)
        wrapper.flush()


def dtensors(rank: int, folder: Path) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    x, labels = mixture(19)
    rows, columns, copies = (distribute_tensor(x, mesh, [place]) for place in (Shard(0), Shard(1), Replicate()))
    return {
        "rows alone": attempt(estimator(), rows),
        "rows together": attempt(estimator(cross_rank=True), rows),
        "labelled rows": attempt(
            estimator(cross_rank=True, **LABELLED), rows, distribute_tensor(labels, mesh, [Shard(0)])
        ),
        "copies alone": attempt(estimator(), copies),
        "columns alone": attempt(estimator(), columns),
        "columns together": attempt(estimator(cross_rank=True), columns),
    }


Case = Callable[[int, Path], Any]
CASES: dict[str, Case] = {
    **{name: (lambda rank, folder, o=options: together(rank, folder, o)) for name, options in KINDS.items()},
    "many types": of_many_types,
    "idle": idle,
    "alone": alone,
    "one bad row": lambda rank, folder: one_bad_row(rank, folder, strict=False),
    "one bad row, strict": lambda rank, folder: one_bad_row(rank, folder, strict=True),
    "one folder": lambda rank, folder: files(rank, folder, "run"),
    "a folder each": lambda rank, folder: files(rank, folder, f"run_of_{rank}"),
    "dtensors": dtensors,
    **{
        f"{name}, {'first' if first else 'later'}": (lambda rank, folder, n=name, f=first: fault(rank, folder, n, f))
        for name in FAULTS
        for first in (True, False)
    },
}


def run_cases(rank: int, folder: Path) -> None:
    """Goes through all cases; a rank that is left waiting for the others gives up after ten seconds, for good."""
    torch.set_num_threads(1)
    method = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=WORLD, timeout=timedelta(seconds=10))
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        try:
            results[name] = case(rank, folder)
        except Exception as error:
            results[name] = f"rank {rank}, {name}: {error!r}"
        torch.save(results, folder / f"rank_{rank}.tmp")
        (folder / f"rank_{rank}.tmp").replace(folder / f"rank_{rank}.pt")  # whole, if another rank's end ends this one
    dist.destroy_process_group()
