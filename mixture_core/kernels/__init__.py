"""Triton kernels for hard assignments and their moments, for float32 embeddings on CUDA.

A step made of them never waits for the GPU. It allocates by `torch.empty` alone, so a CUDA graph can capture it, and
it repeats bit for bit: no two programs add to the same number. Without Triton, or with a build of torch for CPUs alone,
the modules can be imported, and `usable_on` returns False. Arguments are not checked: float32 and contiguous, indices
int32, all on one device. A kernel is compiled for each D and K, not for each N.
"""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

AVAILABLE = False
tl: Any = None
# Triton takes 0.2 s or more to import, and a build of torch without GPUs needs it only to test the kernels.
if torch.version.cuda or torch.version.hip or os.environ.get("TRITON_INTERPRET") == "1":
    with suppress(ImportError):
        import triton
        from triton import language

        AVAILABLE, tl = True, language

MAX_K = 65_535  # rows of a grid


def usable_on(x: Tensor, *, K: int) -> bool:
    """Returns whether the kernels can work on x: float32 on a GPU with bfloat16, or anywhere in Triton's interpreter.

    Args:
        x: Any tensor.
        K: The number of components.
    """
    if not AVAILABLE or x.dtype != torch.float32 or K > MAX_K:
        return False
    return INTERPRETED or (x.is_cuda and _work_on(x.device))


@lru_cache
def _work_on(device: torch.device) -> bool:
    """Whether a kernel can be compiled and launched there, which takes a C compiler."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        launch(_nothing, (1,), device, torch.zeros(1, device=device))
    except Exception as error:  # Triton and the compilers below it raise all sorts; none may stop a training run
        cause = (str(error).splitlines() or [""])[0]
        warnings.warn(f"Triton cannot run here, so steps will be slower: {type(error).__name__}: {cause}", stacklevel=2)
        return False
    return True


def jit(kernel: Any) -> Any:
    """Compiles a kernel once for all N, if there is Triton: the last batch of an epoch must not wait for that."""
    try:
        return triton.jit(kernel, do_not_specialize=["N"]) if AVAILABLE else kernel
    except ValueError:  # imported from an archive, there is no source to compile; `_work_on` will notice
        return kernel


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    """Launches a kernel on a device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **options)
    else:  # only here, because entering a device costs as much as the launch
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)


def ceil(length: int, block: int) -> int:
    """Returns the number of blocks that cover a length."""
    return -(-length // block)


def power_of_2(length: int, low: int, high: int) -> int:
    """Returns the smallest power of 2 at or above a length, between two limits that are powers of 2."""
    return int(min(max(1 << (length - 1).bit_length(), low), high))


@jit
def _nothing(_: Any) -> None:
    """Does nothing, to see whether kernels can be compiled."""


INTERPRETED = type(_nothing).__name__ == "InterpretedFunction"
