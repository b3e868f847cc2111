"""Run folders: a new one for a run that begins, and the one of a run to go on with."""

import itertools
import re
from pathlib import Path

from mixture_torch.files.log import LOG_FILE
from mixture_torch.files.scores import SCORES_FILE
from mixture_torch.files.shards import SHARD_FOLDER

DEFAULT_FOLDER = Path("runs/demo")
NUMBERED = re.compile(rf"{DEFAULT_FOLDER.name}(-\d+)?")
CONFIG_FILE = "config.yaml"  # the first file that a run writes
CHECKPOINT_FILE = "checkpoint.pt"
WRITTEN = (CONFIG_FILE, CHECKPOINT_FILE, LOG_FILE, SCORES_FILE, SHARD_FOLDER)


def make_run_folder(out: Path | None) -> Path:
    """Returns a folder, which is there now, without anything that a run writes.

    Args:
        out: The folder; None is the first of runs/demo, runs/demo-2, ... that is not there yet.

    Raises:
        OSError: The folder cannot be made.
        ValueError: It holds a run already.
    """
    if out is None:
        numbered = (DEFAULT_FOLDER.with_name(f"{DEFAULT_FOLDER.name}-{n}") for n in itertools.count(2))
        out = next(folder for folder in itertools.chain([DEFAULT_FOLDER], numbered) if not folder.exists())
    out.mkdir(parents=True, exist_ok=True)
    if taken := [name for name in WRITTEN if (out / name).exists()]:
        raise ValueError(
            f"`--out` must be a folder without a run, got `{out}` with `{taken[0]}`; choose another, or go on with "
            "the run with `--resume`."
        )
    return out


def find_run_folder(out: Path | None) -> Path:
    """Returns a folder with a run in it.

    Args:
        out: The folder; None is, of runs/demo, runs/demo-2, ..., that of the run that began last, one that came to
            nothing only where there is no other.

    Raises:
        ValueError: There is no run.
    """
    if out is None:
        configs = DEFAULT_FOLDER.parent.glob(f"*/{CONFIG_FILE}")
        runs = [config for config in configs if NUMBERED.fullmatch(config.parent.name)]
        if not runs:
            raise ValueError(f"`--resume` must find a run in `{DEFAULT_FOLDER}`, got none; name its folder by `--out`.")
        return max(runs, key=lambda config: (_has_steps(config.parent), config.stat().st_mtime_ns)).parent
    if not (out / CONFIG_FILE).is_file():
        raise ValueError(f"`--out` must be the folder of a run to resume, got `{out}` without `{CONFIG_FILE}`.")
    return out


def _has_steps(folder: Path) -> bool:
    return any((folder / name).exists() for name in (LOG_FILE, CHECKPOINT_FILE))
