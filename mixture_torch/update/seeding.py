"""Where the means start, and warnings if the first rows are too few for K or the state is large."""

import torch
from torch import Tensor

import mixture_core
from mixture_core.inputs import usable_rows
from mixture_torch.config import MixtureRuntimeConfig
from mixture_torch.update.checkpoint import SEEDING_ROWS, LowerState, Progress, to_device
from mixture_torch.update.precision import may_wait

LARGE = 1e9  # bytes; the user is told the size of a larger state


def seed(config: MixtureRuntimeConfig, progress: Progress, x: Tensor) -> tuple[LowerState, Tensor | None]:
    """Returns the state to start from, given the new rows of all ranks, and the rows to keep if too few have come."""
    if config.uses_labels:
        return LowerState(mixture_core.init(config.core, x)), None
    state, waiting = progress.state, progress.waiting
    with may_wait():  # once: the number of rows decides whether to seed again
        rows = x[usable_rows(x)]
        if state is not None and not len(rows):
            return to_device(state, x.device), waiting
        rows = rows if waiting is None else torch.cat([waiting.to(x.device), rows])
        generator = torch.Generator(device="cpu").manual_seed(config.seed)
        start = LowerState(mixture_core.init(config.core, rows, generator=generator))
    return start, rows if len(rows) < SEEDING_ROWS * config.K else None


class FirstWindow:
    """Counts the rows of the first window, to tell the user once if they are too few for K."""

    def __init__(self, config: MixtureRuntimeConfig) -> None:
        self._K, self._window = config.K, config.window
        self._sizes: list[int | Tensor] = []  # rows of each step
        self.is_over = False

    def add(self, N: int | Tensor, *, is_further: bool, may_grow: bool) -> list[str]:
        """Returns a warning if a whole window has come and it had too few rows.

        `N` counts the rows of the last step so far, which `is_further` if it was added before, and which may yet grow.
        """
        if is_further:
            self._sizes.pop()
        self._sizes.append(N)
        whole = [N for N in (self._sizes[:-1] if may_grow else self._sizes) if isinstance(N, Tensor) or N > 0]
        if len(whole) < self._window:
            return []
        self.is_over = True
        with may_wait():  # once, if ranks reduce on GPUs
            n_rows = int(sum(whole))
        if n_rows >= SEEDING_ROWS * self._K:
            return []
        return [
            f"K={self._K} is too large: the first window, {self._window} steps, had {n_rows} rows, fewer than 4 K = "
            f"{SEEDING_ROWS * self._K}. Use a smaller K, larger batches or a larger `ema_decay`."
        ]


def size_note(K: int, D: int) -> list[str]:
    """Returns a warning if the state is large."""
    if (size := 4 * K * (1 + D + D * D)) <= LARGE:
        return []
    return [
        f"The mixture (K={K}, D={D}) takes {size / 1e9:.1f} GB, and so does each step; a smaller K, or a projection to "
        "fewer dimensions, takes less."
    ]
