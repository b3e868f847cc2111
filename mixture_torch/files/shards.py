"""`mixture_scores/step_000123.pt`: the responsibilities of one step; and how such files are written and read."""

import errno
import io
import os
import warnings
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

import torch
from torch import Tensor

from mixture_torch.files.disk import move, superseded, write_atomically

SHARD_FOLDER = "mixture_scores"
SHARD_NAME = "step_{:06d}.pt"
SHARD_PATTERN = "step_*.pt"

Entry = TypeVar("Entry")


class ScoreEntry(TypedDict):
    """The responsibilities of one logged step."""

    step: int
    epoch: int
    responsibilities: Tensor  # (N, K) float32, on the CPU


class ShardFolder:
    """A folder with a file for each entry, which is a mapping with `step` and `epoch`.

    Args:
        path: The folder.
        load: Returns the entry in a file, or raises a ValueError if it holds anything else.
        say: Called with each warning.
    """

    def __init__(self, path: Path, load: Callable[[Path], Mapping[str, Any]], *, say: Callable[[str], None]) -> None:
        self.path = path
        self._load = load
        self._say = say
        self._warned = False

    def write(self, entry: Mapping[str, Any]) -> None:
        """Writes one entry; the first time that it replaces another one of the same step, it warns.

        Raises ValueError, and changes nothing, if the existing file is no entry.
        """
        path, data = self.path / SHARD_NAME.format(entry["step"]), saved(entry)
        replaces = path.exists()
        if replaces:
            self._load(path)
            replaces = path.read_bytes() != data  # equal if an interrupt came after this entry was written
        # One name for all steps: the steps at which processes were killed leave one temporary file.
        write_atomically(path, data, temporary=".step.mixture_torch.tmp")
        if replaces and not self._warned:
            self._warned = True
            self._say(f"`{path}` existed and was replaced; later steps replace their files without a warning.")

    def supersede(self, position: tuple[int, int], number: int, *, steps: Container[int]) -> int:
        """Moves the entries at or after a position to a folder such as `mixture_scores.superseded-<number>`.

        Reads only entries whose step is not before that of the position, or is in `steps`. Returns how many there were.
        """
        shards = [(_step_of(path), path) for path in sorted(self.path.glob(SHARD_PATTERN))]
        near = [path for step, path in shards if step >= position[1] or step in steps]
        moved = [path for path in near if position < (0, 0) or self._is_from(position, path)]
        if moved:
            move(moved, superseded(self.path, number))
        return len(moved)

    def _is_from(self, position: tuple[int, int], path: Path) -> bool:
        try:
            entry = self._load(path)
        except ValueError:  # damaged entries are treated like their neighbors
            return True
        return (entry["epoch"], entry["step"]) >= position


def score_entry(step: int, epoch: int, R: Tensor) -> ScoreEntry:
    """Returns the entry of a step."""
    return cast(ScoreEntry, copied({"step": step, "epoch": epoch, "responsibilities": R.to(torch.float32)}))


def copied(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an entry with copies of its tensors on the CPU: torch.save would save all of what one is a view of."""
    own = {name: value.detach().to("cpu") for name, value in entry.items() if isinstance(value, Tensor)}
    return {**entry, **{name: value.clone(memory_format=torch.contiguous_format) for name, value in own.items()}}


def load_entry(path: Path) -> ScoreEntry:
    """Returns the entry in a file; raises ValueError if it holds anything else, or is damaged."""
    return cast(ScoreEntry, load_checked(path, _is_entry, expected="one entry of responsibilities"))


def load_list(path: Path) -> list[ScoreEntry]:
    """Returns a list of entries, mapped from the file until they are used; raises a ValueError if it holds no list."""
    is_zip = path.is_file() and zipfile.is_zipfile(path)  # not so before torch 1.6
    value = load_checked(path, _is_list, expected="a list of entries of responsibilities", mmap=is_zip)
    return cast(list[ScoreEntry], value)


def readable(paths: Iterable[Path], load: Callable[[Path], Entry]) -> Iterator[Entry]:
    """Yields the entries in files; the caller's caller is warned of damaged ones, which are left out."""
    for path in paths:
        try:
            yield load(path)
        except FileNotFoundError:  # set aside meanwhile
            continue
        except ValueError as error:
            warnings.warn(f"{error} The file was left out.", stacklevel=3)


def entries_folder(place: str | os.PathLike[str], name: str) -> Path:
    """Returns the folder `name` of a run, of which `place` is the run folder or that folder itself.

    The latter may be one of a superseded run. Raises FileNotFoundError if there is no such place.
    """
    path = Path(place)
    if not path.exists():
        raise FileNotFoundError(f"There is no `{place}`.")
    inside = path / name
    return path if path.name.split(".")[0] == name and not inside.exists() else inside


def save(path: Path, value: object) -> None:
    """Makes a file from which `torch.load` reads a value, at once and safe from a loss of power."""
    write_atomically(path, saved(value), durable=True)


def saved(value: object) -> bytes:
    """Returns what torch.save writes."""
    buffer = io.BytesIO()  # torch.save would hide an OSError in a RuntimeError
    torch.save(value, buffer)
    return buffer.getvalue()


def load_checked(path: Path, is_ours: Callable[[Any], bool], *, expected: str, mmap: bool = False) -> Any:
    """Returns the value in a file, on the CPU; raises a ValueError if it is not what is expected, or is damaged."""
    foreign = f"`{path}` is not {expected}; move the file away or choose another `log_dir`."
    if path.exists() and not path.is_file():  # a pipe would wait for a writer
        raise ValueError(foreign)
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises anything while it parses foreign bytes, EINVAL too
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise
        raise ValueError(foreign) from error
    if not is_ours(value):
        raise ValueError(foreign)
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_entry, value))


def _is_entry(value: Any) -> bool:
    if not (isinstance(value, dict) and value.keys() == ScoreEntry.__annotations__.keys()):
        return False
    step, epoch, R = value["step"], value["epoch"], value["responsibilities"]
    if not (is_count(step) and is_count(epoch) and isinstance(R, Tensor)):
        return False
    return (R.ndim, R.layout, R.dtype, R.device.type) == (2, torch.strided, torch.float32, "cpu")


def is_count(value: Any) -> bool:
    """Returns whether a value can be a step or an epoch."""
    return isinstance(value, int) and 0 <= value < 2**63


def _step_of(path: Path) -> int:
    """Returns the step in the name of a file; -1 for another file."""
    digits = path.stem.removeprefix("step_")
    return int(digits) if digits.isdecimal() and path.name == SHARD_NAME.format(int(digits)) else -1
