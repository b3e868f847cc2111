"""The `runtime: mixture:` block, in all the shapes in which it comes."""

import pickle
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import numpy as np
import pytest
from omegaconf import OmegaConf

from mixture_core import MixtureConfig
from mixture_torch import MixtureRuntimeConfig, MixtureStats

# Every option, with a value that is not its default.
OTHERS: dict[str, Any] = {
    "K": 5,
    "assigner": "label_supervised",
    "mode": "per_batch",
    "ema_decay": 0.5,
    "max_assign_iters": 4,
    "relocate": False,
    "compile": True,
    "enabled": True,
    "store_scores": True,
    "scores_mode": "per_step",
    "cross_rank": "reduce",
    "dim": 3,
    "seed": 7,
    "strict": True,
}


def load(tmp_path: Path, text: str) -> MixtureRuntimeConfig:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode())
    return MixtureRuntimeConfig.from_yaml(path)


def test_config_tests_cover_every_option() -> None:
    assert {key for key, value in OTHERS.items() if value != getattr(MixtureRuntimeConfig(), key)} == set(
        attrs.fields_dict(MixtureRuntimeConfig)
    )


def test_config_reads_every_key() -> None:
    assert attrs.asdict(MixtureRuntimeConfig.from_mapping(OTHERS)) == OTHERS


@pytest.mark.parametrize("key", OTHERS)
def test_config_leaves_other_keys_at_their_defaults(key: str) -> None:
    changed = attrs.asdict(MixtureRuntimeConfig.from_mapping({key: OTHERS[key]}))
    assert changed == attrs.asdict(MixtureRuntimeConfig()) | {key: OTHERS[key]}


def test_config_core_is_the_part_of_the_mixture() -> None:
    core = MixtureRuntimeConfig.from_mapping(OTHERS).core
    assert type(core) is MixtureConfig
    assert attrs.asdict(core) == {key: OTHERS[key] for key in attrs.fields_dict(MixtureConfig)}


def test_estimator_takes_every_option_from_its_config(tmp_path: Path) -> None:
    config = MixtureRuntimeConfig.from_mapping(OTHERS)
    assert MixtureStats.from_config(config, log_dir=tmp_path).config == config


def test_config_is_hashable_and_pickles() -> None:
    config = MixtureRuntimeConfig.from_mapping(OTHERS)
    assert hash(pickle.loads(pickle.dumps(config))) == hash(config)


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        MappingProxyType,
        OmegaConf.create,
        lambda block: {"mixture": block},
        lambda block: {"runtime": {"mixture": block}},
        lambda block: {"runtime": {"mixture": block, "profiler": {"K": -1}}, "model": {"K": "resnet"}},
        lambda block: OmegaConf.create({"runtime": {"mixture": block}, "optimizer": {"lr": 0.1}}),
    ],
    ids=["dict", "proxy", "omegaconf", "mixture", "runtime", "whole document", "whole omegaconf"],
)
def test_config_finds_its_block(wrap: Any) -> None:
    assert MixtureRuntimeConfig.from_mapping(wrap({"K": 5, "enabled": True})) == MixtureRuntimeConfig(K=5, enabled=True)


def test_config_follows_interpolations() -> None:
    document = OmegaConf.create({"classes": 5, "runtime": {"mixture": {"K": "${classes}"}}})
    assert MixtureRuntimeConfig.from_mapping(document).K == 5


@pytest.mark.parametrize("strict", [True, False])
def test_config_without_its_block_in_omegaconf_is_the_default(strict: bool) -> None:
    document = OmegaConf.create({"runtime": {"profiler": True}})
    OmegaConf.set_struct(document, strict)
    assert MixtureRuntimeConfig.from_mapping(document) == MixtureRuntimeConfig()


@pytest.mark.parametrize(
    "text", ["", "# nothing", "---\n", "runtime:", "runtime:\n  mixture:", "mixture:", "{}", "null"]
)
def test_config_of_an_empty_document_is_the_default(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == MixtureRuntimeConfig()


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("ema_decay: 1e-3", "ema_decay", 0.001),
        ("ema_decay: 5.0E-1", "ema_decay", 0.5),
        ("ema_decay: '0.25'", "ema_decay", 0.25),
        ("K: '12'", "K", 12),
        ("seed: 0x10", "seed", 16),
        ("K: 1_0", "K", 10),
    ],
)
def test_config_reads_numbers_however_they_are_written(tmp_path: Path, text: str, key: str, value: float) -> None:
    found = getattr(load(tmp_path, text), key)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    "text", ["K: '8.5'", "K: 8.0", "K: eight", "K: '0x8g'", "enabled: 'true'", "enabled: 1", "K: true"]
)
def test_config_guesses_no_types(tmp_path: Path, text: str) -> None:
    with pytest.raises(TypeError, match=rf"^`{text.split(':')[0]}` must be .*, got .*\.$"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("key", "value", "plain"),
    [("K", np.int64(5), int), ("ema_decay", np.float32(0.5), float), ("ema_decay", np.float64(0.5), float)],
)
def test_config_takes_numbers_of_numpy(key: str, value: Any, plain: type) -> None:
    assert type(getattr(MixtureRuntimeConfig(**{key: value}), key)) is plain


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("k", "K"),
        ("ema_deacy", "ema_decay"),
        ("max_assign_iter", "max_assign_iters"),
        ("score_mode", "scores_mode"),
        ("crossrank", "cross_rank"),
        ("Enabled", "enabled"),
    ],
)
def test_config_names_the_nearest_key(key: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"^`{key}` is not an option of runtime\.mixture; did you mean `{nearest}`\?"):
        MixtureRuntimeConfig.from_mapping({key: 1})


@pytest.mark.parametrize("key", [1, None, "", "Q", "x" * 50, ("a", 1)])
def test_config_refuses_any_other_key(key: Any) -> None:
    with pytest.raises(ValueError, match=r"is not an option of runtime\.mixture; there are K, "):
        MixtureRuntimeConfig.from_mapping({key: 1})


@pytest.mark.parametrize("key", ["topR", "pi_floor", "K_subsample"])
def test_config_refuses_keys_of_mfcl_with_a_line_of_their_own(key: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^`{key}` is not an option here: .*\. Remove it from runtime\.mixture\.$"
    ) as error:
        MixtureRuntimeConfig.from_mapping({"runtime": {"mixture": {key: 1}}})
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("document", "place"),
    [
        ([], "The configuration"),
        ("K: 8", "The configuration"),
        (5, "The configuration"),
        ({"runtime": [1]}, "`runtime`"),
        ({"runtime": {"mixture": "on"}}, "`runtime.mixture`"),
        ({"runtime": {"mixture": True}}, "`runtime.mixture`"),
        ({"mixture": 8}, "`mixture`"),
    ],
)
def test_config_refuses_what_is_no_mapping(document: Any, place: str) -> None:
    with pytest.raises(TypeError, match=rf"^{place} must be a mapping of options, got .*\.$"):
        MixtureRuntimeConfig.from_mapping(document)


@pytest.mark.parametrize(
    "text", ["K: [1", "K: 8\n\tmode: ema", "a: b: c", "K: !!python/object:os.system 1", "K: 1\n---\nK: 2"]
)
def test_config_says_in_one_line_what_is_no_yaml(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"^`.*run\.yaml` must be a YAML file: ") as error:
        load(tmp_path, text)
    assert "\n" not in str(error.value)


def test_config_says_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00K")
    with pytest.raises(ValueError, match=r"run\.yaml` must be a YAML file: "):
        MixtureRuntimeConfig.from_yaml(path)


def test_config_without_a_file_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        MixtureRuntimeConfig.from_yaml(tmp_path / "none.yaml")


def test_config_takes_a_path_as_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("K: 5")
    assert MixtureRuntimeConfig.from_yaml(str(tmp_path / "run.yaml")).K == 5
