"""Random estimators and random batches, good and bad, from a NumPy generator: the same for the same seed."""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

NAN, INF = float("nan"), float("inf")
UNIT_DTYPES = (
    torch.float64, torch.half, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool,
)  # fmt: skip
WIDE_DTYPES = (torch.float64, torch.bfloat16)  # hold a number of any size


class World(NamedTuple):
    """An estimator, and the world that its batches come from."""

    options: dict[str, Any]
    D: int
    centers: Tensor  # (C, D) of the clusters
    scale: float  # standard deviation of a cluster


class Batch(NamedTuple):
    """What is handed in, what it holds, and whether it is wrong."""

    embeddings: Any
    labels: Any
    x: Tensor  # (N, D) float32
    y: Tensor  # (N,) int64
    is_wrong: bool  # whether it has to be refused


def pick(rng: np.random.Generator, values: Any) -> Any:
    """One of several values, which stays what it is."""
    return values[int(rng.integers(len(values)))]


def chance(rng: np.random.Generator, probability: float) -> bool:
    """True with that probability."""
    return bool(rng.random() < probability)


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    """Standard normal float32 numbers."""
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def draw_world(rng: np.random.Generator) -> World:
    """An estimator of any kind, without a folder."""
    D, scale = pick(rng, (1, 2, 3, 7, 16, 33)), pick(rng, (1.0, 1.0, 1.0, 1.0, 1e-40, 1e-20, 1e-3, 1e6, 1e11))
    options = {
        "K": pick(rng, (1, 2, 3, 5, 8, 12, 40)),
        "assigner": pick(rng, ("kmeans_online", "kmeans_online", "label_supervised")),
        "mode": pick(rng, ("ema", "ema", "per_batch", "label_supervised")),
        "ema_decay": pick(rng, (0.5, 0.9, 0.95, 0.99)),
        "max_assign_iters": pick(rng, (1, 2, 3)),
        "relocate": chance(rng, 0.7),
        "strict": chance(rng, 0.2),
        "seed": int(rng.integers(100)),
        "dim": pick(rng, (None, D)),
        "store_scores": chance(rng, 0.7),
        "scores_mode": pick(rng, ("append", "per_step")),
    }
    centers = scale * pick(rng, (0.0, 3.0, 30.0)) * normal(rng, pick(rng, (1, 3, 8)), D)
    return World(options, D, centers, scale)


def draw_batch(rng: np.random.Generator, world: World, *, uses_labels: bool) -> Batch:
    """A batch of any size, type, layout and condition."""
    N = pick(rng, (0, 1, 2, 5, 17, 64, int(rng.integers(401))))
    x = world.centers[torch.from_numpy(rng.integers(len(world.centers), size=N))] + world.scale * normal(
        rng, N, world.D
    )
    wide = world.scale != 1.0
    dtype = torch.float32 if chance(rng, 0.5) else pick(rng, WIDE_DTYPES if wide else UNIT_DTYPES)
    if not dtype.is_signed:
        x = x.abs()
    x = x.clamp(-100, 100).to(dtype) if not (wide or dtype.is_floating_point) else x.to(dtype)
    if N and chance(rng, 0.3):
        x = spoiled(rng, x, world.scale)
    y = torch.from_numpy(rng.integers(world.options["K"], size=N))
    if chance(rng, 0.3):
        y[torch.from_numpy(rng.random(N) < 0.1)] = pick(rng, (-1, -100))
    held = x.to(torch.float32, copy=True)
    if chance(rng, 0.1):
        return Batch(*wrong(rng, x, y, K=world.options["K"], uses_labels=uses_labels), held, y, True)
    labels = laid_out_labels(rng, y) if uses_labels else pick(rng, (None, y, y.float(), y[:, None], "labels"))
    layouts = [name for name in LAYOUTS if name not in FLOAT_LAYOUTS or x.dtype in (torch.float32, torch.float64)]
    layouts = [name for name in layouts if "NumPy" not in name or x.dtype not in (torch.bfloat16, torch.float8_e4m3fn)]
    return Batch(LAYOUTS[pick(rng, layouts)](x), labels, held, y, False)


def spoiled(rng: np.random.Generator, x: Tensor, scale: float) -> Tensor:
    """Embeddings some entries of which are not usable, or hard to use; or whose rows are all the same memory."""
    N, D = x.shape
    if chance(rng, 0.2):
        return x[:1].expand(N, D)
    if not x.is_floating_point():
        return x
    values = (NAN, INF, -INF, 1e30, -3e38, -0.0, 1e-42)
    if N >= 30:  # so that they stay few: float32 sees no small differences beside rows most of which are large
        values = (*values, 1000 * scale, -1000 * scale)
    count = N if chance(rng, 0.05) else int(rng.integers(1, N // 10 + 2))
    rows = torch.from_numpy(rng.permutation(N)[:count])
    columns = torch.from_numpy(rng.integers(D, size=count))
    x = x.clone()
    x[rows, columns] = torch.full((), pick(rng, values if count < N else values[:5])).to(x.dtype)
    return x


def wrong(rng: np.random.Generator, x: Tensor, y: Tensor, *, K: int, uses_labels: bool) -> tuple[Any, Any]:
    """Embeddings and labels one of which has to be refused."""
    N, D = x.shape
    zeros = torch.zeros(N, D)
    if not uses_labels or chance(rng, 0.5):
        faults = [
            zeros[:, 0], zeros[None], zeros.sum(), torch.zeros(N, D + 1), torch.zeros(N, 0), zeros * 1j, zeros.tolist(),
            None, zeros.to("meta"), zeros.to_sparse(), zeros.numpy().astype(object), zeros.numpy().astype(str), "x",
        ]  # fmt: skip
        return pick(rng, faults), y
    faults = [None, y.float(), y > 0, torch.cat([y, y[:1], y.new_zeros(1)]), y[:, None], y.to("meta"), y.tolist()]
    if N:
        outside = [torch.where(torch.arange(N) == rng.integers(N), label, y) for label in (K, -2, -99, 2**62)]
        faults = [*faults, *outside]
    return x, pick(rng, faults)


def laid_out_labels(rng: np.random.Generator, y: Tensor) -> Any:
    """Labels of any integer type, as tensor or array."""
    kinds: list[Callable[[Tensor], Any]] = [
        lambda y: y,
        Tensor.int,
        Tensor.char,
        lambda y: y.flip(0).numpy()[::-1],
        lambda y: y.numpy().astype(">i4"),
        lambda y: y.repeat_interleave(2)[::2],
    ]
    return pick(rng, kinds)(y)


FLOAT_LAYOUTS = ("negated lazily", "requires_grad", "inside a graph")
LAYOUTS: dict[str, Callable[[Tensor], Any]] = {
    "plain": lambda x: x,
    "column-major": lambda x: x.mT.contiguous().mT,
    "every second row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "every second column": lambda x: x.repeat_interleave(2, dim=1)[:, 1::2],
    "behind others": lambda x: torch.cat([x, x])[len(x) :],
    "requires_grad": lambda x: x.detach().clone().requires_grad_(),
    "inside a graph": lambda x: x.detach().clone().requires_grad_() * 1,
    "negated lazily": lambda x: torch.complex(x * 0, -x).conj().imag,
    "NumPy": lambda x: x.numpy(),
    "NumPy backwards": lambda x: x.flip(0, 1).numpy()[::-1, ::-1],
    "NumPy column-major": lambda x: np.asfortranarray(x.numpy()),
    "NumPy of foreign byte order": lambda x: x.numpy().astype(x.numpy().dtype.newbyteorder()),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    """Makes a type torch's default inside its block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS: tuple[Callable[[], AbstractContextManager[Any]], ...] = (
    nullcontext,
    torch.no_grad,
    torch.inference_mode,
    lambda: torch.autocast("cpu", torch.bfloat16),
    lambda: default_dtype(torch.float64),
)
