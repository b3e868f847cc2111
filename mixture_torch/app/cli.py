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
from mixture_torch.app.folders import CONFIG_FILE, DEFAULT_FOLDER, find_run_folder, make_run_folder
from mixture_torch.app.messages import complain, one_line_errors, one_line_warnings
from mixture_torch.app.report import render
from mixture_torch.app.training import current_place, pick_device, process_group
from mixture_torch.config import MixtureRuntimeConfig, find_block, parse_yaml, refuse_unknown
from mixture_torch.files.disk import write_atomically
from mixture_torch.files.log import LOG_FILE

DEFAULTS = DemoConfig()
BLOCKS = {"runtime": ["runtime", "mixture"], "demo": ["demo"]}  # path of each block of options, by its first key
INTERRUPTED = 130  # exit code after Ctrl-C, as in shells
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer has no public name for it

# Markup would drop `[default: 80]` as an unknown style.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def run(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0; 2 after an error, in one line; or 130 after Ctrl-C.

    Args:
        arguments: The words after the program's name; None takes them from the process.
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
    """Diagnostics of a training run: a K-component Gaussian mixture of its embeddings at every step."""
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
        int | None, typer.Option(help=f"Images per step, on all processes. [default: {DEFAULTS.batch_size}]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help=f"Seed of all random numbers. [default: {DEFAULTS.seed}]")] = None,
    device: Annotated[
        str | None, typer.Option(help=f"A device of torch, such as cpu or cuda. [default: {DEFAULTS.device}]")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in `--out`, or the newest run in runs/.")
    ] = False,
) -> None:
    """Trains a small SimCLR encoder on handwritten digits and writes its mixture diagnostics.

    On several processes: torchrun --nproc-per-node 2 -m mixture_torch demo
    """
    options = {"epochs": epochs, "batch_size": batch_size, "seed": seed, "device": device}
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


def resolve(
    files: Iterable[Path], overrides: Iterable[str], options: Mapping[str, Any]
) -> tuple[DemoConfig, MixtureRuntimeConfig]:
    """Returns the configuration of a run.

    The files override the demo's defaults, `--set` overrides the files, and the other options override all.

    Args:
        files: YAML files with a block `runtime: mixture:` or `demo:` or both; other keys are ignored.
        overrides: Options such as `runtime.mixture.K=12`.
        options: Options of the block `demo:`; None is an option that was not given.

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
    """Checks that a run is resumed with its own configuration; only the device may change.

    Args:
        before: The configuration of the run, from `to_mapping`.
        now: The configuration to resume with, with the same keys.
        block: The path of the two in the configuration.

    Raises:
        ValueError: An option has changed.
    """
    for key, value in before.items():
        if isinstance(value, Mapping):
            refuse_changes(value, now[key], block=f"{block}{key}.")
        elif key != "device" and value != now[key]:
            raise ValueError(
                f"`{block}{key}` of a resumed run must stay {value!r}, got {now[key]!r}; leave it out or start "
                "another run without `--resume`."
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
            f"{world} processes: each contrasts views within its own share of a batch; the mixture is of {whose}."
        )
    if job.estimator.enabled:
        Console().print(render(job.report()))
        typer.echo(f"Diagnostics: {folder / LOG_FILE} has one row per step, {job.n_steps} in all.")
    else:
        typer.echo("Diagnostics are off: `runtime.mixture.enabled` is false.")
