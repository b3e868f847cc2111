"""Contexts for full float32 and for waiting for a GPU, whatever torch's settings are."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

MATMULS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # set at run time


@contextmanager
def full_float32(beside: object) -> Iterator[None]:
    """Turns off gradients, inference mode, autocast and reduced matrix products in its block, and restores them.

    Casting to float32 would not be enough: inside autocast a product of float32 matrices is bfloat16 again. The
    precision is set per backend, since `torch.get_float32_matmul_precision` raises if a backend was set alone.

    Plain functions set everything, and nested `finally` blocks restore it: if an interrupt came between two settings,
    torch's own context managers could leave gradients or autocast off for the rest of the training. `beside` is a
    tensor on the device to compute on; anything else means the CPU.
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
                    matmul.fp32_precision = "none"  # restores a backend that follows the setting for all
                    if matmul.fp32_precision != precision:
                        matmul.fp32_precision = precision


def outside_transforms() -> AbstractContextManager[Any]:
    """Suspends torch.func transforms inside the block; updates have no derivatives."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack  # not public

    return temporarily_clear_interpreter_stack()


def unwrapped(value: Any) -> Any:
    """Returns the tensor inside the wrappers of torch.func.grad and jvp, and anything else unchanged."""
    while isinstance(value, Tensor) and torch._C._functorch.is_gradtrackingtensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def _device_type(beside: object) -> str:
    try:
        return beside.device.type if isinstance(beside, Tensor) and not beside.is_meta else "cpu"
    except Exception:  # of a subclass, which is refused later, when other ranks can be told
        return "cpu"


@contextmanager
def may_wait() -> Iterator[None]:
    """Lets its block wait for a GPU even if torch's sync debug mode forbids it."""
    mode = torch.cuda.get_sync_debug_mode() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]  # torch's
    if mode:
        torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        if mode:
            torch.cuda.set_sync_debug_mode(mode)
