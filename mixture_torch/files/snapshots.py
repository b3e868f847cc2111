"""`mixture_snapshots/step_000123.pt`: the mixture at one step, and figures too large for a row of the log."""

import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mixture_torch.files.shards import SHARD_PATTERN, entries_folder, is_count, load_checked, readable

SNAPSHOT_FOLDER = "mixture_snapshots"
LAST_FILE = "mixture_last.pt"  # the state_dict that was given to the last `close`

Snapshot = dict[str, Any]  # int `step` and `epoch`; numbers, and tensors on the CPU


def load_snapshot(path: Path) -> Snapshot:
    """Returns the snapshot in a file; raises ValueError if it holds anything else, or is damaged."""
    return cast(Snapshot, load_checked(path, _is_snapshot, expected="a snapshot of a mixture"))


def read_snapshots(log_dir: str | os.PathLike[str]) -> list[Snapshot]:
    """Returns the snapshots in a run folder, sorted by epoch and step: dicts of ints, floats and CPU tensors.

    mixture_torch/README.md lists the keys. Damaged files are left out with a warning. Reading changes no file and may
    be done while the run still writes.

    Args:
        log_dir: The run folder, as given to the estimator, or the folder of snapshots in it.

    Raises:
        FileNotFoundError: There is no such folder, or it has no snapshots.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from mixture_torch import MixtureStats, read_snapshots
        >>> folder = tempfile.mkdtemp()
        >>> with MixtureStats(K=2, enabled=True, log_dir=folder) as estimator:
        ...     _ = estimator.update(torch.randn(64, 8))
        ...     estimator.log_step(step=0, epoch=0)
        ...     estimator.flush()
        >>> read_snapshots(folder)[0]["spectrum_T"].shape
        torch.Size([8])
    """
    paths = list(entries_folder(log_dir, SNAPSHOT_FOLDER).glob(SHARD_PATTERN))
    if not paths:
        missing = f"{SNAPSHOT_FOLDER}/{SHARD_PATTERN}"
        raise FileNotFoundError(f"`{log_dir}` has no `{missing}`; call `flush` in the run, or set `snapshot_every`.")
    return sorted(readable(paths, load_snapshot), key=lambda entry: (entry["epoch"], entry["step"]))


def _is_snapshot(value: Any) -> bool:
    if not (isinstance(value, dict) and is_count(value.get("step")) and is_count(value.get("epoch"))):
        return False
    return all(isinstance(name, str) and _is_figure(one) for name, one in value.items())


def _is_figure(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return isinstance(value, float) or is_count(value)
    is_plain = (value.layout, value.device.type) == (torch.strided, "cpu")
    return is_plain and not (value.requires_grad or value.is_complex())
