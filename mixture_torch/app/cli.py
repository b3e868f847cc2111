"""The command line: from what a user typed to a configuration, a run folder, and a run."""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import attrs
import typer
import yaml
from rich.console import Console
from rich.progress import Progress, TextColumn

from mixture_torch.app.demo import MIXTURE, DemoConfig, Job, check, prepare
from mixture_torch.app.folders import CONFIG_FILE, DEFAULT_FOLDER, find_run_folder, make_run_folder
from mixture_torch.app.messages import complain, one_line_errors, one_line_warnings
from mixture_torch.app.report import render
from mixture_torch.app.training import current_place, pick_device, process_group
from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.files.disk import write_atomically
from mixture_torch.files.log import LOG_FILE

DEFAULTS = DemoConfig()
BLOCKS = {"runtime": ["runtime", "mixture"], "demo": ["demo"]}  # where options stand, by the first key
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # which has no public name in typer

# Markup would take `[default: 80]` for a style, and leave it out.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def run(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, or 2 after one line about what the user should change.

    Args:
        arguments: What follows the program's name; None is what it was started with.
    """
    try:
        return app(arguments, prog_name="mixture-diagnostics", standalone_mode=False) or 0
    except UsageError as error:
        complain(error.format_message())  # type: ignore[attr-defined]  # see UsageError
        return 2


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """Keeps a K-component Gaussian mixture of the embeddings that a training run makes."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file with a `runtime: mixture:` block.", exists=True, dir_okay=False, readable=True),
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="One option, such as runtime.mixture.K=12; may be repeated.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help=f"Run folder, new or empty. [default: {DEFAULT_FOLDER}, or -2, -3, ...]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help=f"[default: {DEFAULTS.epochs}]")] = None,
    batch_size: Annotated[int | None, typer.Option(help=f"Of all processes. [default: {DEFAULTS.batch_size}]")] = None,
    seed: Annotated[int | None, typer.Option(help=f"[default: {DEFAULTS.seed}]")] = None,
    device: Annotated[str | None, typer.Option(help=f"[default: {DEFAULTS.device}]")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in `--out`, or with the newest in runs/.")
    ] = False,
) -> None:
    """Trains a small SimCLR encoder on handwritten digits, with its mixture diagnostics written beside it.

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
            verb = "goes on" if job.n_done < job.n_steps else "is complete"
            typer.echo(f"The run in {folder} {verb}: {job.n_done} of {job.n_steps} steps are done.")
        if job.n_done < job.n_steps:
            with job.estimator:
                _train(job, show_progress=is_main)
        if is_main and folder:
            _tell(job, folder)


def resolve(
    files: Iterable[Path], overrides: Iterable[str], options: Mapping[str, Any]
) -> tuple[DemoConfig, MixtureRuntimeConfig]:
    """Returns the configuration of a run: the demo's own, under the files', under `--set`, under the other options.

    Args:
        files: YAML files, each over those before, with the blocks `runtime: mixture:` and `demo:`, or either; all else
            in them is left alone.
        overrides: Each like `runtime.mixture.K=12`.
        options: Of the block `demo:`, None where not given.

    Raises:
        OSError: A file cannot be read.
        TypeError: A value is of the wrong type.
        ValueError: A file is no YAML, a key is unknown, or a value is out of range.
    """
    given = {"demo": {key: value for key, value in options.items() if value is not None}}
    layers = [to_mapping(DEFAULTS, MIXTURE), *map(_read, files), *map(_parse_override, overrides), given]
    merged = functools.reduce(_merge, layers)
    return _demo_config(merged["demo"]), MixtureRuntimeConfig.from_mapping(merged)


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], *, block: str = "") -> None:
    """Makes sure that a run goes on with the configuration that it had, but for its device.

    Args:
        before: What it had, from `to_mapping`.
        now: What it is to have, with the same keys.
        block: Where in the configuration they stand.

    Raises:
        ValueError: An option is another.
    """
    for key, value in before.items():
        if isinstance(value, Mapping):
            refuse_changes(value, now[key], block=f"{block}{key}.")
        elif key != "device" and value != now[key]:
            raise ValueError(
                f"`{block}{key}` must stay {value!r} where a run goes on, got {now[key]!r}; leave it out, or start "
                "another run without `--resume`."
            )


def to_mapping(settings: DemoConfig, mixture: MixtureRuntimeConfig) -> dict[str, Any]:
    """Returns the configuration as `resolve` reads it from a file."""
    return {"runtime": {"mixture": attrs.asdict(mixture)}, "demo": attrs.asdict(settings)}


def _read(path: Path) -> Mapping[str, Any]:
    document = _parse_yaml(path.read_bytes(), f"`{path}`")
    if not (isinstance(document, Mapping) and document.keys() & BLOCKS):
        raise ValueError(f"`{path}` must be a mapping with a block `runtime: mixture:` or `demo:`, got neither.")
    return document


def _parse_override(text: str) -> Mapping[str, Any]:
    path, equals, value = text.partition("=")
    *block, key = path.strip().split(".")
    if not equals or block not in BLOCKS.values():
        raise ValueError(f"`--set` must look like runtime.mixture.K=12 or demo.epochs=3, got {text!r}.")
    parsed = {key: _parse_yaml(value, f"`--set {path}`")}
    return functools.reduce(lambda inner, name: {name: inner}, reversed(block), parsed)


def _parse_yaml(text: str | bytes, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        raise ValueError(f"{source} must be YAML: {error}") from error


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns `base` under `over`, block by block; an empty block, None in YAML, says nothing."""
    merged = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], Mapping):
            block = {} if over[key] is None else over[key]
            if not isinstance(block, Mapping):
                raise TypeError(f"`{key}` must be a mapping of options, got {block!r}.")
            merged[key] = _merge(base[key], block)
    return merged


def _demo_config(block: Mapping[str, Any]) -> DemoConfig:
    known = attrs.fields_dict(DemoConfig)
    if unknown := [key for key in block if key not in known]:
        raise ValueError(f"`{unknown[0]}` is not an option of demo; there are {', '.join(known)}.")
    return DemoConfig(**block)


def _train(job: Job, *, show_progress: bool) -> None:
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, console=Console(stderr=True), disable=not show_progress) as progress:
        bar = progress.add_task("SimCLR on digits", total=job.n_steps, completed=job.n_done, loss="")
        for done in job.steps:
            progress.update(bar, advance=1, loss=f"loss {float(done.loss):.3f}")


def _tell(job: Job, folder: Path) -> None:
    world = current_place().world
    if world > 1:
        whose = "all batches" if job.estimator.config.cross_rank else "rank 0's batches"
        typer.echo(f"{world} processes: each contrasts within its own share of a batch; the mixture is of {whose}.")
    if job.estimator.enabled:
        Console().print(render(job.report()))
        typer.echo(f"Diagnostics: {folder / LOG_FILE}, a row for each of {job.n_steps} steps.")
    else:
        typer.echo("Diagnostics are off (`runtime.mixture.enabled` is false): no table, and no mixture.csv.")
