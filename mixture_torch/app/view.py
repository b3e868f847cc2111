"""The commands that show runs: `plot`, `report` and `watch`. Unlike the demo, they need no scikit-learn."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mixture_torch.app.folders import REPORT_FILE
from mixture_torch.app.messages import complain, one_line_errors
from mixture_torch.files.disk import write_atomically
from mixture_torch.report import terminal
from mixture_torch.report.run import Run, printable, read_runs
from mixture_torch.report.verdicts import verdicts

MISSING = 1  # exit code if a package is not installed
INTERRUPTED = 130  # exit code after Ctrl-C, as in shells
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer has no public name for it
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.", show_default=False)]


def run_app(app: typer.Typer, arguments: list[str] | None) -> int:
    """Runs a command and returns its exit code: 0; 2 after an error, in one line; or 130 after Ctrl-C.

    Args:
        app: The app with the command.
        arguments: The words after the program's name; None means `sys.argv[1:]`.
    """
    try:
        return app(arguments, prog_name="mixture-diagnostics", standalone_mode=False) or 0
    except typer.Abort:
        return INTERRUPTED
    except UsageError as error:
        complain(error.format_message())  # type: ignore[attr-defined]  # see UsageError
        return 2


def plot(
    runs: Runs,
    out: Annotated[Path, typer.Option(help="The picture, a .png, .pdf or .svg file.")],
) -> None:
    """Draws the series, the spectra and the components of one or more runs."""
    with one_line_errors(), _one_line_extras():
        from mixture_torch.report import figures

        if out.suffix not in (".png", ".pdf", ".svg"):
            raise ValueError(f"`--out` must end in .png, .pdf or .svg, got `{out}`.")
        picture = io.BytesIO()
        figures.plot(*read_runs(*runs)).savefig(picture, format=out.suffix[1:])
        write_atomically(out, picture.getvalue())
    typer.echo(printable(f"Picture: {out}"))


def report(
    runs: Runs,
    out: Annotated[Path | None, typer.Option(help=f"The page. [default: RUN/{REPORT_FILE}, of the first run]")] = None,
) -> None:
    """Prints the verdicts on one or more runs, and writes a page about them that opens without a network."""
    out = out or runs[0] / REPORT_FILE
    with one_line_errors(), _one_line_extras():
        if out.suffix not in (".html", ".htm"):
            raise ValueError(f"`--out` must end in .html, got `{out}`.")
        read = read_runs(*runs)
        print_verdicts(*read)
        write_page(out, *read)
    typer.echo(printable(f"Report: {out}"))


def watch(run: Annotated[Path, typer.Argument(help="The run folder.", show_default=False)]) -> None:
    """Shows the verdicts and the main series in the terminal while training goes on, until Ctrl-C."""
    with one_line_errors():
        terminal.watch(run)


def print_verdicts(*runs: Run) -> None:
    """Prints the verdicts of each run."""
    console = Console()
    for run in runs:
        if len(runs) > 1:
            console.print(run.name, markup=False, style="bold underline")
        console.print(terminal.of_verdicts(verdicts(run)))


def write_page(out: Path, *runs: Run) -> None:
    """Writes a page about these runs.

    Raises:
        ImportError: plotly or jinja2 is not installed.
    """
    from mixture_torch.report import page

    write_atomically(out, page.render(*runs).encode(errors="replace"))


@contextmanager
def _one_line_extras() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        complain(str(error))
        raise typer.Exit(MISSING) from error


def add_to(app: typer.Typer) -> None:
    """Adds these commands to an app."""
    for command in (plot, report, watch):
        app.command()(command)


def run(arguments: list[str] | None = None) -> int:
    """Runs one of these commands alone; see `run_app`."""
    return run_app(views, arguments)


views = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
add_to(views)
