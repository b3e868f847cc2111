"""`mixture_extra.csv`: further figures of each logged step, with three columns per component."""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mixture_torch.files.disk import set_aside
from mixture_torch.files.log import Lines, Position, RowsFile, found, read_lines, read_table

EXTRA_FILE = "mixture_extra.csv"
INTEGERS = ("step", "epoch", "n_rows", "n_ignored", "n_relocated")
FIGURES = ("trace_T", "share_B", "participation_ratio", "se_trace_B", "alignment")
PER_COMPONENT = ("pi", "n", "rel")


@cache
def extra_header(K: int) -> bytes:
    """Returns the names of the columns for K components, with commas."""
    return ",".join([*INTEGERS, *FIGURES, *(f"{name}_{k}" for name in PER_COMPONENT for k in range(K))]).encode("ascii")


class ExtraFile(RowsFile):
    """Appends rows to `mixture_extra.csv`, all of which have the same K."""

    def __init__(self, path: Path, *, say: Callable[[str], None]) -> None:
        super().__init__(path, b"", say=say)
        self.begin()

    def begin(self) -> None:
        """Lets the next row decide K."""
        self._header = b""  # until then, an empty file stays empty
        self._warned = False

    def read(self) -> Lines:
        """Returns the content, whatever its K; raises a ValueError if the file has another format."""
        return read_lines(self.path, extra_header(K_of(self.path)))

    def open_for(self, K: int) -> bool:
        """Opens the file and returns true, or returns false if it is open with another K.

        The first row decides K; a file with another K is set aside as a whole. A later row of another K comes from
        another estimator: if it set the file aside too, each step would begin a new one.
        """
        header = extra_header(K) + b"\n"
        if not self._header:
            self.close()
            self._header = header
        if header == self._header:
            self.open()
        elif not self._warned:
            self._warned = True
            self._say(f"`{self.path}` has rows of another K, so rows of K={K} are left out; use another `log_dir`.")
        return header == self._header

    def look(self) -> int:
        """Returns how many bytes are header and rows; sets a torn row, or a file with another K, aside."""
        header = self.read().header.split()
        if header and self._header and header != self._header.split():
            aside = self.unused()
            set_aside(self.path, aside)
            self._say(f"`{self.path}` has the columns of another K; it was moved to `{aside.name}`.")
        return super().look()


def read_extra(log_dir: str | os.PathLike[str]) -> dict[str, npt.NDArray[Any]]:
    """Returns the columns of `mixture_extra.csv` by name, as arrays of (steps,); otherwise see `read_log`.

    Three are (steps, K): `pi`, the weights; `n`, the rows of the step in each component; `rel`, tr Sigma_k / tr T.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from mixture_torch import MixtureStats, read_extra
        >>> folder = tempfile.mkdtemp()
        >>> with MixtureStats(K=2, enabled=True, log_dir=folder) as estimator:
        ...     for step in range(3):
        ...         _ = estimator.update(torch.randn(64, 8))
        ...         estimator.log_step(step=step, epoch=0)
        >>> read_extra(folder)["n"].sum(axis=1)  # rows of each step
        array([64., 64., 64.])
    """
    path = found(log_dir, EXTRA_FILE, "`extra` on")
    K = K_of(path)
    single = [(name, np.int64 if name in INTEGERS else np.float64) for name in INTEGERS + FIGURES]
    return read_table(path, extra_header(K), [*single, *((name, np.float64, (K,)) for name in PER_COMPONENT)])


def shared(log: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """Returns the columns of both files, with the rows whose (epoch, step) both have, in the order of `log`."""
    places = {place: n for n, place in enumerate(_places(extra))}
    pairs = [(n, places[place]) for n, place in enumerate(_places(log)) if place in places]
    of_log, of_extra = np.array(pairs, np.int64).reshape(-1, 2).T
    return {name: column[of_log] for name, column in log.items()} | {name: of[of_extra] for name, of in extra.items()}


def joined(log: Mapping[str, Any], extra: Mapping[str, Any], *, before: Position) -> Iterator[dict[str, Any]]:
    """Yields these rows one by one, as far as they are before an (epoch, step)."""
    columns = {name: column.tolist() for name, column in shared(log, extra).items()}
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        if (row["epoch"], row["step"]) < before:
            yield row


def _places(columns: Mapping[str, Any]) -> Iterator[Position]:
    return zip(columns["epoch"].tolist(), columns["step"].tolist(), strict=True)


def K_of(path: Path) -> int:
    """Returns the K for which a file has columns; 1 if its header does not say, because it is torn."""
    if not path.is_file():
        return 1
    with open(path, "rb") as file:  # apart from pi_k, one column begins with p
        return max(file.readline().count(b",p") - 1, 1)
