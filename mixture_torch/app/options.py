"""The options of the demo: from files, from `--set` and from the command line."""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from mixture_core.config import shown
from mixture_torch.app.demo import MIXTURE, DemoConfig
from mixture_torch.config import MixtureRuntimeConfig, find_block, parse_yaml, refuse_unknown

DEFAULTS = DemoConfig()
BLOCKS = {"runtime": ["runtime", "mixture"], "demo": ["demo"]}  # path of each block of options, by first key


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
