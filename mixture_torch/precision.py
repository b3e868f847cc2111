"""Full float32, and leave to wait for a GPU, whatever training has set up around the estimator."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

MATMULS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # set at run time


@contextmanager
def full_float32(beside: object) -> Iterator[None]:
    """Runs its block without gradients, inference mode, autocast or reduced matrix products; puts all back after it.

    Casting to float32 would not be enough: inside autocast a product of float32 matrices is bfloat16 again. Per backend
    rather than through `torch.set_float32_matmul_precision`, whose getter raises where a backend was set on its own.

    Args:
        beside: What is computed with; on the device of a tensor, and on the CPU for anything else.
    """
    device_type = beside.device.type if isinstance(beside, Tensor) and not beside.is_meta else "cpu"
    reduced = [(matmul, matmul.fp32_precision) for matmul in MATMULS if matmul.fp32_precision not in ("ieee", "none")]
    grad = torch.is_grad_enabled()
    try:
        for matmul, _ in reduced:
            matmul.fp32_precision = "ieee"
        with ExitStack() as stack:  # each only where it is needed: together they took a tenth of a small update
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))  # which turns gradients on
            torch.set_grad_enabled(False)
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
            yield
    finally:  # and not by a `no_grad` on the stack, to which an interrupt can come before the stack knows of it
        torch.set_grad_enabled(grad)
        for matmul, precision in reduced:
            matmul.fp32_precision = "none"  # as it was if it follows the setting of all backends
            if matmul.fp32_precision != precision:
                matmul.fp32_precision = precision


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
