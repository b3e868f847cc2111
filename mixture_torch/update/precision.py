"""Full float32, and leave to wait for a GPU, whatever training has set up around the estimator."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

MATMULS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # set at run time


@contextmanager
def full_float32(beside: object) -> Iterator[None]:
    """Runs its block without gradients, inference mode, autocast or reduced matrix products; puts all back after it.

    Casting to float32 would not be enough: inside autocast a product of float32 matrices is bfloat16 again. Per backend
    rather than through `torch.set_float32_matmul_precision`, whose getter raises where a backend was set on its own.

    All is set by plain functions and put back by nested `finally`: an interrupt may come right behind any of them, and
    torch's own context managers then leave gradients or autocast off for the rest of the training.

    Args:
        beside: What is computed with; on the device of a tensor, and on the CPU for anything else.
    """
    device_type = _device_type(beside)
    reduced = [(matmul, matmul.fp32_precision) for matmul in MATMULS if matmul.fp32_precision not in ("ieee", "none")]
    grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled(device_type)
    try:
        for matmul, _ in reduced:
            matmul.fp32_precision = "ieee"
        if autocast:
            torch.set_autocast_enabled(device_type, False)
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            torch._C._set_grad_enabled(False)  # last: leaving inference mode turns gradients on
            yield
    finally:
        try:
            torch._C._set_grad_enabled(grad)
        finally:
            try:
                if autocast:
                    torch.set_autocast_enabled(device_type, True)
            finally:
                for matmul, precision in reduced:
                    matmul.fp32_precision = "none"  # as it was if it follows the setting of all backends
                    if matmul.fp32_precision != precision:
                        matmul.fp32_precision = precision


def _device_type(beside: object) -> str:
    try:
        return beside.device.type if isinstance(beside, Tensor) and not beside.is_meta else "cpu"
    except Exception:  # of a subclass, which will be refused where others can be told
        return "cpu"


@contextmanager
def may_wait() -> Iterator[None]:
    """Runs its block without torch's debug mode that warns of or refuses waiting for a GPU."""
    mode = torch.cuda.get_sync_debug_mode() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]  # torch's
    if mode:
        torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)
