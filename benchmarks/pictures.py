"""`python -m benchmarks.pictures`: draws the two pictures with which README.md opens, from two runs of the demo."""

import argparse
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from mixture_torch.app.demo import MIXTURE, DemoConfig, prepare
from mixture_torch.report.figures import plot

FAULTS = {"healthy": "none", "class-gone": "class-gone"}  # by the name of the picture
PANELS = ("verdicts", "variance", "batch")
RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains a run for each picture and draws it.

    Args:
        arguments: The words after `python -m benchmarks.pictures`; None takes them from the process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: benchmarks/results")
    parser.add_argument("--epochs", type=int, default=DemoConfig().epochs, help="of each run; default: the demo's")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, fault in FAULTS.items():
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / name
            job = prepare(DemoConfig(epochs=options.epochs, fault=fault), MIXTURE, log_dir=run)
            deque(job.steps, maxlen=0)
            job.estimator.close()
            plot(run, panels=PANELS, columns=1).savefig(options.out / f"{name}.png", dpi=200)
        print(options.out / f"{name}.png", flush=True)


if __name__ == "__main__":
    main()
