"""`python -m benchmarks`: measures, prints one table per theme, and keeps a page per hardware."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import bench_growth, bench_memory, bench_step, bench_syncs, bench_training, pages
from benchmarks.cases import Settings

THEMES = {
    "step": bench_step,
    "growth": bench_growth,
    "memory": bench_memory,
    "syncs": bench_syncs,
    "training": bench_training,
}
RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for.

    Args:
        arguments: The words after `python -m benchmarks`; None takes them from the process.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("`--device cuda` needs a GPU that torch can see, got none.")
    if options.out is None:  # a page of real results is not to be replaced by a trial
        options.out = Path(tempfile.mkdtemp(prefix="benchmarks-")) if options.quick else RESULTS
    # As the estimator computes: a product in TF32 would be no yardstick for one in float32.
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    titles = [module.TITLE for module in THEMES.values()]
    for device in _devices(options.device):
        settings = Settings(device, options.quick, options.training_seconds)
        print(f"# {pages.device_name(device)}\n", flush=True)
        for theme in options.themes:
            module = THEMES[theme]
            tables = module.tables(settings)
            command = " ".join(["python -m benchmarks", *_without_out(words)])
            text = pages.save_theme(options.out, device, module.TITLE, tables, order=titles, command=command)
            print(text + "\n", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, parents=[_out()])
    parser.add_argument("--themes", nargs="+", choices=THEMES, default=list(THEMES), help="all of them without it")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="without it the CPU, and CUDA if present")
    parser.add_argument("--quick", action="store_true", help="few repetitions at small sizes, to see that it runs")
    parser.add_argument("--training-seconds", type=float, default=30.0, help="per configuration of the training theme")
    return parser


def _out() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--out", type=Path, help="folder for the pages; without it benchmarks/results, and a temporary one with --quick"
    )
    return parser


def _devices(name: str | None) -> list[torch.device]:
    names = [name] if name else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [torch.device(name) for name in names]


def _without_out(words: Sequence[str]) -> list[str]:
    """The command line but for where the page goes, which is a path of one machine."""
    return _out().parse_known_args(words)[1]


if __name__ == "__main__":
    main()
