"""What writes the responsibilities of a run, in one file or in many; as in `writers`."""

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from mixture_torch.archive import ENTRY, HEADER, Array, Entry, archive, record, rows, tail
from mixture_torch.caller import warn_caller
from mixture_torch.disk import GrowingFile, Whole, move, write_atomically
from mixture_torch.readers import (
    FOREIGN_LIST,
    LIST_FILE,
    SHARD_FOLDER,
    SHARD_NAME,
    SHARD_PATTERN,
    SUPERSEDED_LIST,
    SUPERSEDED_SHARDS,
    ScoreEntry,
    read_list,
    read_shard,
    step_of,
)
from mixture_torch.scan import Scan, holds, mended
from mixture_torch.writers import save_atomically


class AppendScores:
    """Appends entries to `mixture_scores.pt`, at a cost that does not depend on how many came before.

    In memory there is an index alone, of 36 bytes an entry. It holds what is in the file: whoever changes one and not
    the other closes the file, and who opens it again looks.

    Args:
        log_dir: The run folder.
        say: Is told what there is to warn about.
    """

    def __init__(self, log_dir: str | Path, *, say: Callable[[str], None] = warn_caller) -> None:
        self._path = Path(log_dir).absolute() / LIST_FILE
        self._file = GrowingFile(self._path, whole=self._look, header=HEADER, say=say)
        self._index = bytearray()
        self._was_open = False
        self._has_tail = False  # and it is complete

    def append(self, step: int, epoch: int, responsibilities: Tensor) -> None:
        """Writes one entry, which `read_scores` finds from now on.

        Args:
            step: The training step.
            epoch: The epoch.
            responsibilities: (N, K), on any device.

        Raises:
            ValueError: `mixture_scores.pt` is not ours; it is left as it is.
            OSError: The entry could not be written; the entries are as they were.
        """
        R = responsibilities.detach().to("cpu", torch.float32).numpy()
        self.open()
        entry, data = record(self._file.end, step, epoch, R)
        with self._closed_on_failure():
            self._has_tail = False
            self._file.append(data)
            self._index += entry.packed

    def open(self) -> None:
        """Opens the file, unless it is open.

        Raises:
            ValueError: `mixture_scores.pt` is not ours; it is left as it is.
            OSError: The file cannot be opened.
        """
        self._file.open()
        if self._file.end == len(HEADER):  # so in a new file, into which nobody looked
            self._index.clear()
        self._was_open = True

    @property
    def end(self) -> int:
        """Bytes up to the end of the last entry of the open file."""
        return self._file.end

    def supersede(self, position: tuple[int, int], number: int) -> int:
        """Moves the entries at or behind a position to `mixture_scores.superseded-<number>.pt`.

        Args:
            position: (epoch, step).
            number: Of the file for them; without such entries it is not made.

        Returns:
            How many entries were moved.

        Raises:
            ValueError: `mixture_scores.pt` is not ours; it is left as it is.
            OSError: Something could not be written; entries may then be in both files.
        """
        if not self._path.exists():
            return 0
        self.open()
        entries = rows(self._index)
        epoch, step = position
        moves = (entries["epoch"] > epoch) | ((entries["epoch"] == epoch) & (entries["step"] >= step))
        if not moves.any():
            return 0
        first = int(moves.argmax())
        start = int(entries["offset"][first])
        target = self._path.with_name(SUPERSEDED_LIST.format(number))
        write_atomically(target, archive(self._entries(start, lambda at: at >= position)), durable=True)
        if moves[first:].all():
            with self._closed_on_failure():
                self._has_tail = False
                del self._index[first * ENTRY.size :]
                self._file.cut(start)
        else:
            write_atomically(self._path, archive(self._entries(0, lambda at: at < position)), durable=True)
            self._file.close()
        self.flush()
        return int(moves.sum())

    def flush(self) -> None:
        """Completes the file if it has been opened, so that `torch.load` reads it, and brings it to the disk.

        Raises:
            ValueError: `mixture_scores.pt` is not ours; it is left as it is.
            OSError: The file could not be completed; the entries are as they were.
        """
        if self._was_open and self._path.exists():
            self.open()
            if not self._has_tail:
                self._file.finish(tail(self._index, self._file.end))
                self._has_tail = True

    def close(self) -> None:
        """Flushes, and closes the file."""
        try:
            self.flush()
        finally:
            self._file.close()

    def _look(self) -> Whole:
        """Makes the index what the file says, from the last entry on that is known to be there."""
        self._has_tail = False
        last = Entry(*ENTRY.unpack(self._index[-ENTRY.size :])) if self._index else None
        if last is None or not holds(self._path, last):
            last = None
            self._index.clear()
        scan = Scan(self._path, start=last.end if last else 0)
        for entry, _ in scan:
            self._index += entry.packed
        if not scan.is_ours:
            listed = read_list(self._path, in_memory=False)
            write_atomically(self._path, archive(map(_unpacked, listed)), durable=True)
            return self._look()
        if scan.size and not scan.has_header:
            write_atomically(self._path, mended(self._path), durable=True)
        return Whole(scan.size, scan.torn, (*scan.damage, *self._set_aside(scan.foreign)))

    def _set_aside(self, foreign: bytes) -> list[str]:
        if not foreign:
            return []
        names = map(FOREIGN_LIST.format, count(1))
        path = next(path for path in map(self._path.with_name, names) if not path.exists())
        write_atomically(path, foreign, durable=True)
        return [f"`{self._path}` had {len(foreign)} bytes behind its end; they were moved to `{path.name}`."]

    def _entries(self, start: int, takes: Callable[[tuple[int, int]], bool]) -> Iterator[tuple[int, int, Array]]:
        scan = Scan(self._path, start=start)
        return ((entry.step, entry.epoch, R) for entry, R in scan if takes((entry.epoch, entry.step)))

    @contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # an interrupt between file and index too
            self._file.close()
            raise


class PerStepScores:
    """Writes each entry into a file of its own, `mixture_scores/step_000123.pt`.

    Args:
        log_dir: The run folder.
        say: Is told what there is to warn about.
    """

    def __init__(self, log_dir: str | Path, *, say: Callable[[str], None] = warn_caller) -> None:
        self._say = say
        self._folder = Path(log_dir).absolute() / SHARD_FOLDER
        self._warned = False

    def append(self, step: int, epoch: int, responsibilities: Tensor) -> None:
        """Writes one entry, in place of an earlier one of the same step; that warns once.

        Args:
            step: The training step.
            epoch: The epoch.
            responsibilities: (N, K), on any device.

        Raises:
            ValueError: What is in its place is no entry; it is left as it is.
            OSError: The entry could not be written; an earlier one is as it was.
        """
        path = self._folder / SHARD_NAME.format(step)
        replaces = path.exists()
        if replaces:
            read_shard(path)
        save_atomically(path, _entry(step, epoch, responsibilities))
        if replaces and not self._warned:
            self._warned = True
            self._say(f"`{path}` was there already and has been replaced, as will be others.")

    def supersede(self, position: tuple[int, int], number: int, *, steps: Container[int]) -> int:
        """Moves the entries at or behind a position to the folder `mixture_scores.superseded-<number>`.

        Only those are looked into whose step is not before the position's or in `steps`: there may be 100,000.

        Args:
            position: (epoch, step).
            number: Of the folder for them; without such entries it is not made.
            steps: Of other entries that may have to be moved.

        Returns:
            How many entries were moved.

        Raises:
            OSError: An entry could not be moved; others may have been.
        """
        shards = [(step_of(path.name), path) for path in self._folder.glob(SHARD_PATTERN)]
        candidates = [path for step, path in shards if step is not None and (step >= position[1] or step in steps)]
        moved = [path for path in sorted(candidates) if _holds_from(position, path)]
        if moved:
            move(moved, self._folder.with_name(SUPERSEDED_SHARDS.format(number)))
        return len(moved)


def _holds_from(position: tuple[int, int], path: Path) -> bool:
    try:
        entry = read_shard(path)
    except ValueError:  # damaged: it goes with those whose steps are near its own, and out of a reader's way
        return True
    return (entry["epoch"], entry["step"]) >= position


def _entry(step: int, epoch: int, responsibilities: Tensor) -> ScoreEntry:
    R = responsibilities.detach().to("cpu", torch.float32)
    # A copy: torch.save writes a view's whole storage.
    return {"step": int(step), "epoch": int(epoch), "responsibilities": R.clone(memory_format=torch.contiguous_format)}


def _unpacked(entry: ScoreEntry) -> tuple[int, int, Array]:
    return entry["step"], entry["epoch"], entry["responsibilities"].detach().resolve_neg().numpy()
