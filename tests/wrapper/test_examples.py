"""Every example in a docstring of the wrapper's public objects runs."""

import doctest

import pytest

import mixture_torch


@pytest.mark.parametrize("name", ["MixtureStats", "NTXentLoss", "StepStats", "activate", "active_estimator"])
def test_example_of_a_public_object_runs(name: str) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(mixture_torch, name), name)
    assert example.examples
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example).failed == 0
