"""The command line: `mixture-diagnostics`, with the commands `demo`, `plot`, `report` and `watch`."""

import io
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.progress import Progress, TextColumn

from mixture_torch.app.demo import Job, check, prepare
from mixture_torch.app.faults import FAULTS
from mixture_torch.app.folders import CONFIG_FILE, DEFAULT_FOLDER, REPORT_FILE, find_run_folder, make_run_folder
from mixture_torch.app.messages import complain, one_line_errors, one_line_warnings
from mixture_torch.app.options import DEFAULTS, refuse_changes, resolve, to_mapping
from mixture_torch.app.report import render
from mixture_torch.app.training import current_place, pick_device, process_group
from mixture_torch.files.disk import write_atomically
from mixture_torch.files.log import LOG_FILE
from mixture_torch.report import figures, page, terminal
from mixture_torch.report.run import Run, printable, read_run, read_runs
from mixture_torch.report.verdicts import verdicts

INTERRUPTED = 130  # exit code after Ctrl-C, as in shells
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer has no public name for it
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.", show_default=False)]

# Markup would drop `[default: 80]` as an unknown style.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def run(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0; 1 if a package is missing; 2 after another error; 130 after Ctrl-C.

    Args:
        arguments: The words after the program's name; None means `sys.argv[1:]`.
    """
    try:
        return app(arguments, prog_name="mixture-diagnostics", standalone_mode=False) or 0
    except typer.Abort:
        return INTERRUPTED
    except UsageError as error:
        complain(error.format_message())  # type: ignore[attr-defined]  # see UsageError
        return 2


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """Diagnoses training runs: fits a mixture of K Gaussians to the embeddings at each step."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file with a `runtime: mixture:` block.", exists=True, dir_okay=False, readable=True),
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="An option such as runtime.mixture.K=12; may be repeated.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help=f"Run folder. [default: {DEFAULT_FOLDER}, or {DEFAULT_FOLDER}-2, ...]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help=f"Passes over the images. [default: {DEFAULTS.epochs}]")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help=f"Images per step, over all processes. [default: {DEFAULTS.batch_size}]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help=f"Seed of all random numbers. [default: {DEFAULTS.seed}]")] = None,
    device: Annotated[
        str | None, typer.Option(help=f"Torch device, such as cpu or cuda. [default: {DEFAULTS.device}]")
    ] = None,
    fault: Annotated[
        str | None, typer.Option(help=f"What goes wrong: {', '.join(FAULTS)}. [default: {DEFAULTS.fault}]")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in `--out`, or the newest run in runs/.")
    ] = False,
) -> None:
    """Trains a small SimCLR encoder on handwritten digits and writes its mixture diagnostics.

    On several processes: torchrun --nproc-per-node 2 -m mixture_torch demo
    """
    options = {"epochs": epochs, "batch_size": batch_size, "seed": seed, "device": device, "fault": fault}
    is_main = current_place().rank == 0
    with one_line_errors():
        folder = find_run_folder(out) if resume else None
        own = [] if folder is None else [folder / CONFIG_FILE]
        given = [] if config is None else [config]
        settings, mixture = resolve([*own, *given], override or [], options)
        if resume:
            refuse_changes(to_mapping(*resolve(own, [], {})), to_mapping(settings, mixture))
        check(settings, mixture)
        if is_main and folder is None:
            folder = make_run_folder(out)
            document = yaml.safe_dump(to_mapping(settings, mixture), sort_keys=False)
            write_atomically(folder / CONFIG_FILE, document.encode())
    if is_main and settings.fault != "none":
        wrong = FAULTS[settings.fault]
        since = f"after {100 * wrong.onset:.0f} % of the epochs" if wrong.onset else "from the first step on"
        typer.echo(f"This run goes wrong: {wrong.summary}, {since}.")
    with one_line_warnings(), process_group(pick_device(settings.device)):
        with one_line_errors():
            job = prepare(settings, mixture, log_dir=folder, resume=resume)
        if is_main and resume:
            verb = "is resumed" if job.n_done < job.n_steps else "is complete"
            typer.echo(f"The run in {folder} {verb}: {job.n_done} of {job.n_steps} steps are done.")
        if job.n_done < job.n_steps:
            try:
                with one_line_errors(every_rank=True), job.estimator:
                    _train(job, show_progress=is_main)
            except KeyboardInterrupt:
                complain(
                    f"Interrupted; `mixture-diagnostics demo --resume --out {folder}` resumes after the last epoch."
                )
                raise typer.Exit(INTERRUPTED) from None
        if is_main and folder:
            _tell(job, folder)


@app.command()
def plot(
    runs: Runs,
    out: Annotated[Path, typer.Option(help="The picture, a .png, .pdf or .svg file.")],
) -> None:
    """Draws the series, the spectra and the components of one or more runs."""
    with one_line_warnings(), one_line_errors():
        if out.suffix not in (".png", ".pdf", ".svg"):
            raise ValueError(f"`--out` must end in .png, .pdf or .svg, got `{out}`.")
        picture = io.BytesIO()
        figures.plot(*read_runs(*runs)).savefig(picture, format=out.suffix[1:])
        write_atomically(out, picture.getvalue())
    typer.echo(printable(f"Picture: {out}"))


@app.command()
def report(
    runs: Runs,
    out: Annotated[Path | None, typer.Option(help=f"The page. [default: RUN/{REPORT_FILE}, of the first run]")] = None,
) -> None:
    """Prints the verdicts on one or more runs, and writes a page about them that opens without a network."""
    out = out or runs[0] / REPORT_FILE
    with one_line_warnings(), one_line_errors():
        if out.suffix not in (".html", ".htm"):
            raise ValueError(f"`--out` must end in .html, got `{out}`.")
        read = read_runs(*runs)
        _print_verdicts(*read)
        _write_page(out, *read)
    typer.echo(printable(f"Report: {out}"))


@app.command()
def watch(run: Annotated[Path, typer.Argument(help="The run folder.", show_default=False)]) -> None:
    """Shows the verdicts and the main series in the terminal while training goes on, until Ctrl-C."""
    with one_line_errors():
        terminal.watch(run)


def _print_verdicts(*runs: Run) -> None:
    console = Console()
    for run in runs:
        if len(runs) > 1:
            console.print(run.name, markup=False, style="bold underline")
        console.print(terminal.of_verdicts(verdicts(run)))


def _write_page(out: Path, *runs: Run) -> None:
    write_atomically(out, page.render(*runs).encode(errors="replace"))


def _train(job: Job, *, show_progress: bool) -> None:
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, console=Console(stderr=True), disable=not show_progress) as progress:
        bar = progress.add_task("SimCLR on digits", total=job.n_steps, completed=job.n_done, loss="")
        for done in job.steps:
            progress.update(bar, advance=1, loss=f"loss {float(done.loss):.3f}")


def _tell(job: Job, folder: Path) -> None:
    world = current_place().world
    if world > 1:
        whose = "all ranks" if job.estimator.config.cross_rank else "rank 0"
        typer.echo(
            f"{world} processes: each has its own part of the batch and its negatives; the mixture covers {whose}."
        )
    if job.estimator.enabled:
        Console().print(render(job.report()))
        typer.echo(f"Diagnostics: {folder / LOG_FILE} has one row per step, {job.n_steps} in all.")
        _conclude(folder)
    else:
        typer.echo("Diagnostics are off: `runtime.mixture.enabled` is false.")


def _conclude(folder: Path) -> None:
    """Prints the verdicts on a finished run, writes its report, and prints the path."""
    try:
        run = read_run(folder)
        _print_verdicts(run)
        _write_page(folder / REPORT_FILE, run)
    except (OSError, ValueError, ImportError) as error:
        typer.echo(f"There is no report: {error}")
    else:
        typer.echo(f"Report: {folder / REPORT_FILE}")
