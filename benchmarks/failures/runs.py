"""The runs of the benchmark: which there are, making those that are missing, and reading them."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import torch

from benchmarks.failures import data, methods
from benchmarks.failures.kinds import KINDS
from benchmarks.failures.training import Setting, Training
from mixture_torch.report.run import Run, read_run

HEALTHY = "healthy"
SEEDS, CALIBRATION_SEEDS = tuple(range(5)), (100, 101, 102)
OF_CALIBRATION = (HEALTHY, "one class gone", "three classes gone")


@attrs.frozen
class Lengths:
    """How many steps runs have."""

    healthy: int = 220
    onset: tuple[int, int] = (90, 120)  # a later fault begins at a random one of these steps
    after: int = 60  # steps after the onset
    from_start: int = 210  # of a run that is wrong from the start; the excess is computed every 100 steps


LENGTHS = {"digits": Lengths(), "fashion": Lengths(), "sentences": Lengths(210, (60, 80), 40)}
# The encoder of sentences is slow, so it goes through fewer faults.
OF_SENTENCES = (
    "no negatives", "temperature", "no augmentation", "learning rate", "one class gone", "three classes gone",
    "drifting classes", "unshuffled", "stronger augmentation",
)  # fmt: skip
CONTENT = "run.json"  # what the product does not write


@attrs.frozen
class Task:
    """Runs that share their steps until the onset.

    Attributes:
        setting: What is trained on what.
        seed: Of the runs.
        kinds: Names in `KINDS`, or `HEALTHY`.
    """

    setting: Setting
    seed: int
    kinds: tuple[str, ...]


@attrs.frozen(kw_only=True, eq=False)
class Record:
    """A run that was made.

    Attributes:
        setting: What was trained on what.
        seed: Of the run.
        kind: A name in `KINDS`, or `HEALTHY`.
        onset: First step of the change; 0 if it was there from the start, and the last step + 1 of a healthy run.
        holders: The component that held most samples of each class that is gone.
        run: Its folder, as the product reads it.
        others: Figures that others watch, by name, (T,) each.
        probes: `step` and the accuracies of the probes, by name, (P,) each.
    """

    setting: Setting
    seed: int
    kind: str
    onset: int
    holders: tuple[int, ...]
    run: Run
    others: dict[str, npt.NDArray[np.float64]]
    probes: dict[str, npt.NDArray[np.float64]]

    @property
    def is_calibration(self) -> bool:
        """Whether thresholds may be taken from it."""
        return self.seed in CALIBRATION_SEEDS


def tasks(*, quick: bool) -> list[Task]:
    """Returns all tasks, those of calibration first. In tested runs, encoders take turns with the seeds."""
    places = [(method, images, methods.ENCODERS) for method in methods.NAMES for images in ("digits", "fashion")]
    calibration, tested = [], []
    for method, samples, encoders in [*places, ("SimCLR", "sentences", ("transformer",))][: 1 if quick else None]:
        all_kinds = OF_SENTENCES if samples == "sentences" else KINDS
        kinds = (HEALTHY, *(name for name in all_kinds if method in KINDS[name].methods))
        for encoder in encoders:
            calibration += [Task(Setting(method, encoder, samples), seed, OF_CALIBRATION) for seed in CALIBRATION_SEEDS]
        for seed in SEEDS[: 2 if quick else None]:
            tested.append(Task(Setting(method, encoders[seed % len(encoders)], samples), seed, kinds))
    return calibration + sorted(tested, key=lambda task: task.seed)  # a part of the runs is one of every setting


def make(todo: Sequence[Task], folder: Path) -> Iterator[str]:
    """Makes the runs that are missing, two at a time, and yields a line for each task.

    Args:
        todo: The tasks.
        folder: Of all runs.
    """
    missing = [task for task in todo if any(not _folder(task, kind, folder).exists() for kind in task.kinds)]
    folder.mkdir(parents=True, exist_ok=True)
    for samples in sorted({task.setting.samples for task in missing}):
        data.load(samples)  # before anything is made: it fails if a package is not installed
    pool = ProcessPoolExecutor(2, get_context("spawn"))
    try:
        futures = [pool.submit(_make, task, folder) for task in missing]
        for number, (task, future) in enumerate(zip(missing, futures, strict=True), 1):
            future.result()
            yield f"{number} of {len(missing)}: {task.setting}, seed {task.seed}"
    finally:
        pool.shutdown(cancel_futures=True)


def read(todo: Sequence[Task], folder: Path) -> list[Record]:
    """Returns the runs of all tasks.

    Raises:
        ValueError: A run is damaged.
    """
    return [_read(task, kind, folder) for task in todo for kind in task.kinds]


def _folder(task: Task, kind: str, folder: Path) -> Path:
    return folder / str(task.setting) / str(task.seed) / kind.replace(" ", "-")


def _make(task: Task, folder: Path) -> None:
    torch.set_num_threads(1)
    lengths = LENGTHS[task.setting.samples]
    onset = int(np.random.default_rng(task.seed).integers(*lengths.onset))
    with tempfile.TemporaryDirectory(dir=folder, prefix="unfinished-") as unfinished:
        own = Path(unfinished)
        begun = Training(task.setting, task.seed, own / "begun")
        begun.run(onset)
        begun.estimator.close()
        state = begun.state_dict()
        for kind in task.kinds:
            target = _folder(task, kind, folder)
            if target.exists():
                continue
            is_late = kind == HEALTHY or not KINDS[kind].from_start
            if is_late:
                shutil.copytree(own / "begun", own / target.name)
            run = Training(task.setting, task.seed, own / target.name)
            if is_late:
                run.load_state_dict(state)
            if kind != HEALTHY:
                KINDS[kind].begin(run)
            holders = run.holders() if run.gone else []
            end = lengths.healthy if kind == HEALTHY else onset + lengths.after if is_late else lengths.from_start
            run.run(end)
            run.estimator.close()
            figures = {name: [row[name] for row in run.figures] for name in run.figures[0]}
            probes = {name: [row[name] for row in run.probes] for name in run.probes[0]}
            begin = end if kind == HEALTHY else onset if is_late else 0
            content = {"onset": begin, "holders": holders, "others": figures, "probes": probes}
            (own / target.name / CONTENT).write_text(json.dumps(content))
            target.parent.mkdir(parents=True, exist_ok=True)
            (own / target.name).rename(target)  # so a run's folder is complete, or not there


def _read(task: Task, kind: str, folder: Path) -> Record:
    own = _folder(task, kind, folder)
    try:
        content: dict[str, Any] = json.loads((own / CONTENT).read_bytes())
        record = Record(
            setting=task.setting,
            seed=task.seed,
            kind=kind,
            onset=content["onset"],
            holders=tuple(content["holders"]),
            run=read_run(own),
            others={name: np.array(values, dtype=float) for name, values in content["others"].items()},
            probes={name: np.array(values, dtype=float) for name, values in content["probes"].items()},
        )
        extra, lengths = record.run.extra, {len(values) for values in record.others.values()}
        if extra is None or lengths != {len(extra["step"])} or extra["step"][0] != 0:
            raise ValueError("Something is missing.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The run in `{own}` is damaged; delete that folder, and make the run again.") from error
    return record
