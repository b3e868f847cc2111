"""What the files in a run folder mean: their names, their formats, and how to read them back.

    mixture.csv                     one row per logged step, behind LOG_HEADER
    mixture_scores.pt               the list of entries, as of the last flush
    mixture_scores.journal          the entries since then; gone after a flush
    mixture_scores/step_000123.pt   one entry

What a run has recorded and, resumed from a checkpoint, records again is set aside in files of the same formats:
mixture.superseded-1.csv, mixture_scores.superseded-1.pt and mixture_scores.superseded-1/, then those of number 2.

The journal is JOURNAL_MAGIC, the number of entries that the list had when the journal was begun (its base), and per
entry a record: length and CRC-32 of a payload, then the payload, which is a `torch.save` of the entry. Entry i of the
journal is entry base + i of the whole list; by this a journal that was merged, but not yet removed, is recognised.

Reading changes no file, and is safe beside a run that is still writing.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

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
JOURNAL_FILE = "mixture_scores.journal"
JOURNAL_MAGIC = b"mixture_scores 1"
JOURNAL_HEADER = struct.Struct(f"<{len(JOURNAL_MAGIC)}sQ")  # magic, base
JOURNAL_RECORD = struct.Struct("<QI")  # length and CRC-32 of the payload

SHARD_FOLDER = "mixture_scores"
SHARD_NAME = "step_{:06d}.pt"
SHARD_PATTERN = "step_*.pt"

SUPERSEDED_LOG = "mixture.superseded-{}.csv"
SUPERSEDED_LIST = "mixture_scores.superseded-{}.pt"
SUPERSEDED_SHARDS = "mixture_scores.superseded-{}"


class ScoreEntry(TypedDict):
    """The responsibilities of one logged step."""

    step: int
    epoch: int
    responsibilities: Tensor  # (N, K) float32, on the CPU


class Journal(NamedTuple):
    """What can be read of a journal."""

    base: int  # entries in the list when the journal was begun
    entries: list[ScoreEntry]
    size: int  # bytes up to the end of the last whole record; 0 without a whole header


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
    which come in the order of their steps.

    Args:
        log_dir: The run folder, as given to the estimator.

    Returns:
        Entries `{"step": int, "epoch": int, "responsibilities": (N, K) float32 CPU tensor}`.

    Raises:
        FileNotFoundError: No scores of either mode.
        ValueError: A file that is not ours, or is damaged.
    """
    folder = Path(log_dir)
    shards = list((folder / SHARD_FOLDER).glob(SHARD_PATTERN))
    if not (shards or (folder / LIST_FILE).exists() or (folder / JOURNAL_FILE).exists()):
        raise FileNotFoundError(
            f"`log_dir` must hold `{LIST_FILE}` or `{SHARD_FOLDER}/{SHARD_PATTERN}`, got `{log_dir}` without either; "
            "was `store_scores` on?"
        )
    return read_appended(folder) + sorted(map(read_shard, shards), key=lambda entry: entry["step"])


def read_whole_lines(path: Path) -> bytes:
    """Returns the log up to the end of its last whole line, header included.

    Raises:
        ValueError: The file has another header.
    """
    data = path.read_bytes()
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


def read_appended(folder: Path) -> list[ScoreEntry]:
    """Returns the entries of the list and of the journal beside it, each once."""
    journal = read_journal(folder / JOURNAL_FILE)  # before the list: a flush in between then loses nothing
    listed = read_list(folder / LIST_FILE)
    overlap = listed[journal.base : journal.base + len(journal.entries)]
    if all(map(_same, overlap, journal.entries)):  # not so where the list was exchanged for another
        return listed + journal.entries[len(overlap) :]
    return listed + journal.entries


def read_list(path: Path) -> list[ScoreEntry]:
    """Returns the list in a file, empty where there is no file.

    Raises:
        ValueError: The file holds anything else.
    """
    if not path.exists():
        return []
    return cast(list[ScoreEntry], _load(path, _is_list, expected="a list of entries"))


def read_journal(path: Path) -> Journal:
    """Returns the journal in a file up to its last whole record, an empty one where there is no file.

    A record whose checksum is wrong is skipped with a warning.

    Raises:
        ValueError: The file is not a journal.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    if not JOURNAL_MAGIC.startswith(data[: len(JOURNAL_MAGIC)]):
        raise _foreign(path, "a journal of entries")
    if len(data) < JOURNAL_HEADER.size:
        return Journal(base=0, entries=[], size=0)
    _, base = JOURNAL_HEADER.unpack_from(data)
    entries: list[ScoreEntry] = []
    position = JOURNAL_HEADER.size
    while position + JOURNAL_RECORD.size <= len(data):
        length, checksum = JOURNAL_RECORD.unpack_from(data, position)
        end = position + JOURNAL_RECORD.size + length
        if length == 0 or end > len(data):  # 0: the zeros that a power cut leaves
            break
        payload = data[position + JOURNAL_RECORD.size : end]
        if zlib.crc32(payload) == checksum:
            entries.append(torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True))
        else:
            warnings.warn(f"`{path}` is damaged: skipped {length} bytes at {position}.", stacklevel=2)
        position = end
    return Journal(base, entries, size=position)


def read_shard(path: Path) -> ScoreEntry:
    """Returns the entry in a file of `per_step`.

    Raises:
        ValueError: The file holds anything else, or is damaged.
    """
    return cast(ScoreEntry, _load(path, _is_entry, expected="one entry"))


def _load(path: Path, is_ours: Callable[[Any], bool], *, expected: str) -> Any:
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises whatever comes up while it parses foreign bytes
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
    return isinstance(step, int) and isinstance(epoch, int) and isinstance(R, Tensor) and R.dtype == torch.float32


def _same(a: ScoreEntry, b: ScoreEntry) -> bool:
    R_a, R_b = a["responsibilities"], b["responsibilities"]
    same_steps = (a["step"], a["epoch"]) == (b["step"], b["epoch"])
    return same_steps and torch.equal(R_a.nan_to_num(), R_b.nan_to_num())


def _foreign(path: Path, expected: str) -> ValueError:
    return ValueError(
        f"`{path}` must hold {expected} of responsibilities, got something else; "
        "move the file away or choose another `log_dir`."
    )
