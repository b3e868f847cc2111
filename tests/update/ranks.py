"""Real gloo processes for tests: four of them go through the same cases in the same order, results into files."""

import os
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import get_context
from torch.utils._pytree import tree_map

from mixture_torch import MixtureStats
from tests.wrapper.samples import all_bits, update_quietly

WORLD = 4
PATIENCE = timedelta(seconds=10)  # after which a rank that is left waiting gives up, for good
LIMIT = 90.0  # seconds for all cases


class Here(NamedTuple):
    """Where a case runs."""

    rank: int
    folder: Path
    groups: dict[tuple[int, ...], Any]  # by the ranks in them; the default one is None

    def group(self, *ranks: int) -> Any:
        """The process group of these ranks."""
        return self.groups[ranks]


Case = Callable[[Here], Any]


def attempt(wrapper: MixtureStats, *batch: Any, step: Any = None) -> dict[str, Any]:
    """Updates, and says what came of it."""
    before = all_bits(wrapper)
    try:
        return {"stats": update_quietly(wrapper, *batch, step=step)}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error), "unchanged": all_bits(wrapper) == before}


def run_cases(rank: int, folder: Path, cases: dict[str, Case]) -> None:
    """Goes through the cases on one rank."""
    torch.set_num_threads(1)
    method = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=WORLD, timeout=PATIENCE)
    of_first = {tuple(range(world)): dist.new_group(range(world), timeout=PATIENCE) for world in range(1, WORLD)}
    last_two = dist.new_group([2, 3], timeout=PATIENCE)
    here = Here(rank, folder, {**of_first, (2, 3): last_two, tuple(range(WORLD)): None})
    (folder / "results").mkdir(exist_ok=True)
    for name, case in cases.items():
        try:
            result = case(here)
        except Exception as error:
            result = f"rank {rank}, {name}: {error!r}"
        path = folder / "results" / f"{name} {rank}"
        path.write_bytes(
            pickle.dumps(tree_map(lambda leaf: leaf.numpy() if isinstance(leaf, Tensor) else leaf, result))
        )
    dist.destroy_process_group()


class Results:
    """What the ranks came to.

    Args:
        folder: Where they worked.
        exit_codes: Theirs.
    """

    def __init__(self, folder: Path, exit_codes: list[int | None]) -> None:
        self.folder, self.exit_codes = folder, exit_codes

    def __call__(self, case: str, ranks: range | tuple[int, ...] = range(WORLD)) -> list[Any]:
        """Returns the results of a case on these ranks."""
        paths = [self.folder / "results" / f"{case} {rank}" for rank in ranks]
        missing = [path.name for path in paths if not path.exists()]
        assert not missing, f"never ended: {missing}"
        results = [pickle.loads(path.read_bytes()) for path in paths]
        failed = [result for result in results if isinstance(result, str)]
        assert not failed, failed
        return [tree_map(_as_tensor, result) for result in results]


def _as_tensor(leaf: Any) -> Any:
    return torch.from_numpy(leaf) if hasattr(leaf, "__array__") else leaf


def start(folder: Path, cases: dict[str, Case]) -> Results:
    """Returns the results of all cases, from processes that have all ended, at the limit at the latest."""
    if not dist.is_gloo_available():
        pytest.skip("needs gloo")
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.update.cases"])  # so that torch is imported once
    processes = [context.Process(target=run_cases, args=(rank, folder, cases)) for rank in range(WORLD)]
    deadline = time.monotonic() + LIMIT
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return Results(folder, [process.exitcode for process in processes])


def kill_in_collective(n: int) -> None:
    """Lets this process be killed in place of its n-th collective from now on."""
    left = iter(range(n))

    def instead(original: Any) -> Any:
        def collective(*arguments: Any, **options: Any) -> Any:
            if next(left) == n - 1:
                os.kill(os.getpid(), 9)
            return original(*arguments, **options)

        return collective

    dist.all_gather, dist.all_reduce = instead(dist.all_gather), instead(dist.all_reduce)
