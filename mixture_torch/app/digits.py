"""The 1,797 handwritten digits that ship with scikit-learn, and random views of them."""

import math

import torch
from torch import Tensor
from torch.nn import functional

N_DIGITS = 10

# Stronger augmentations blur the digits for k-means.
ROTATION = 10.0  # degrees either way
SHIFT = 0.3  # pixels either way, of 8
NOISE = 0.1  # standard deviation; ink is 1
ERASED = 2  # side of the erased square, in pixels
ERASE_SHARE = 0.5  # of the views


def load_images(device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the images, (1797, 1, 8, 8) float32, paper 0 and ink 1, and their digits, (1797,) int64.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('`demo` needs scikit-learn: pip install "mixture-diagnostics[demo]"') from error
    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32, device=device)[:, None] / 16
    return images, torch.as_tensor(data.target, dtype=torch.int64, device=device)


def view(images: Tensor, *, generator: torch.Generator) -> Tensor:
    """Returns a random view of each image, (N, 1, H, W): rotated, shifted, noisy, and some with a square erased.

    Args:
        images: (N, 1, H, W).
        generator: The source of randomness, on the images' device.
    """
    moved = _turn_and_shift(images, generator)
    noise = torch.randn(moved.shape, generator=generator, device=moved.device)
    return _erase(moved + NOISE * noise, generator)


def _turn_and_shift(images: Tensor, generator: torch.Generator) -> Tensor:
    N, _, H, W = images.shape
    turn, right, down = 2 * torch.rand((3, N), generator=generator, device=images.device) - 1
    angle = math.radians(ROTATION) * turn
    cos, sin = angle.cos(), angle.sin()
    # In affine_grid an image spans -1 to 1, so a pixel is 2 / W wide.
    rows = [torch.stack([cos, -sin, 2 * SHIFT / W * right], 1), torch.stack([sin, cos, 2 * SHIFT / H * down], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def _erase(images: Tensor, generator: torch.Generator) -> Tensor:
    N, _, H, W = images.shape
    device = images.device
    chosen = torch.rand((N, 1), generator=generator, device=device) < ERASE_SHARE
    top = torch.randint(H - ERASED + 1, (N, 1), generator=generator, device=device)
    left = torch.randint(W - ERASED + 1, (N, 1), generator=generator, device=device)
    y, x = torch.arange(H, device=device), torch.arange(W, device=device)
    in_rows = chosen & (top <= y) & (y < top + ERASED)  # (N, H)
    in_columns = (left <= x) & (x < left + ERASED)  # (N, W)
    return images.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0.0)
