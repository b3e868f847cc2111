"""The command line: from what a user typed to a configuration, a run folder, and a run."""

import functools
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import attrs
import typer
import yaml
from rich.console import Console
from rich.progress import Progress, TextColumn

from mixture_torch.app.demo import MIXTURE, DemoConfig, Job, check, prepare
from mixture_torch.app.report import render
from mixture_torch.app.training import current_place, pick_device, process_group
from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.disk import write_atomically
from mixture_torch.readers import LIST_FILE, LOG_FILE, SHARD_FOLDER

DEFAULT_FOLDER = Path("runs/demo")
CONFIG_FILE = "config.yaml"
DEFAULTS = DemoConfig()
BLOCKS = {"runtime": ["runtime", "mixture"], "demo": ["demo"]}  # where options stand, by the first key
WRITTEN = (CONFIG_FILE, LOG_FILE, LIST_FILE, SHARD_FOLDER)
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # which has no public name in typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def run(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, or 2 after one line about what the user should change.

    Args:
        arguments: What follows the program's name; None is what it was started with.
    """
    try:
        return app(arguments, prog_name="mixture-diagnostics", standalone_mode=False) or 0
    except UsageError as error:
        _complain(error.format_message())  # type: ignore[attr-defined]  # see UsageError
        return 2


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """Keeps a K-component Gaussian mixture of the embeddings that a training run makes."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    config: Annotated[Path | None, typer.Option(help="YAML file with a `runtime: mixture:` block.")] = None,
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
) -> None:
    """Trains a small SimCLR encoder on handwritten digits, with its mixture diagnostics written beside it.

    On several processes: torchrun --nproc-per-node 2 -m mixture_torch demo
    """
    options = {"epochs": epochs, "batch_size": batch_size, "seed": seed, "device": device}
    is_main = current_place().rank == 0
    with _one_line_errors():
        settings, mixture = resolve(config, override or [], options)
        check(settings, mixture)
        folder = make_run_folder(out) if is_main else None
    if folder is not None:
        document = yaml.safe_dump(to_mapping(settings, mixture), sort_keys=False)
        write_atomically(folder / CONFIG_FILE, document.encode())
    with process_group(pick_device(settings.device)):
        job = prepare(settings, mixture, log_dir=folder)
        with job.estimator:
            _train(job, show_progress=is_main)
        if folder is not None:
            _tell(job, folder)


def resolve(
    config: Path | None, overrides: Iterable[str], options: Mapping[str, Any]
) -> tuple[DemoConfig, MixtureRuntimeConfig]:
    """Returns the configuration of a run: the demo's own, under the file's, under `--set`, under the other options.

    Args:
        config: A YAML file with the blocks `runtime: mixture:` and `demo:`, or either; all else in it is left alone.
        overrides: Each like `runtime.mixture.K=12`.
        options: Of the block `demo:`, None where not given.

    Raises:
        OSError: The file cannot be read.
        TypeError: A value is of the wrong type.
        ValueError: The file is no YAML, a key is unknown, or a value is out of range.
    """
    layers: list[Mapping[str, Any]] = [to_mapping(DEFAULTS, MIXTURE)]
    if config is not None:
        layers.append(_read(config))
    layers.extend(map(_parse_override, overrides))
    layers.append({"demo": {key: value for key, value in options.items() if value is not None}})
    merged = functools.reduce(_merge, layers)
    return _demo_config(merged["demo"]), MixtureRuntimeConfig.from_mapping(merged)


def to_mapping(settings: DemoConfig, mixture: MixtureRuntimeConfig) -> dict[str, Any]:
    """Returns the configuration as `resolve` reads it from a file."""
    return {"runtime": {"mixture": attrs.asdict(mixture)}, "demo": attrs.asdict(settings)}


def make_run_folder(out: Path | None) -> Path:
    """Returns a folder, which is there now, without anything that a run writes.

    Args:
        out: The folder; None is the first of runs/demo, runs/demo-2, ... that is not there yet.

    Raises:
        OSError: The folder cannot be made.
        ValueError: It holds a run already.
    """
    if out is None:
        numbered = (DEFAULT_FOLDER.with_name(f"{DEFAULT_FOLDER.name}-{n}") for n in itertools.count(2))
        out = next(folder for folder in itertools.chain([DEFAULT_FOLDER], numbered) if not folder.exists())
    out.mkdir(parents=True, exist_ok=True)
    if taken := [name for name in WRITTEN if (out / name).exists()]:
        raise ValueError(f"`--out` must be a folder without a run, got `{out}` with `{taken[0]}`; choose another.")
    return out


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


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Ends the program with one line about what the user should change."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        if current_place().rank == 0:
            _complain(str(error))
        raise typer.Exit(2) from error


def _complain(message: str) -> None:
    print("Error:", " ".join(message.split()), file=sys.stderr)


def _train(job: Job, *, show_progress: bool) -> None:
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, console=Console(stderr=True), disable=not show_progress) as progress:
        bar = progress.add_task("SimCLR on digits", total=job.n_steps, loss="")
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
