"""A run in the terminal: its verdicts, and its main series drawn with characters."""

import time
from pathlib import Path

import attrs
import numpy as np
import numpy.typing as npt
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.text import Text

from mixture_torch.files.extra import EXTRA_FILE
from mixture_torch.files.log import LOG_FILE
from mixture_torch.report.run import Run, printable, read_run
from mixture_torch.report.series import buckets
from mixture_torch.report.verdicts import Verdict, verdicts

STYLES = {"wrong": "bold red", "changed": "bold yellow", "fine": "bold green", "unknown": "bold"}
SERIES = ("trace_T", "share_B", "participation_ratio", "pi_min", "pi_max", "trace_B", "opnorm_B")
BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
PLAIN = "_.-=+*%#"  # if the terminal has only ASCII
NAME, NUMBER = 20, 10  # width of the columns of names and numbers, in characters
SHORTEST, LONGEST = 10, 60  # width of a drawn series, in characters
EVERY = 1.0  # seconds between two looks at a folder
IDLE = 5  # least pause between two looks, relative to the time that one takes


@attrs.frozen(eq=False)
class Series:
    """The main series of a run, one line each: a drawing from lowest to highest, then as many numbers as fit."""

    run: Run

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        """Yields a head and a line for each series that the run has."""
        chars = PLAIN if options.ascii_only else BLOCKS
        heads = ("now", "lowest", "highest") if options.max_width >= NAME + SHORTEST + 3 * NUMBER else ("now",)
        width = max(SHORTEST, min(LONGEST, options.max_width - NAME - len(heads) * NUMBER))
        yield _row(" " * (NAME + width), *heads)
        columns = self.run.log | (self.run.extra or {})
        for name in SERIES:
            values = columns.get(name, np.empty(0))
            finite = values[np.isfinite(values)]
            if len(finite):
                line = "".join(" " if level is None else chars[level] for level in levels(values, width))
                numbers = [f"{number:.4g}" for number in (values[-1], finite.min(), finite.max())]
                yield _row(f"{name:<{NAME}}{line:<{width}}", *numbers[: len(heads)])


def _row(line: str, *numbers: str) -> Text:
    return Text(line + "".join(f"{number:>{NUMBER}}" for number in numbers), no_wrap=True, overflow="crop")


def levels(values: npt.NDArray[np.float64], width: int) -> list[int | None]:
    """Returns a height from 0 to 7 for each of at most `width` buckets: that of the value furthest from the median."""
    finite = np.where(np.isfinite(values), values, np.nan)
    _, low, high = buckets(np.arange(len(values)), finite, width)
    least, middle, most = np.nanmin(finite), np.nanmedian(finite), np.nanmax(finite)
    furthest = np.where(high - middle > middle - low, high, low)
    heights = 7 * ((furthest - least) / (most - least)) if most > least else furthest * 0 + 3
    return [None if np.isnan(height) else round(height) for height in heights.tolist()]


def of_verdicts(found: tuple[Verdict, ...]) -> RenderableType:
    """Returns verdicts for `rich.print`."""
    parts: list[RenderableType] = []
    for verdict in found:
        parts.append(Text.assemble((f"{verdict.level}: ", STYLES[verdict.level]), (verdict.title, "bold")))
        parts.append(Padding(Text(verdict.text), (0, 0, 0, 2)))
    return Group(*parts)


def of_run(run: Run) -> RenderableType:
    """Returns the verdicts and the main series of a run for `rich.print`."""
    found, step = verdicts(run), run.log["step"]
    steps = f"steps {step[0]} to {step[-1]}, K = {run.log['K'][-1]}" if len(step) else "no steps yet"
    head = Text(f"{run.name}: {steps}" + ("" if run.D is None else f", D = {run.D}"))
    lacks = [Text(sentence, style="dim") for sentence in run.missing]
    return Group(head, of_verdicts(found), Series(run), *lacks)


def watch(folder: Path, *, console: Console | None = None, every: float = EVERY) -> None:
    """Shows a run while it goes on, until Ctrl-C. If the output is not a terminal, prints it once.

    If the folder has no rows, is missing or cannot be read, this waits.

    Args:
        folder: The run folder.
        console: Where to show it; None is standard output.
        every: Seconds between two looks; longer if reading is slow.

    Raises:
        FileNotFoundError: The output is not a terminal, and the folder has no `mixture.csv`.
        ValueError: The output is not a terminal, and the folder cannot be read.
    """
    console = console or Console()
    if not console.is_terminal:
        console.print(of_run(read_run(folder)))
        return
    seen: object = None
    try:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                began = time.monotonic()
                if (stamp := _stamp(folder)) != seen:
                    seen = stamp
                    live.update(_look(folder), refresh=True)
                time.sleep(max(every, IDLE * (time.monotonic() - began)))
    except KeyboardInterrupt:
        return


def _look(folder: Path) -> RenderableType:
    try:
        run = read_run(folder)
    except FileNotFoundError:
        return Text(f"Waiting for the first row of {printable(str(folder / LOG_FILE))}. Ctrl-C stops watching.")
    except (OSError, ValueError, MemoryError) as error:
        return Text(f"{printable(str(error))} Waiting. Ctrl-C stops watching.")
    return Group(of_run(run), Text("Ctrl-C stops watching; the run goes on.", style="dim"))


def _stamp(folder: Path) -> object:
    """What changes when a row is written."""
    stamps: list[object] = []
    for name in (LOG_FILE, EXTRA_FILE):
        try:
            status = (folder / name).stat()
            stamps.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            stamps.append(None)
    return stamps
