"""How often a step waits for the GPU."""

import warnings

import torch

from benchmarks import cases
from benchmarks.cases import COMPILED, ESTIMATOR, READ, TEXTBOOK, Run, Settings, Size
from benchmarks.pages import NONE, Table
from benchmarks.timing import warm_up

TITLE = "Syncs"
SIZE = Size(4096, 128, 8)
STEPS = 100


def tables(settings: Settings) -> list[Table]:
    """Returns one table, or a sentence if there is no GPU."""
    title = f"Syncs per step over {STEPS} steps"
    if settings.device.type != "cuda":
        return [Table(title=title, remarks=("Not applicable: on a CPU there is nothing to wait for.",))]
    names = (ESTIMATOR, READ, COMPILED, TEXTBOOK)
    with cases.competitors(SIZE, names, device=settings.device) as runs:
        warm_up(runs, steps=settings.warmups)
        rows = [(name, f"{syncs(run):g}", NONE if name == TEXTBOOK else outcome(run)) for name, run in runs.items()]
    return [
        Table(
            title=title,
            header=("what", "syncs per step", 'under `set_sync_debug_mode("error")`'),
            rows=tuple(rows),
            remarks=(
                "As torch counts them: each copy to the host that is waited for. A wait for an event, such as that for "
                "the row of the step before, is not among them.",
            ),
        )
    ]


def syncs(run: Run) -> float:
    """Returns the number of synchronising operations per call, as torch counts them."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(STEPS):
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught) / STEPS


def outcome(run: Run) -> str:
    """Returns "runs", or the error of torch if an operation synchronises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(STEPS):
            run()
    except RuntimeError as error:
        return f"raises: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "runs"
