"""The options: where a configuration may hold them, and what is said of wrong ones."""

import time
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import pytest
import torch
from omegaconf import OmegaConf

from mixture_torch import MixtureRuntimeConfig, MixtureStats, activate
from tests.wrapper.samples import BOMB, assert_says, estimator

NAN = float("nan")

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
    "extra": False,
    "snapshot_every": 5,
    "existing": "aside",
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


def test_estimator_takes_every_option_from_its_config(tmp_path: Path) -> None:
    config = MixtureRuntimeConfig.from_mapping(OTHERS)
    assert attrs.asdict(config) == OTHERS
    config = attrs.evolve(config, extra=True)  # without it, `snapshot_every` is refused
    assert MixtureStats.from_config(config, log_dir=tmp_path).config == config


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


def test_config_reports_all_unknown_options_at_once() -> None:
    block = {"k": 1, "K": 3, "topR": 4, "xyz": 5, None: 1, ("a", 1): 2}
    with pytest.raises(ValueError, match=r"^Unknown options in the configuration: ") as error:
        MixtureRuntimeConfig.from_mapping(block)
    said = "`k` (did you mean `K`?), `topR` (remove it: all K responsibilities are kept), `xyz`, `None`, `('a', 1)`. "
    assert said in str(error.value)


@pytest.mark.parametrize("key", ["topR", "pi_floor", "K_subsample", "revive_below"])
def test_config_says_why_an_option_of_mfcl_is_missing(key: str) -> None:
    with pytest.raises(ValueError, match=rf"^Unknown option in runtime\.mixture: `{key}` \(remove it: "):
        MixtureRuntimeConfig.from_mapping({"runtime": {"mixture": {key: 1}}})


@pytest.mark.parametrize("runtime", ["", " {}", " {amp: true}"])
def test_config_reads_a_block_beside_runtime(tmp_path: Path, runtime: str) -> None:
    assert load(tmp_path, f"runtime:{runtime}\nmixture: {{K: 12}}").K == 12


def test_config_prefers_the_block_under_runtime(tmp_path: Path) -> None:
    assert load(tmp_path, "runtime: {mixture: {K: 3}}\nmixture: {web: 0.5, books: 0.5}").K == 3


HOSTILE = {
    "document": "{BOMB}K: *i",
    "runtime": "{BOMB}runtime: *i",
    "block": "{BOMB}runtime: {mixture: *i}",
    **{name: f"{{BOMB}}runtime: {{mixture: {{{name}: *i}}}}" for name in OTHERS},
    "integer": "K: -0x" + "f" * 8000,
    "keys": "\n".join(f"k{number}: 1" for number in range(2000)),
    "key": f"? {'k' * 10000}\n: 1",
    "text": f'mode: "{"x " * 10000}"',
    "itself": "K: &a [*a]",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_config_error_is_short_and_quick(tmp_path: Path, text: str) -> None:
    start = time.perf_counter()
    with pytest.raises((TypeError, ValueError)) as error:
        load(tmp_path, text.replace("{BOMB}", BOMB))
    assert len(str(error.value)) < 600
    assert len(str(error.value).partition(", got ")[2]) <= 81  # 80 characters of the value, and a period
    assert "\n" not in str(error.value)
    assert time.perf_counter() - start < 5


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
    "text",
    [
        *("K: [1", "K: 8\n\tmode: ema", "a: b: c", "K: !!python/object:os.system 1", "K: 1\n---\nK: 2"),
        *("K: 2026-99-99", "K: !!int ''", "K: !!bool maybe", f"K: {'9' * 5000}", "[" * 1100, "K: \0"),
    ],
    ids=lambda text: text[:20],
)
def test_config_says_in_one_line_that_a_file_is_not_yaml(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"^`.*run\.yaml` is not valid YAML: ") as error:
        load(tmp_path, text)
    assert "\n" not in str(error.value)


def test_config_runs_no_code_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is not valid YAML"):
        load(tmp_path, "K: !!python/object/apply:os.mkdir [made]")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("encoding", "good"), [("utf-8", True), ("utf-8-sig", True), ("utf-16", True), ("cp037", False)]
)
def test_config_reads_unicode_only(tmp_path: Path, encoding: str, good: bool) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("K: 5".encode(encoding))
    if good:
        assert MixtureRuntimeConfig.from_yaml(str(path)).K == 5
    else:
        with pytest.raises(ValueError, match=r"run\.yaml` is not valid YAML: "):
            MixtureRuntimeConfig.from_yaml(path)


# Option, value, error, and a part of the message. tests/core/test_config.py has more of the mixture's own options.
OPTIONS: list[tuple[str, Any, type[Exception], str]] = [
    ("K", 0, ValueError, "at least 1, got 0"),
    ("assigner", "kmeans", ValueError, "one of kmeans_online, label_supervised, got 'kmeans'"),
    ("mode", "EMA", ValueError, "one of per_batch, ema, label_supervised, got 'EMA'"),
    ("enabled", 1, TypeError, "true or false, got 1"),
    ("cross_rank", 0, TypeError, "true or false, or gather or reduce, got 0"),
    ("cross_rank", "all", ValueError, "true or false, or gather or reduce, got 'all'"),
    ("dim", 0, ValueError, "at least 1, got 0"),
    ("store_scores", "append", TypeError, "true or false, got 'append'"),
    ("scores_mode", "shards", ValueError, "one of append, per_step, got 'shards'"),
    ("seed", -1, ValueError, "at least 0, got -1"),
    ("seed", 2**64, ValueError, f"got {2**64}"),
    ("strict", "no", TypeError, "true or false, got 'no'"),
]
PLACES: list[tuple[str, Any, type[Exception], str]] = [
    ("is_main", "yes", TypeError, "true, false or None, got 'yes'"),
    ("is_main", torch.tensor([True, False]), TypeError, "true, false or None, got tensor("),
    ("log_dir", 5, TypeError, "a path or None, got 5"),
    ("log_dir", b"run", TypeError, "a path or None, got b'run'"),
]


MAKERS: dict[str, Callable[..., object]] = {
    "config": MixtureRuntimeConfig,
    "estimator": estimator,
    "disabled": lambda **options: MixtureStats(**{"K": 8, "enabled": False, **options}),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(("name", "value", "kind", "text"), OPTIONS, ids=lambda value: str(value)[:30])
def test_wrong_option_is_named(name: str, value: Any, kind: type[Exception], text: str, maker: str) -> None:
    with pytest.raises(kind) as error:
        MAKERS[maker](**{name: value})
    assert_says(error.value, name, text)


@pytest.mark.parametrize(("name", "value", "kind", "text"), PLACES, ids=lambda value: str(value)[:30])
def test_wrong_option_of_the_process_is_named(name: str, value: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as error:
        estimator(**{name: value})
    assert_says(error.value, name, text)


def test_estimator_without_a_folder_stores_no_scores() -> None:
    with pytest.raises(ValueError, match=r"`log_dir`.*`store_scores`"):
        estimator(store_scores=True)


@pytest.mark.parametrize("config", [None, "run.yaml"])
def test_from_config_names_what_it_expects(config: Any) -> None:
    with pytest.raises(TypeError) as error:
        MixtureStats.from_config(config)
    assert_says(error.value, "config", "got")


@pytest.mark.parametrize("value", [0, True, "estimator"])
def test_activate_names_what_it_expects(value: Any) -> None:
    with pytest.raises(TypeError) as error, activate(value):
        pass
    assert_says(error.value, "estimator", "got")


def test_unknown_option_is_a_type_error() -> None:
    make: Callable[..., MixtureStats] = MixtureStats
    with pytest.raises(TypeError, match="topR"):
        make(K=8, topR=4)
