"""The `runtime: mixture:` block of a training configuration."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import yaml

from mixture_core import MixtureConfig
from mixture_core.config import as_integer, boolean, boolean_or, integer, one_of

# Options of the library that this document was first written for, and why they are not here.
FOREIGN_KEYS = {
    "topR": "all K responsibilities are kept",
    "pi_floor": "weights are never floored, and a dead component is moved (`relocate`)",
    "revive_below": "`relocate` has replaced it; use `relocate: false` instead of 0, and leave out any other value",
    "K_subsample": "every row of a batch counts",
}


def _from_text(value: Any) -> Any:
    """Numbers that PyYAML reads as text, 1e-3 among them, as numbers; all else unchanged."""
    if not isinstance(value, str):
        return value
    for parse in (int, float):
        try:
            return parse(value)
        except ValueError:
            continue
    return value


@attrs.frozen(kw_only=True)
class MixtureRuntimeConfig(MixtureConfig):
    """All options of the estimator that can stand in a configuration file.

    Raises:
        TypeError: A value is of the wrong type; the message names the option, what was expected and what came.
        ValueError: A value is out of range; likewise.
    """

    # Whether the estimator does anything at all.
    enabled: bool = attrs.field(default=False, validator=boolean)
    # Whether responsibilities are written beside the CSV.
    store_scores: bool = attrs.field(default=False, validator=boolean)
    # One growing file of responsibilities, or one file per step.
    scores_mode: Literal["append", "per_step"] = attrs.field(default="append", validator=one_of("append", "per_step"))
    # Whether the statistics are those of the embeddings of all ranks, and what these exchange: embeddings (`gather`,
    # which is what true means), or sums over them (`reduce`).
    cross_rank: bool | Literal["gather", "reduce"] = attrs.field(
        default=False, validator=boolean_or("gather", "reduce")
    )
    # Seed of the estimator's own random numbers, which only choose the first centroids.
    seed: int = attrs.field(default=0, converter=as_integer, validator=integer(at_least=0, at_most=2**64 - 1))
    # Whether ignored rows raise instead of being counted.
    strict: bool = attrs.field(default=False, validator=boolean)
    # Whether steps on a GPU are replayed as CUDA graphs.
    compile: bool = attrs.field(default=False, validator=boolean)
    # D, where it is known beforehand: a state_dict then has its final shapes before the first update.
    dim: int | None = attrs.field(
        default=None,
        converter=attrs.converters.optional(as_integer),
        validator=attrs.validators.optional(integer(at_least=1)),
    )

    @property
    def core(self) -> MixtureConfig:
        """The part that is the mixture's, without the part that is the run's."""
        return MixtureConfig(**{field.name: getattr(self, field.name) for field in attrs.fields(MixtureConfig)})

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any] | None) -> "MixtureRuntimeConfig":
        """Returns the configuration that a mapping holds; what it leaves out has its default.

        Args:
            mapping: The block itself, or a whole configuration that holds it under `runtime: mixture:` and in which
                all else is left alone. Any Mapping, OmegaConf's too. None, and a missing block, are all defaults.

        Raises:
            TypeError: It is no mapping, or a value is of the wrong type.
            ValueError: A key is unknown, or a value is out of range.
        """
        block = _find_block(mapping)
        known = attrs.fields_dict(cls)
        for key in block:
            if key not in known:
                raise ValueError(_unknown_key(key, list(known)))
        numeric = {name for name, field in known.items() if field.type in (int, float, int | None)}
        return cls(**{key: _from_text(value) if key in numeric else value for key, value in block.items()})

    @classmethod
    def from_yaml(cls, path: str | Path) -> "MixtureRuntimeConfig":
        """Returns the configuration in a YAML file, as `from_mapping` does.

        Args:
            path: The file.

        Raises:
            OSError: The file cannot be read.
            TypeError: It holds no mapping, or a value is of the wrong type.
            ValueError: It is no YAML, a key is unknown, or a value is out of range.
        """
        try:
            document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"`{path}` must be a YAML file: {' '.join(str(error).split())}") from error
        return cls.from_mapping(document)


def _find_block(mapping: Any) -> Mapping[str, Any]:
    block = _as_mapping(mapping, "The configuration")
    if "runtime" in block:
        runtime = _as_mapping(block["runtime"], "`runtime`")
        if "mixture" not in runtime and (near := difflib.get_close_matches("mixture", map(str, runtime), cutoff=0.8)):
            raise ValueError(f"`runtime` must hold the block `mixture`, got `{near[0]}`; did you mean `mixture`?")
        return _as_mapping(runtime.get("mixture"), "`runtime.mixture`")
    return _as_mapping(block["mixture"], "`mixture`") if "mixture" in block else block


def _as_mapping(value: Any, place: str) -> Mapping[str, Any]:
    """An empty block, None in YAML, is one with nothing in it."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{place} must be a mapping of options, got {value!r}.")
    return value


def _unknown_key(key: object, known: list[str]) -> str:
    if key in FOREIGN_KEYS:
        return f"`{key}` is not an option here: {FOREIGN_KEYS[str(key)]}. Remove it from runtime.mixture."
    by_lower_case = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(key).lower(), by_lower_case, n=1)
    hint = f"did you mean `{by_lower_case[near[0]]}`? There" if near else "there"
    return f"`{key}` is not an option of runtime.mixture; {hint} are {', '.join(known)}."
