"""Three sets of labelled samples, and random views of them.

The digits come with scikit-learn (Alpaydin, Kaynak 1998), Fashion-MNIST (Xiao, Rasul, Vollgraf 2017) with Debian's
package `dataset-fashion-mnist`; its 10,000 test images are used, averaged to 14 x 14 pixels. For sentences see `text`.
"""

import gzip
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.failures import text
from mixture_torch.app.digits import load_images

FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
NAMES = ("digits", "fashion", "sentences")
N_CLASSES = 10
TRAIN = 0.8  # share of the samples that are trained on; probes are tested on the others

ROTATION = 10.0  # degrees either way
SHIFT = 0.04  # of the width, either way
NOISE = 0.1  # standard deviation; ink is 1
ERASED = 0.25  # of the width: side of the erased square
ERASE_SHARE = 0.5  # of the views


@attrs.frozen(kw_only=True, eq=False)
class Samples:
    """Labelled samples, in random order.

    Attributes:
        name: One of `NAMES`.
        x: (N, 1, H, W) images in [0, 1], or (N, T, 384) hidden states of sentences.
        labels: (N,) int64, in 0 ... 9.
        n_train: The first of these are trained on.
    """

    name: str
    x: Tensor
    labels: Tensor
    n_train: int

    def view(self, x: Tensor, *, strength: float, generator: torch.Generator) -> Tensor:
        """Returns a random view of each of some samples."""
        make = text.view if self.name == "sentences" else view
        return make(x, strength=strength, generator=generator)


@cache
def load(name: str) -> Samples:
    """Returns a set by name.

    Raises:
        FileNotFoundError: A package with data is not installed; the message says which.
    """
    loaders: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "digits": lambda: load_images(torch.device("cpu")),
        "fashion": _fashion,
        "sentences": text.load,
    }
    x, labels = loaders[name]()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return Samples(name=name, x=x[order], labels=labels[order], n_train=int(TRAIN * len(x)))


def _fashion() -> tuple[Tensor, Tensor]:
    if not FASHION.is_dir():
        raise FileNotFoundError(f"There is no `{FASHION}`: apt-get install dataset-fashion-mnist.")
    pixels = np.frombuffer(gzip.decompress((FASHION / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((FASHION / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    images = torch.as_tensor(pixels.reshape(-1, 1, 28, 28).astype(np.float32) / 255)
    return functional.avg_pool2d(images, 2), torch.as_tensor(labels.astype(np.int64))


def view(images: Tensor, *, strength: float, generator: torch.Generator) -> Tensor:
    """Returns a random view of each image: rotated, shifted, noisy, and half of them with a square erased.

    Args:
        images: (N, 1, H, W).
        strength: Factor of the rotation, the shift, the noise and the side of the square.
        generator: The source of randomness.
    """
    N, _, H, W = images.shape
    turn, right, down = 2 * torch.rand((3, N), generator=generator) - 1
    angle = strength * math.radians(ROTATION) * turn
    cos, sin, far = angle.cos(), angle.sin(), 2 * SHIFT * strength  # in affine_grid an image is 2 wide
    rows = [torch.stack([cos, -sin, far * right], 1), torch.stack([sin, cos, far * down], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, align_corners=False)
    noisy = moved + strength * NOISE * torch.randn(moved.shape, generator=generator)
    side = round(strength * ERASED * W)
    chosen = torch.rand((N, 1), generator=generator) < ERASE_SHARE
    top, left = torch.randint(H - side + 1, (2, N, 1), generator=generator)
    y, x = torch.arange(H), torch.arange(W)
    inside = (chosen & (top <= y) & (y < top + side))[:, :, None] & ((left <= x) & (x < left + side))[:, None]
    return noisy.masked_fill(inside[:, None], 0.0)
