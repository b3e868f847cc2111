"""The command line: reads the options, makes the run folder and trains."""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import attrs
import typer
import yaml
from rich.console import Console
from rich.progress import Progress, TextColumn

from mixture_core.config import shown
from mixture_torch.app.demo import MIXTURE, DemoConfig, Job, check, prepare
from mixture_torch.app.faults import FAULTS
from mixture_torch.app.folders import CONFIG_FILE, DEFAULT_FOLDER, REPORT_FILE, find_run_folder, make_run_folder
from mixture_torch.app.messages import complain, one_line_errors, one_line_warnings
from mixture_torch.app.report import render
from mixture_torch.app.training import current_place, pick_device, process_group
from mixture_torch.app.view import INTERRUPTED, add_to, print_verdicts, run_app, write_page
from mixture_torch.config import MixtureRuntimeConfig, find_block, parse_yaml, refuse_unknown
from mixture_torch.files.disk import write_atomically
from mixture_torch.files.log import LOG_FILE
from mixture_torch.report.run import read_run

DEFAULTS = DemoConfig()
BLOCKS = {"runtime": ["runtime", "mixture"], "demo": ["demo"]}  # path of each block of options, by first key

# Markup would drop `[default: 80]` as an unknown style.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def run(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0; 2 after an error, in one line; or 130 after Ctrl-C.

    Args:
        arguments: The words after the program's name; None means `sys.argv[1:]`.
    """
    return run_app(app, arguments)


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


add_to(app)


def resolve(
    files: Iterable[Path], overrides: Iterable[str], options: Mapping[str, Any]
) -> tuple[DemoConfig, MixtureRuntimeConfig]:
    """Returns the configuration of a run.

    Files override the demo's defaults, `--set` overrides files, and the other options override both.

    Args:
        files: YAML files with a block `runtime: mixture:` or `demo:` or both; other keys are ignored.
        overrides: Options such as `runtime.mixture.K=12`.
        options: Options of the block `demo:`; None if not given.

    Raises:
        OSError: A file cannot be read.
        TypeError: A value has the wrong type.
        ValueError: A file is not YAML, a key is unknown, or a value is out of range.
    """
    given = {"demo": {key: value for key, value in options.items() if value is not None}}
    layers = [to_mapping(DEFAULTS, MIXTURE), *map(_read, files), *map(_parse_override, overrides), given]
    merged = functools.reduce(_merge, layers)
    refuse_unknown(merged["demo"], attrs.fields_dict(DemoConfig), place="demo")
    return DemoConfig(**merged["demo"]), MixtureRuntimeConfig.from_mapping(merged)


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], *, block: str = "") -> None:
    """Checks that a resumed run keeps its configuration; only the device may change.

    Args:
        before: The configuration of the run, from `to_mapping`.
        now: The configuration to resume with, with the same keys.
        block: Where both are in the configuration, such as `runtime.mixture.`.

    Raises:
        ValueError: An option has changed.
    """
    for key, value in before.items():
        if isinstance(value, Mapping):
            refuse_changes(value, now[key], block=f"{block}{key}.")
        elif key != "device" and value != now[key]:
            raise ValueError(
                f"`{block}{key}` of a resumed run must stay {value!r}, got {now[key]!r}; leave it out, or start a new "
                "run without `--resume`."
            )


def to_mapping(settings: DemoConfig, mixture: MixtureRuntimeConfig) -> dict[str, Any]:
    """Returns the configuration in the form that `resolve` reads from a file."""
    return {"runtime": {"mixture": attrs.asdict(mixture)}, "demo": attrs.asdict(settings)}


def _read(path: Path) -> Mapping[str, Any]:
    document = parse_yaml(path.read_bytes(), f"`{path}`")
    if not (isinstance(document, Mapping) and document.keys() & {*BLOCKS, "mixture"}):
        raise ValueError(f"`{path}` has no block `runtime: mixture:` or `demo:`.")
    block, _ = find_block({key: document[key] for key in ("runtime", "mixture") if key in document})
    return {"runtime": {"mixture": block}, "demo": document.get("demo")}


def _parse_override(text: str) -> Mapping[str, Any]:
    path, equals, value = text.partition("=")
    *block, key = path.strip().split(".")
    if not equals or block not in BLOCKS.values():
        raise ValueError(f"`--set` must look like runtime.mixture.K=12 or demo.epochs=3, got {shown(text)}.")
    parsed = {key: parse_yaml(value, f"`--set {path}`")}
    return functools.reduce(lambda inner, name: {name: inner}, reversed(block), parsed)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns `base` with the options of `over`, block by block; None is an empty block."""
    merged = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], Mapping):
            block = {} if over[key] is None else over[key]
            if not isinstance(block, Mapping):
                raise TypeError(f"`{key}` must be a mapping of options, got {shown(block)}.")
            merged[key] = _merge(base[key], block)
    return merged


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
        print_verdicts(run)
        write_page(folder / REPORT_FILE, run)
    except (OSError, ValueError, ImportError) as error:
        typer.echo(f"There is no report: {error}")
    else:
        typer.echo(f"Report: {folder / REPORT_FILE}")
