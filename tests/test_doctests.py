"""Every example in the docstrings of both packages runs and prints what it says."""

import doctest
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest

import mixture_core
import mixture_torch

MODULES = [
    info.name
    for package in (mixture_core, mixture_torch)
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not info.name.endswith("__main__")
]


@pytest.mark.parametrize("name", [*MODULES, "mixture_torch"])
def test_examples_in_docstrings_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize(
    ("package", "name"),
    [
        *((mixture_core, name) for name in mixture_core.__all__),
        *((mixture_torch, name) for name in mixture_torch.__all__),
    ],
    ids=str,
)
def test_public_objects_have_an_example(package: ModuleType, name: str) -> None:
    assert ">>> " in getattr(package, name).__doc__
