"""The peak memory of one update, beyond the memory in use before it."""

import multiprocessing
import re
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import Settings, Size
from benchmarks.pages import NONE, Table
from mixture_torch import MixtureStats

TITLE = "Peak memory"
SIZE, QUICK_SIZE = Size(8192, 2048, 64), Size(2048, 256, 8)
FLOAT32 = 4  # bytes
TIMES_X = 4  # the bar: batches that an update may take beyond the new state
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def tables(settings: Settings) -> list[Table]:
    """Returns one table: the peak while the caller holds the last statistics, and without them."""
    if settings.device.type == "cpu" and not CLEAR.exists():
        return [Table(title="Peak memory of one update", remarks=("Not measured: it takes Linux's /proc.",))]
    size = QUICK_SIZE if settings.quick else SIZE
    ways = [(held, compiled) for compiled in _compiled(settings) for held in (False, True)]
    rows = [_row(settings, size, held=held, compile=compiled) for held, compiled in ways]
    state, batch = _megabytes(_state_bytes(size)), _megabytes(_batch_bytes(size))
    return [
        Table(
            title=f"Peak memory of one update at N = {size.N}, D = {size.D}, K = {size.K}",
            header=("last statistics", "compiled", "peak, MB", "new state, MB", "beyond it, MB", "beyond it, times x"),
            rows=tuple(rows),
            remarks=(
                f"Peak memory of an update beyond the old state ({state} MB) and the batches ({batch} MB each). It "
                "includes the new state, whose memory is kept for the next step. "
                f"The bar is the new state and {TIMES_X} times x.",
                "On CUDA, memory that torch allocated; for compiled steps, memory that it reserved, which includes the "
                "graphs. On a CPU, resident memory of a separate process; it is less than the new state, because "
                "only its lower triangle is ever touched.",
            ),
        )
    ]


def _compiled(settings: Settings) -> list[bool]:
    return [False, True] if settings.device.type == "cuda" else [False]


def _row(settings: Settings, size: Size, *, held: bool, compile: bool) -> tuple[str, ...]:
    if settings.device.type == "cuda":
        peak = peak_on_cuda(size, held=held, compile=compile)
    else:
        peak = _in_a_process_of_its_own(size, held=held)
    beyond = peak - _state_bytes(size)
    times = f"{beyond / _batch_bytes(size):.2f}"
    figures = _megabytes(peak), _megabytes(_state_bytes(size)), _megabytes(beyond), times
    return ("held" if held else "not held", "yes" if compile else NONE, *figures)


def peak_on_cuda(size: Size, *, held: bool, compile: bool) -> int:
    """Returns the peak bytes of an estimator during an update, beyond one state.

    Args:
        size: N, D and K.
        held: Whether a variable holds the previous statistics.
        compile: Whether the estimator compiles its step.
    """
    device = torch.device("cuda")
    batches, _ = cases.draw(size, device=device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved() if compile else torch.cuda.memory_allocated()
    estimator = MixtureStats(K=size.K, enabled=True, compile=compile)
    kept = _settle(estimator, batches * 3, held=held)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    estimator.update(batches[-1])
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_reserved() if compile else torch.cuda.max_memory_allocated()
    peak = most - before - _state_bytes(size)
    del kept, estimator, batches
    torch.cuda.empty_cache()
    return peak


def peak_on_cpu(size: Size, held: bool) -> int:
    """Returns the peak resident bytes of an estimator during an update, beyond one state.

    Args:
        size: N, D and K.
        held: Whether a variable holds the previous statistics.
    """
    torch.set_num_threads(1)
    batches, _ = cases.draw(size, device=torch.device("cpu"))
    before = _status("VmRSS")
    estimator = MixtureStats(K=size.K, enabled=True)
    kept = _settle(estimator, batches, held=held)
    CLEAR.write_text("5")  # resets the peak to the present resident memory
    estimator.update(batches[-1])
    peak = _status("VmHWM") - before - _state_bytes(size)
    del kept
    return peak


def _settle(estimator: MixtureStats, batches: list[Tensor], *, held: bool) -> Mapping[str, Tensor] | None:
    stats = None
    for batch in batches:
        stats = estimator.update(batch)
    return stats if held else None


def _in_a_process_of_its_own(size: Size, *, held: bool) -> int:
    # Spawned: a forked process would start with the memory of this one.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(peak_on_cpu, size, held).result()


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert found is not None  # Linux always has it
    return int(found[1]) * 1024


def _state_bytes(size: Size) -> int:
    return FLOAT32 * size.K * (1 + size.D + size.D * size.D)


def _batch_bytes(size: Size) -> int:
    return FLOAT32 * size.N * size.D


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}"
