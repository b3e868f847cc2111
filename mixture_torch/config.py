"""The `runtime: mixture:` block of a training configuration."""

import difflib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import attrs
import yaml

from mixture_core import MixtureConfig
from mixture_core.config import as_integer, boolean, boolean_or, integer, one_of, shown

# Options of mfcl, and why they do not exist here.
FOREIGN_KEYS = {
    "topR": "all K responsibilities are kept",
    "pi_floor": "weights have no floor, and `relocate` moves dead components",
    "revive_below": "`relocate` has replaced it; instead of 0, use `relocate: false`",
    "K_subsample": "every row of a batch counts",
}
MOST_SHOWN = 10  # unknown keys in one error message


def _from_text(value: Any) -> Any:
    """Returns a number that PyYAML read as text, such as 1e-3, as a number, and any other value unchanged."""
    for parse in (int, float) if isinstance(value, str) else ():
        with suppress(ValueError):
            return parse(value)
    return value


@attrs.frozen(kw_only=True)
class MixtureRuntimeConfig(MixtureConfig):
    """All options of the estimator that a configuration file can set.

    Raises:
        TypeError: A value has the wrong type; the message names the option, the expected type and the value.
        ValueError: A value is out of range; the message names the option, the range and the value.

    Example:
        >>> from mixture_torch import MixtureRuntimeConfig
        >>> config = MixtureRuntimeConfig.from_mapping({"runtime": {"mixture": {"enabled": True, "K": 12}}})
        >>> config.K, config.mode
        (12, 'ema')
    """

    # Whether the estimator does anything.
    enabled: bool = attrs.field(default=False, validator=boolean)
    # Whether responsibilities are written too.
    store_scores: bool = attrs.field(default=False, validator=boolean)
    # One growing file of responsibilities, or one file per step.
    scores_mode: Literal["append", "per_step"] = attrs.field(default="append", validator=one_of("append", "per_step"))
    # What becomes of rows that `log_dir` has already, unless a checkpoint was loaded.
    existing: Literal["append", "aside", "refuse"] = attrs.field(
        default="append", validator=one_of("append", "aside", "refuse")
    )
    # Whether statistics cover the embeddings of all ranks, and what ranks exchange: embeddings (`gather`, or true), or
    # sums over them (`reduce`).
    cross_rank: bool | Literal["gather", "reduce"] = attrs.field(
        default=False, validator=boolean_or("gather", "reduce")
    )
    # Seed of the estimator's own random numbers, which choose the first means and nothing else.
    seed: int = attrs.field(default=0, converter=as_integer, validator=integer(at_least=0, at_most=2**64 - 1))
    # Whether ignored rows, a failing disk and lack of memory raise instead of warning.
    strict: bool = attrs.field(default=False, validator=boolean)
    # Whether steps on a GPU are replayed as CUDA graphs.
    compile: bool = attrs.field(default=False, validator=boolean)
    # Whether `mixture_extra.csv`, snapshots and `mixture_last.pt` are written, and alarms raised.
    extra: bool = attrs.field(default=True, validator=boolean)
    # Steps between two snapshots of the mixture; None takes one at each `flush`.
    snapshot_every: int | None = attrs.field(
        default=None,
        converter=attrs.converters.optional(as_integer),
        validator=attrs.validators.optional(integer(at_least=1)),
    )
    # D, if it is known beforehand: a state_dict then has its final shapes before the first update.
    dim: int | None = attrs.field(
        default=None,
        converter=attrs.converters.optional(as_integer),
        validator=attrs.validators.optional(integer(at_least=1)),
    )

    @property
    def core(self) -> MixtureConfig:
        """The options of the mixture itself, which are those that `mixture_core` knows."""
        return MixtureConfig(**{field.name: getattr(self, field.name) for field in attrs.fields(MixtureConfig)})

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any] | None) -> "MixtureRuntimeConfig":
        """Returns the configuration in a mapping; options that it does not set keep their defaults.

        Args:
            mapping: The options themselves, or a whole training configuration with the options under
                `runtime: mixture:` or under `mixture:`; all its other keys are ignored. OmegaConf's mappings work
                too. None or an empty block sets nothing.

        Raises:
            TypeError: `mapping` is no mapping, or a value has the wrong type.
            ValueError: A key is unknown, or a value is out of range.
        """
        block, place = find_block(mapping)
        refuse_unknown(block, attrs.fields_dict(cls), place=place)
        return cls(**{key: _from_text(_value(block, key)) for key in block})

    @classmethod
    def from_yaml(cls, path: str | Path) -> "MixtureRuntimeConfig":
        """Returns the configuration in a YAML file; see `from_mapping` for where the options may go.

        Args:
            path: The file.

        Raises:
            OSError: The file cannot be read.
            TypeError: The file holds no mapping, or a value has the wrong type.
            ValueError: The file is not YAML, a key is unknown, or a value is out of range.
        """
        return cls.from_mapping(parse_yaml(Path(path).read_bytes(), f"`{path}`"))


def parse_yaml(text: str | bytes, source: str) -> Any:
    """Returns what a YAML document holds, or raises a ValueError that names its `source`."""
    try:
        return yaml.safe_load(text)
    except MemoryError:
        raise
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error
    except Exception as error:  # PyYAML lets many kinds escape: dates, tags and integers out of range, deep nesting
        raise ValueError(f"{source} is not valid YAML: {type(error).__name__}: {error}") from error


def refuse_unknown(block: Mapping[Any, Any], known: Iterable[str], *, place: str) -> None:
    """Raises a ValueError that lists the unknown keys of a block at `place`, with the nearest option of each."""
    names = list(known)
    unknown = [key for key in block if key not in names]
    if unknown:
        listed = ", ".join(f"`{_name(key)}`{_hint(key, names)}" for key in unknown[:MOST_SHOWN])
        more = f" and {len(unknown) - MOST_SHOWN} more" if len(unknown) > MOST_SHOWN else ""
        what = "Unknown option" if len(unknown) == 1 else "Unknown options"
        raise ValueError(f"{what} in {place}: {listed}{more}. The options are {', '.join(names)}.")


def _hint(key: object, names: list[str]) -> str:
    if isinstance(key, str) and key in FOREIGN_KEYS:
        return f" (remove it: {FOREIGN_KEYS[key]})"
    by_lower_case = {name.lower(): name for name in names}
    near = difflib.get_close_matches(_name(key).lower(), by_lower_case, n=1)
    return f" (did you mean `{by_lower_case[near[0]]}`?)" if near else ""


def _value(block: Mapping[Any, Any], key: Any) -> Any:
    """Returns an option; an interpolation of OmegaConf's may lead nowhere."""
    try:
        return block[key]
    except Exception as error:
        raise ValueError(f"`{_name(key)}` cannot be read: {' '.join(str(error).split())}.") from error


def _name(key: object) -> str:
    return shown(key).strip("'\"")


def find_block(mapping: Any) -> tuple[Mapping[Any, Any], str]:
    """Returns the options in a configuration, and where they stand."""
    document = _as_mapping(mapping, "The configuration")
    if "runtime" in document:
        runtime = _as_mapping(document["runtime"], "`runtime`")
        if "mixture" in runtime:
            return _as_mapping(runtime["mixture"], "`runtime.mixture`"), "runtime.mixture"
        if "mixture" not in document:
            if near := difflib.get_close_matches("mixture", map(_name, runtime), cutoff=0.8, n=1):
                raise ValueError(f"`runtime` has no block `mixture`, but `{near[0]}`; did you mean `mixture`?")
            return {}, "runtime.mixture"
    if "mixture" in document:
        return _as_mapping(document["mixture"], "`mixture`"), "mixture"
    return document, "the configuration"


def _as_mapping(value: Any, place: str) -> Mapping[Any, Any]:
    """Returns a block; an empty one is None in YAML."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{place} must be a mapping of options, got {shown(value)}.")
    return value
