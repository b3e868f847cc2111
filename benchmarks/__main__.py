"""`python -m benchmarks`: measures the estimator, prints tables, and updates one page per device."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import bench_growth, bench_memory, bench_step, bench_syncs, bench_training, pages
from benchmarks.cases import Settings
from benchmarks.failures import bench as failures

THEMES = {
    "step": bench_step,
    "growth": bench_growth,
    "memory": bench_memory,
    "syncs": bench_syncs,
    "training": bench_training,
}
FAILURES = "failures"  # takes more than an hour, and has a page of its own
RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the themes that the command line names.

    Args:
        arguments: The words after `python -m benchmarks`; None takes them from the process.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("`--device cuda` needs a GPU, but torch sees none.")
    if options.out is None:  # a trial must not replace a page of real results
        options.out = Path(tempfile.mkdtemp(prefix="benchmarks-")) if options.quick else RESULTS
    for folder in filter(None, (options.out, options.runs)):  # before anything is measured
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"`{folder}` cannot be made a folder: {error.strerror}.")
    # The estimator computes in full float32; a product in TF32 would be an unfair yardstick.
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    titles = [module.TITLE for module in THEMES.values()]
    command = " ".join(["python -m benchmarks", *_without_paths(words)])
    if FAILURES in options.themes:
        options.themes.remove(FAILURES)
        print(failures.save(options.out, options.runs, quick=options.quick, command=command) + "\n", flush=True)
    for device in _devices(options.device) if options.themes else ():
        settings = Settings(device, options.quick, options.training_seconds)
        print(f"# {pages.device_name(device)}\n", flush=True)
        for theme in options.themes:
            module = THEMES[theme]
            tables = module.tables(settings)
            text = pages.save_theme(options.out, device, module.TITLE, tables, order=titles, command=command)
            print(text + "\n", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, parents=[_paths()])
    parser.add_argument(
        "--themes", nargs="+", choices=[*THEMES, FAILURES], default=list(THEMES), help="default: all but failures"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the CPU, and CUDA if present")
    parser.add_argument("--quick", action="store_true", help="a short trial at small sizes")
    parser.add_argument(
        "--training-seconds", type=float, default=30.0, help="per configuration of the training theme; default: 30"
    )
    return parser


def _paths() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--out", type=Path, help="folder for the pages; default: benchmarks/results, or a temporary folder with --quick"
    )
    parser.add_argument(
        "--runs", type=Path, help="folder of the runs of the failures theme; those that are there are not made again"
    )
    return parser


def _devices(name: str | None) -> list[torch.device]:
    names = [name] if name else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [torch.device(name) for name in names]


def _without_paths(words: Sequence[str]) -> list[str]:
    """Returns the command line without paths, which are of one machine."""
    return _paths().parse_known_args(words)[1]


if __name__ == "__main__":
    main()
