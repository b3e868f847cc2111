"""A tracker that writes to TensorBoard."""

import os
import weakref
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from mixture_core.alarms import Alarm
from mixture_torch.integrations.plane import named, plane, readings

try:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise ImportError('`TensorBoard` needs tensorboard: pip install "mixture-diagnostics[tensorboard]"') from error

# Charts of several series each, whose tags are regular expressions.
CHARTS = {
    "variance": ("trace_T", "trace_B", "opnorm_B"),
    "share between components": ("share_B", "excess"),
    "directions in use": ("participation_ratio", "effective_rank", "rankme"),
    "weights": (r"pi_\d+",),
    "rows of the batch in each component": (r"n_\d+",),
    "variance within components, relative to trace_T": (r"rel_\d+",),
    "ignored rows and relocated components": ("n_ignored", "n_relocated"),
}
LAYOUT = {"mixture": {title: ["Multiline", [f"^mixture/{tag}$" for tag in tags]] for title, tags in CHARTS.items()}}


class TensorBoard:
    """Shows the mixture in TensorBoard, as the `tracker` of an estimator.

    - Scalars are under `mixture/`, without those that are nan. The tab Custom Scalars groups them. TensorBoard shows
      only the last layout of a writer, so add your own, which may include `LAYOUT`, after making this object.
    - Each alarm is a text, `mixture/alarms`.
    - Each snapshot adds a few scalars and, if matplotlib is installed, a picture, `mixture/plane`. The writer is then
      flushed.

    Args:
        writer: A `torch.utils.tensorboard.SummaryWriter`, or a folder for a new one.

    Raises:
        TypeError: `writer` is neither.
        ImportError: tensorboard is not installed; raised by the import of this module.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from mixture_torch import MixtureStats
        >>> from mixture_torch.integrations.tensorboard import TensorBoard
        >>> with MixtureStats(K=2, enabled=True, tracker=TensorBoard(tempfile.mkdtemp())) as estimator:
        ...     stats = estimator.update(torch.randn(64, 8))
        ...     estimator.log_step(step=0, epoch=0)
    """

    def __init__(self, writer: SummaryWriter | str | os.PathLike[str]) -> None:
        if not isinstance(writer, (SummaryWriter, str, os.PathLike)):
            raise TypeError(f"`writer` must be a SummaryWriter of torch or a folder, got {type(writer).__name__}.")
        self._given = writer
        if isinstance(writer, SummaryWriter):
            writer.add_custom_scalars(LAYOUT)

    @cached_property
    def _writer(self) -> SummaryWriter:  # made with the first row, because other ranks write nothing
        if isinstance(self._given, SummaryWriter):
            return self._given
        writer = SummaryWriter(os.fspath(self._given))
        weakref.finalize(self, writer.close)  # otherwise up to two minutes are lost at exit
        writer.add_custom_scalars(LAYOUT)
        return writer

    def __call__(self, scalars: Mapping[str, float], step: int) -> None:
        """Writes the figures of a row."""
        self._write(named(scalars), step)

    def alarm(self, alarm: Alarm) -> None:
        """Writes an alarm as text."""
        self._writer.add_text("mixture/alarms", str(alarm), alarm.step)

    def snapshot(self, entry: Mapping[str, Any]) -> None:
        """Writes a snapshot, as a picture and scalars."""
        self._write(readings(entry), entry["step"])
        if (picture := plane(entry)) is not None:
            self._writer.add_image("mixture/plane", picture, entry["step"], dataformats="HWC")
        self._writer.flush()

    def _write(self, scalars: Mapping[str, float], step: int) -> None:
        # One event for all: one `add_scalar` each would take ten times as long, 6 ms at K = 8.
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._writer._get_file_writer().add_summary(Summary(value=values), step)  # type: ignore[no-untyped-call]  # torch's
