"""Run folders: a new one for a new run, or the folder of a run to resume."""

import itertools
import re
from pathlib import Path

from mixture_torch.files.extra import EXTRA_FILE
from mixture_torch.files.log import LOG_FILE
from mixture_torch.files.scores import SCORES_FILE
from mixture_torch.files.shards import SHARD_FOLDER
from mixture_torch.files.snapshots import SNAPSHOT_FOLDER

DEFAULT_FOLDER = Path("runs/demo")
NUMBERED = re.compile(rf"{DEFAULT_FOLDER.name}(-\d+)?")
CONFIG_FILE = "config.yaml"  # the first file that a run writes
CHECKPOINT_FILE = "checkpoint.pt"
REPORT_FILE = "report.html"
WRITTEN = (
    CONFIG_FILE, CHECKPOINT_FILE, LOG_FILE, EXTRA_FILE, SCORES_FILE, SHARD_FOLDER, SNAPSHOT_FOLDER, REPORT_FILE
)  # fmt: skip


def make_run_folder(out: Path | None) -> Path:
    """Returns the folder for a new run, and makes it if need be.

    Args:
        out: The folder; None is the first of runs/demo, runs/demo-2, ... that does not exist.

    Raises:
        OSError: The folder cannot be made.
        ValueError: It already holds a run.
    """
    if out is None:
        numbered = (DEFAULT_FOLDER.with_name(f"{DEFAULT_FOLDER.name}-{n}") for n in itertools.count(2))
        out = next(folder for folder in itertools.chain([DEFAULT_FOLDER], numbered) if not folder.exists())
    out.mkdir(parents=True, exist_ok=True)
    if taken := [name for name in WRITTEN if (out / name).exists()]:
        raise ValueError(
            f"`{out}` already holds `{taken[0]}` of a run; choose another `--out`, or resume that run with `--resume`."
        )
    return out


def find_run_folder(out: Path | None) -> Path:
    """Returns the folder of the run to resume.

    Args:
        out: The folder; None is that of the newest run in runs/demo, runs/demo-2, ...; runs that never logged a step
            are taken only if there is no other.

    Raises:
        ValueError: There is no run.
    """
    if out is None:
        configs = DEFAULT_FOLDER.parent.glob(f"*/{CONFIG_FILE}")
        runs = [config for config in configs if NUMBERED.fullmatch(config.parent.name)]
        if not runs:
            raise ValueError(f"There is no run to resume in `{DEFAULT_FOLDER}`; name its folder with `--out`.")
        return max(runs, key=lambda config: (_has_steps(config.parent), config.stat().st_mtime_ns)).parent
    if not (out / CONFIG_FILE).is_file():
        raise ValueError(f"`{out}` holds no run to resume: it has no `{CONFIG_FILE}`.")
    return out


def _has_steps(folder: Path) -> bool:
    return any((folder / name).exists() for name in (LOG_FILE, CHECKPOINT_FILE))
