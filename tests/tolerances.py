"""The tolerances of all tests: relative, of the largest difference to the largest entry."""

import torch
from torch import Tensor

FLOAT32 = 1e-5  # float32 against the float64 oracle, and float32 results that are equal but for rounding
FAR_FROM_ZERO = 1e-4  # embeddings moved by 1000, or rows of norm 1 with spread 1e-3: what float32 inputs allow
FLOAT64 = 1e-12  # float64 results that are equal but for rounding


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest difference over the largest entry of what was expected; 0 of nothing."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.to(torch.float64), expected.to(torch.float64)
    difference = (actual - expected).abs().max()
    scale = expected.abs().max()
    return float(difference / scale) if scale > 0 else float(difference)
