"""`mixture_scores/step_000123.pt`: the responsibilities of one step; and how entries are read and saved."""

import errno
import io
import os
import stat
import zipfile
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from mixture_torch.files.disk import move, write_atomically

SHARD_FOLDER = "mixture_scores"
SHARD_NAME = "step_{:06d}.pt"
SHARD_PATTERN = "step_*.pt"
SUPERSEDED_SHARDS = "mixture_scores.superseded-{}"


class ScoreEntry(TypedDict):
    """The responsibilities of one logged step."""

    step: int
    epoch: int
    responsibilities: Tensor  # (N, K) float32, on the CPU


class ShardFolder:
    """Writes each entry to a file of its own.

    Args:
        folder: The run folder.
        say: Called with each warning.
    """

    def __init__(self, folder: Path, *, say: Callable[[str], None]) -> None:
        self._folder = folder / SHARD_FOLDER
        self._say = say
        self._warned = False
        self._begun = folder, False  # the file that was written last, and whether it was there before

    def write(self, step: int, epoch: int, R: Tensor) -> None:
        """Writes one entry, in place of an earlier one of the same step, which warns once.

        Raises ValueError if the file in its place is no entry, which is then left as it is.
        """
        path = self._folder / SHARD_NAME.format(step)
        if path != self._begun[0]:  # otherwise what is there may be of this entry, and an interrupt came after it
            self._begun = path, path.exists()
        replaces = self._begun[1] and path.exists()  # it may have been moved away since a refusal
        if replaces:
            load_entry(path)
        # A copy, since torch.save would save all of what R is a view of.
        own = R.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
        # One name for all steps: the steps at which processes were killed leave one temporary file.
        save(path, {"step": step, "epoch": epoch, "responsibilities": own}, temporary=".step.mixture_torch.tmp")
        if replaces and not self._warned:
            self._warned = True
            self._say(f"`{path}` existed and was replaced; later steps replace their files without a warning.")

    def supersede(self, position: tuple[int, int], number: int, *, steps: Container[int]) -> int:
        """Moves the entries at or after a position to the folder `mixture_scores.superseded-<number>`.

        Reads only entries whose step is not before that of the position, or is in `steps`. Returns how many there were.
        """
        shards = [(_step_of(path.name), path) for path in self._folder.glob(SHARD_PATTERN)]
        near = [path for step, path in shards if step is not None and (step >= position[1] or step in steps)]
        moved = [path for path in sorted(near) if _is_from(position, path)]
        if moved:
            move(moved, self._folder.with_name(SUPERSEDED_SHARDS.format(number)))
        return len(moved)


def load_entry(path: Path) -> ScoreEntry:
    """Returns the entry in a file; raises ValueError if it holds anything else, or is damaged."""
    return cast(ScoreEntry, _load(path, _is_entry, expected="one entry"))


def load_list(path: Path) -> list[ScoreEntry]:
    """Returns a list of entries, mapped from the file until they are used; raises a ValueError if it holds no list."""
    is_zip = path.is_file() and zipfile.is_zipfile(path)  # not so before torch 1.6
    return cast(list[ScoreEntry], _load(path, _is_list, expected="a list of entries", mmap=is_zip))


def save(path: Path, value: object, *, durable: bool = False, temporary: str | None = None) -> None:
    """Makes a file from which `torch.load` reads a value, as `write_atomically` does."""
    buffer = io.BytesIO()  # torch.save would hide an OSError in a RuntimeError
    torch.save(value, buffer)
    write_atomically(path, buffer.getbuffer(), durable=durable, temporary=temporary)


def _load(path: Path, is_ours: Callable[[Any], bool], *, expected: str, mmap: bool = False) -> Any:
    foreign = f"`{path}` is not {expected} of responsibilities; move the file away or choose another `log_dir`."
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe would wait for a writer
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
    if not (_is_count(step) and _is_count(epoch) and isinstance(R, Tensor)):
        return False
    return (R.ndim, R.layout, R.dtype, R.device.type) == (2, torch.strided, torch.float32, "cpu")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**63


def _is_from(position: tuple[int, int], path: Path) -> bool:
    try:
        entry = load_entry(path)
    except ValueError:  # damaged entries are treated like their neighbors
        return True
    return (entry["epoch"], entry["step"]) >= position


def _step_of(name: str) -> int | None:
    """The step in the name of a file; None of another file."""
    digits = name.removeprefix("step_").removesuffix(".pt")
    return int(digits) if digits.isdecimal() and name == SHARD_NAME.format(int(digits)) else None
