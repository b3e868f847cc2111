"""What the files in a run folder mean: their names, their formats, and how to read them back.

    mixture.csv                     one row per logged step, behind LOG_HEADER
    mixture_scores.pt               all entries; the format is said in `archive`
    mixture_scores/step_000123.pt   one entry

What a run has recorded and, resumed from a checkpoint, records again is set aside in files of the same formats:
mixture.superseded-1.csv, mixture_scores.superseded-1.pt and mixture_scores.superseded-1/, then those of number 2.
What somebody appended to mixture_scores.pt is set aside in mixture_scores.foreign-1.pt.

Reading changes no file, and is safe beside a run that is still writing.
"""

import errno
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mixture_torch.scan import Scan

LOG_FILE = "mixture.csv"
LOG_COLUMNS = {
    "step": np.int64,
    "epoch": np.int64,
    "K": np.int64,
    "pi_min": np.float64,
    "pi_max": np.float64,
    "trace_B": np.float64,
    "opnorm_B": np.float64,
}
LOG_HEADER = (",".join(LOG_COLUMNS) + "\n").encode("ascii")

LIST_FILE = "mixture_scores.pt"

SHARD_FOLDER = "mixture_scores"
SHARD_NAME = "step_{:06d}.pt"
SHARD_PATTERN = "step_*.pt"

FOREIGN_LIST = "mixture_scores.foreign-{}.pt"
SUPERSEDED_LOG = "mixture.superseded-{}.csv"
SUPERSEDED_LIST = "mixture_scores.superseded-{}.pt"
SUPERSEDED_SHARDS = "mixture_scores.superseded-{}"


class ScoreEntry(TypedDict):
    """The responsibilities of one logged step."""

    step: int
    epoch: int
    responsibilities: Tensor  # (N, K) float32, on the CPU


def read_log(log_dir: str | Path) -> dict[str, npt.NDArray[Any]]:
    """Returns `mixture.csv` as one array per column, with one element per logged step.

    A last line that is still being written, or was torn by a crash, is left out.

    Args:
        log_dir: The run folder, as given to the estimator.

    Returns:
        `step`, `epoch` and `K` as int64; `pi_min`, `pi_max`, `trace_B` and `opnorm_B` as float64.

    Raises:
        FileNotFoundError: No `mixture.csv`.
        ValueError: Another program's `mixture.csv`, or a row that is not seven numbers.
    """
    path = Path(log_dir) / LOG_FILE
    if not path.exists():
        raise FileNotFoundError(f"`log_dir` must hold `{LOG_FILE}`, got `{log_dir}` without one; was a step logged?")
    rows = read_whole_lines(path).decode("ascii", errors="replace").splitlines()[1:]
    dtype = np.dtype(list(LOG_COLUMNS.items()))
    try:  # loadtxt warns about an empty table
        table = np.loadtxt(rows, dtype, delimiter=",", comments=None, ndmin=1) if rows else np.empty(0, dtype)
    except ValueError as error:
        raise ValueError(f"`{path}` must hold {len(LOG_COLUMNS)} numbers a row, got another: {error}.") from error
    return {name: table[name].copy() for name in LOG_COLUMNS}


def read_scores(log_dir: str | Path) -> list[ScoreEntry]:
    """Returns every entry of responsibilities in a run folder, whichever `scores_mode` wrote it.

    Entries of `append` come in the order in which they were logged, flushed or not, and before those of `per_step`,
    which come in the order of their steps. With a warning, what is damaged is left out: an entry with a wrong checksum,
    an unfinished one at the end, a file of `per_step` that is none, and what stands behind the end.

    Args:
        log_dir: The run folder, as given to the estimator.

    Returns:
        Entries `{"step": int, "epoch": int, "responsibilities": (N, K) float32 CPU tensor}`.

    Raises:
        FileNotFoundError: No scores of either mode.
        ValueError: A `mixture_scores.pt` that is not ours.
    """
    folder = Path(log_dir)
    shards = list((folder / SHARD_FOLDER).glob(SHARD_PATTERN))
    path = folder / LIST_FILE
    if not (shards or path.exists()):
        raise FileNotFoundError(
            f"`log_dir` must hold `{LIST_FILE}` or `{SHARD_FOLDER}/{SHARD_PATTERN}`, got `{log_dir}` without either; "
            "was `store_scores` on?"
        )
    appended = read_appended(path) if path.exists() else []
    return appended + sorted(_readable(shards), key=lambda entry: entry["step"])


def _readable(shards: list[Path]) -> Iterator[ScoreEntry]:
    for path in shards:
        try:
            yield read_shard(path)
        except FileNotFoundError:  # set aside meanwhile
            continue
        except ValueError as error:
            warnings.warn(f"{error} It was left out.", stacklevel=3)


def read_whole_lines(path: Path) -> bytes:
    """Returns the log up to the end of its last whole line, header included.

    Raises:
        ValueError: The file has another header.
    """
    if _is_special(path):
        raise ValueError(f"`{path}` must be a file, got a pipe or a device; move it away or choose another `log_dir`.")
    data = path.read_bytes().rstrip(b"\0")  # which a power cut leaves where nothing had come to the disk yet
    if not (data.startswith(LOG_HEADER) or LOG_HEADER.startswith(data)):
        found = data.split(b"\n", 1)[0][:80].decode("ascii", errors="backslashreplace")
        raise ValueError(
            f"`{path}` must begin with `{LOG_HEADER.decode().strip()}`, got `{found}`; "
            "move the file away or choose another `log_dir`."
        )
    return data[: data.rfind(b"\n") + 1]


def position_of(line: bytes) -> tuple[int, int] | None:
    """Returns (epoch, step), where in the run a line of the log belongs; None of a damaged one."""
    try:
        step, epoch, _ = line.split(b",", 2)
        return int(epoch), int(step)
    except ValueError:
        return None


def step_of(name: str) -> int | None:
    """Returns the step in the name of a file of `per_step`, None of another file."""
    digits = name.removeprefix("step_").removesuffix(".pt")
    return int(digits) if digits.isdecimal() and name == SHARD_NAME.format(int(digits)) else None


def read_appended(path: Path) -> list[ScoreEntry]:
    """Returns the entries of a file that is an archive, or a list; warns about what is left out.

    Raises:
        ValueError: The file is neither.
    """
    scan = Scan(path)
    entries: list[ScoreEntry] = [
        {"step": entry.step, "epoch": entry.epoch, "responsibilities": torch.from_numpy(R)} for entry, R in scan
    ]
    if not scan.is_ours:
        return read_list(path)
    said = list(scan.damage)
    if scan.torn:
        said.append(f"`{path}` ends in {scan.torn} bytes of an unfinished write; they were left out.")
    if scan.foreign:
        said.append(f"`{path}` has {len(scan.foreign)} bytes behind its end; they were left out.")
    for message in said:
        warnings.warn(message, stacklevel=3)
    return entries


def read_list(path: Path, *, in_memory: bool = True) -> list[ScoreEntry]:
    """Returns the list that somebody saved with `torch.save`.

    Args:
        path: The file.
        in_memory: Whether to read the responsibilities now; otherwise the file must not change while they are in use.

    Raises:
        ValueError: The file holds anything else.
    """
    mapped = not in_memory and path.is_file() and zipfile.is_zipfile(path)  # of which files before torch 1.6 were none
    return cast(list[ScoreEntry], _load(path, _is_list, expected="a list of entries", mmap=mapped))


def read_shard(path: Path) -> ScoreEntry:
    """Returns the entry in a file of `per_step`.

    Raises:
        ValueError: The file holds anything else, or is damaged.
    """
    return cast(ScoreEntry, _load(path, _is_entry, expected="one entry"))


def _load(path: Path, is_ours: Callable[[Any], bool], *, expected: str, mmap: bool = False) -> Any:
    if _is_special(path):
        raise _foreign(path, expected)
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises whatever comes up while it parses foreign bytes, EINVAL too
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise
        raise _foreign(path, expected) from error
    if not is_ours(value):
        raise _foreign(path, expected)
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_entry, value))


def _is_entry(value: Any) -> bool:
    if not (isinstance(value, dict) and value.keys() == ScoreEntry.__annotations__.keys()):
        return False
    step, epoch, R = value["step"], value["epoch"], value["responsibilities"]
    return _is_count(step) and _is_count(epoch) and is_matrix(R) and (R.dtype, R.device.type) == (torch.float32, "cpu")


def is_matrix(value: Any) -> bool:
    """Returns whether something is a dense tensor (N, K) that holds numbers."""
    return isinstance(value, Tensor) and (value.ndim, value.layout, value.is_meta) == (2, torch.strided, False)


def _is_special(path: Path) -> bool:
    """Whether it is a pipe or a device, which may have no end, or never begin."""
    return path.exists() and not (path.is_file() or path.is_dir())


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**63


def _foreign(path: Path, expected: str) -> ValueError:
    return ValueError(
        f"`{path}` must hold {expected} of responsibilities, got something else; "
        "move the file away or choose another `log_dir`."
    )
