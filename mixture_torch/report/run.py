"""Everything in a run folder, as one record; any file may be missing, torn or of another format."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import numpy as np
import numpy.typing as npt
from torch import Tensor

from mixture_core.alarms import Alarm
from mixture_torch.files.extra import read_extra, shared
from mixture_torch.files.log import read_log
from mixture_torch.files.shards import is_count, load_checked
from mixture_torch.files.snapshots import LAST_FILE, Snapshot, read_snapshots
from mixture_torch.report.replay import Past, replay

CONFIG_FILE = "config.yaml"
MOST_CONFIG = 100_000  # characters
Columns: TypeAlias = dict[str, npt.NDArray[Any]]


@attrs.frozen(kw_only=True, eq=False, repr=False)
class Run:
    """The contents of a run folder. If several runs wrote to it, only the last one.

    Attributes:
        folder: Its path.
        name: Its name, without unprintable characters. `read_runs` makes names unique.
        log: `mixture.csv`, as `read_log` returns it.
        extra: `mixture_extra.csv`, as `read_extra` returns it; None without its rows.
        snapshots: As `read_snapshots` returns them.
        last: `mixture_last.pt`, the state_dict when the run was closed; None without one.
        config: Text of `config.yaml`; None without one.
        missing: One sentence for each file that is missing, unreadable or incomplete.
        alarms: The alarms that these rows raise.
        ends: For each alarm, the first step after its level ended: None if the level lasts, and for a change.
        D: Width of the embeddings; None if no file says so yet.
    """

    folder: Path
    name: str
    log: Columns
    extra: Columns | None
    snapshots: tuple[Snapshot, ...]
    last: dict[str, Any] | None
    config: str | None
    missing: tuple[str, ...]
    alarms: tuple[Alarm, ...]
    ends: tuple[int | None, ...]
    D: int | None

    def __repr__(self) -> str:
        """Returns what the folder holds, in one line."""
        step, K = self.log["step"], self.log["K"]
        rows = f"steps {step[0]} to {step[-1]}, K={K[-1]}, D={self.D}" if len(step) else "no steps"
        return f"Run({self.name!r}; {rows}, {len(self.alarms)} alarms, {len(self.snapshots)} snapshots)"

    @property
    def directions(self) -> float:
        """The last participation ratio that is known, as a wide mixture has one in every tenth step; or nan."""
        ratios = np.empty(0) if self.extra is None else self.extra["participation_ratio"]
        return float(ratios[np.isfinite(ratios)][-1]) if np.isfinite(ratios).any() else float("nan")


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Returns everything in a run folder; it may be read while the run still writes, and no file is changed.

    If (epoch, step) goes back or K changes, a new run began in the same folder; only its rows are returned. If steps
    restart in each epoch, they are renumbered to increase throughout.

    Args:
        folder: The run folder, as given to the estimator as `log_dir`.

    Raises:
        FileNotFoundError: The folder has no `mixture.csv`.
        ValueError: It is a file, or `mixture.csv` has another format or a damaged row.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from mixture_torch import MixtureStats, read_run
        >>> folder = tempfile.mkdtemp()
        >>> with MixtureStats(K=2, enabled=True, log_dir=folder) as estimator:
        ...     for step in range(3):
        ...         _ = estimator.update(torch.randn(64, 8))
        ...         estimator.log_step(step=step, epoch=0)
        >>> run = read_run(folder)
        >>> run.log["step"], run.extra["n"].sum(axis=1), run.D
        (array([0, 1, 2]), array([64., 64., 64.]), 8)
    """
    folder, missing = Path(folder), list[str]()
    if folder.is_file():
        raise ValueError(f"`{folder}` is a file; name the run folder.")
    log = _last_run(read_log(folder), missing)
    extra = _part(lambda: read_extra(folder), missing)
    if extra is not None:
        rows, K = shared(log, extra), extra["pi"].shape[1]
        extra = {name: rows[name] for name in extra}
        if not len(extra["step"]):
            missing.append("`mixture_extra.csv` has no rows of this run.")
            extra = None
        elif log["K"][-1] != K:
            missing.append(f"`mixture_extra.csv` has the columns of another K ({K}).")
            extra = None
    snapshots = tuple(entry for entry in _part(lambda: read_snapshots(folder), missing) or () if _fits(entry, log))
    last = _part(lambda: _last(folder / LAST_FILE), missing)
    D = next((int(entry["spectrum_T"].shape[0]) for entry in snapshots), None if last is None else last["D"] or None)
    log, extra, snapshots = _counted_on(log, extra, snapshots, missing)
    past: Past = []
    if extra is not None:
        if D is None:
            missing.append(
                "Without a snapshot, the width of the embeddings is unknown, and so is the part of it in use."
            )
        past = replay(log, extra, snapshots, D=D)
    return Run(
        folder=folder,
        name=printable(folder.resolve().name),
        log=log,
        extra=extra,
        snapshots=snapshots,
        last=last,
        config=_part(lambda: _text(folder / CONFIG_FILE), missing),
        missing=tuple(missing),
        alarms=tuple(alarm for alarm, _ in past),
        ends=tuple(end for _, end in past),
        D=D,
    )


def read_runs(*runs: Run | str | os.PathLike[str]) -> tuple[Run, ...]:
    """Returns the runs, each with a unique name: as many last parts of its path as needed."""
    read = [run if isinstance(run, Run) else read_run(run) for run in runs]
    parts = [run.folder.resolve().parts for run in read]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = [printable(Path(*path[-length:]).as_posix()) for path in parts]
        if len(set(names)) == len(names):
            break
    else:  # a folder that was given twice
        names = [f"{name} ({n})" for n, name in enumerate(names, 1)]
    return tuple(attrs.evolve(run, name=name) for run, name in zip(read, names, strict=True))


def printable(text: str) -> str:
    """Returns a text in one line, without the control characters of terminals."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _part(read: Any, missing: list[str]) -> Any:
    """What `read` returns; if it fails, None. Its error and its warnings are added to `missing`."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            value = read()
        except (OSError, ValueError, MemoryError) as error:
            value = None
            missing.append(printable(str(error).replace("\n", " ")))
    missing += [printable(str(one.message)) for one in said]
    return value


def _last_run(log: Columns, missing: list[str]) -> Columns:
    step, epoch, K = log["step"], log["epoch"], log["K"]
    goes_back = (epoch[1:] < epoch[:-1]) | ((epoch[1:] == epoch[:-1]) & (step[1:] <= step[:-1]))
    starts = np.flatnonzero(goes_back | (K[1:] != K[:-1])) + 1
    if not len(starts):
        return log
    start = int(starts[-1])
    what = f"K changes to {K[start]}" if K[start] != K[start - 1] else f"steps go back to {step[start]}"
    n_runs = len(starts) + 1
    missing.append(f"`mixture.csv` holds {n_runs} runs: {what} in row {start + 1}. Only rows from there on are shown.")
    return {name: column[start:] for name, column in log.items()}


def _last(path: Path) -> Any:
    return load_checked(path, _is_state, expected="a state_dict") if path.exists() else None


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and is_count(value.get("D")) and is_count(value.get("K"))


def _fits(entry: Snapshot, log: Columns) -> bool:
    """Whether a snapshot has the figures of a mixture, and was taken at a row of this run."""
    weight, spectrum_T = entry.get("weight"), entry.get("spectrum_T")
    if not (isinstance(weight, Tensor) and isinstance(spectrum_T, Tensor)) or weight.ndim != 1 or spectrum_T.ndim != 1:
        return False
    K, D = len(weight), len(spectrum_T)
    if not D:
        return False
    shapes = {
        "trace_Sigma": (K,), "axes": (2, D), "plane_mean": (K, 2), "plane_covariance": (K, 2, 2),
        "spectrum_B": (min(K, D),),
    }  # fmt: skip
    if any(getattr(entry.get(name), "shape", None) != shape for name, shape in shapes.items()):
        return False
    if any(isinstance(entry.get(name), Tensor) for name in ("effective_rank", "rankme", "excess")):
        return False
    place = (log["step"] == entry["step"]) & (log["epoch"] == entry["epoch"])
    return bool((log["K"][place] == K).any())


def _counted_on(
    log: Columns, extra: Columns | None, snapshots: tuple[Snapshot, ...], missing: list[str]
) -> tuple[Columns, Columns | None, tuple[Snapshot, ...]]:
    """The same, with steps renumbered to increase from epoch to epoch."""
    step, epoch = log["step"], log["epoch"]
    turns = np.flatnonzero(step[1:] <= step[:-1]) + 1
    if not len(turns):
        return log, extra, snapshots
    missing.append("Steps restart in later epochs; here they are renumbered to increase throughout.")
    offsets = np.concatenate([[0], np.cumsum(step[turns - 1] + 1 - step[turns])])
    begins = epoch[turns]  # in the order of rows, epochs only grow

    def later(columns: Mapping[str, Any]) -> dict[str, Any]:
        return {**columns, "step": columns["step"] + offsets[np.searchsorted(begins, columns["epoch"], side="right")]}

    entries = tuple({**entry, "step": int(entry["step"])} for entry in map(later, snapshots))
    return later(log), None if extra is None else later(extra), entries


def _text(path: Path) -> str | None:
    if not path.is_file():
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(MOST_CONFIG)
