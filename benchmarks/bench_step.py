"""A step of the estimator against x.T @ x, the textbook's formulas, and scikit-learn."""

import os

import torch

from benchmarks import cases
from benchmarks.cases import COMPILED, ESTIMATOR, PRODUCT, READ, SCIKIT_LEARN, TEXTBOOK, Settings, Size
from benchmarks.pages import NONE, Table, milliseconds, ratio
from benchmarks.timing import STEPS_BETWEEN_EVENTS, gpu_medians, host_medians, minima, threads, warm_up

TITLE = "A step against others"
SIZE = ("N", "D", "K")


def tables(settings: Settings) -> list[Table]:
    """Returns one table per number of threads on CPU, and one on CUDA."""
    if settings.device.type == "cuda":
        return [_on_cuda(settings)]
    counts = [1, 2] if (os.cpu_count() or 1) > 1 else [1]
    return [_on_cpu(settings, count) for count in counts]


def _on_cpu(settings: Settings, count: int) -> Table:
    with threads(count):
        rows = [_cpu_row(settings, size) for size in _sizes(settings, cases.CPU_SIZES)]
    times = f"{PRODUCT}, ms", f"{ESTIMATOR}, ms", f"{READ}, ms", f"{TEXTBOOK}, ms", f"{SCIKIT_LEARN}, ms"
    ratios = f"times {PRODUCT}", f"{TEXTBOOK} / ours", f"{SCIKIT_LEARN} / ours"
    return Table(
        title="One thread" if count == 1 else f"{count} threads",
        header=(*SIZE, *times, *ratios),
        rows=tuple(rows),
        remarks=(f"Minima over {settings.rounds} interleaved rounds. Ratios are of `{ESTIMATOR}`.",),
    )


def _cpu_row(settings: Settings, size: Size) -> tuple[str, ...]:
    names = (PRODUCT, ESTIMATOR, READ, TEXTBOOK, SCIKIT_LEARN)
    with cases.competitors(size, names, device=settings.device) as runs:
        warm_up(runs, steps=settings.warmups)
        seconds = minima(runs, rounds=settings.rounds)
    ours = seconds[ESTIMATOR]
    times = [milliseconds(seconds.get(name)) for name in names]
    others = [ratio(seconds.get(name), ours) for name in (TEXTBOOK, SCIKIT_LEARN)]
    return (*map(str, size), *times, ratio(ours, seconds[PRODUCT]), *others)


def _on_cuda(settings: Settings) -> Table:
    rows = [row for size in _sizes(settings, cases.CUDA_SIZES) for row in _cuda_rows(settings, size)]
    return Table(
        title="GPU and host time",
        header=(
            *SIZE,
            "what",
            "GPU, ms",
            f"times {PRODUCT}",
            "times faster than textbook",
            "host, ms",
            "host at once, ms",
        ),
        rows=tuple(rows),
        remarks=(
            f"Medians over {settings.rounds} interleaved rounds. GPU: time per step between events around 20 steps; if "
            "the host is slower than the GPU, this is the host's time. Host: time per step of the same 20 steps by the "
            "clock, from an idle GPU to the return of the last call; if the GPU is slower, this is the GPU's time, "
            "because each row waits for the previous step. Host at once: one step after a wait for the GPU, after "
            "which a host wakes up slowly.",
            "A dash: the differences between all rows and all means would take more than 2 GB.",
        ),
    )


def _cuda_rows(settings: Settings, size: Size) -> list[tuple[str, ...]]:
    names = (PRODUCT, ESTIMATOR, READ, COMPILED, TEXTBOOK)
    with cases.competitors(size, names, device=settings.device) as runs:
        warm_up(runs, steps=settings.warmups)
        gpu = gpu_medians(runs, rounds=settings.rounds)
        host = host_medians(runs, rounds=settings.rounds, calls=STEPS_BETWEEN_EVENTS)
        at_once = host_medians(runs, rounds=settings.rounds, calls=1)
    torch.cuda.empty_cache()
    rows = []
    for name in names:
        seconds, textbook = gpu.get(name), gpu.get(TEXTBOOK)
        faster = NONE if name in (PRODUCT, TEXTBOOK) else ratio(textbook, seconds)
        hosts = milliseconds(host.get(name)), milliseconds(at_once.get(name))
        rows.append((*map(str, size), name, milliseconds(seconds), ratio(seconds, gpu[PRODUCT]), faster, *hosts))
    return rows


def _sizes(settings: Settings, sizes: tuple[Size, ...]) -> tuple[Size, ...]:
    return cases.QUICK_SIZES if settings.quick else sizes
