"""The figures of a step as one tensor, so that one copy takes them from the device to the host."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixture_core import Moments, StepStats
from mixture_core.moments import figures, more_figures
from mixture_core.pairs import Pairs, alignment

SHAPES = {"pi": ("K",), "B": ("D", "D"), "R": ("N", "K"), "trace_B": (), "opnorm_B": ()}  # of what a row needs
LARGE = 2**20  # numbers in the covariances: to read more of them at each step takes a host 6 % of the step


class Rows(NamedTuple):
    """The rows of a training step, which `update` may have received in several calls."""

    N: int | Tensor  # rows of all calls so far, on all ranks
    earlier: tuple[Tensor, ...] = ()  # R of the earlier calls
    n_ignored: int | Tensor = 0  # ignored rows of the earlier calls
    counts: int | Tensor = 0  # (K,) rows of the earlier calls in each component
    n_steps: int = 0  # as in `Progress`


class Figures(NamedTuple):
    """The figures of a step; all but the counts are nan if no row was usable."""

    pi_min: float
    pi_max: float
    trace_B: float
    opnorm_B: float
    n_ignored: int  # rows of the step
    N: int  # rows of the step
    n_relocated: int
    trace_T: float = math.nan
    participation_ratio: float = math.nan
    rel: tuple[float, ...] = ()  # tr Sigma_k / tr T
    pi: tuple[float, ...] = ()
    counts: tuple[float, ...] = ()  # rows of the step in each component
    se_trace_B: float = math.nan  # standard error; nan without pairs of views
    alignment: float = math.nan

    @property
    def extra(self) -> dict[str, float | tuple[float, ...]]:
        """What a row of `mixture_extra.csv` holds, by name and in its order."""
        return {
            "n_rows": self.N, "n_ignored": self.n_ignored, "n_relocated": self.n_relocated, "trace_T": self.trace_T,
            "share_B": self.share_B, "participation_ratio": self.participation_ratio, "se_trace_B": self.se_trace_B,
            "alignment": self.alignment, "pi": self.pi, "n": self.counts, "rel": self.rel,
        }  # fmt: skip

    @property
    def scalars(self) -> dict[str, float]:
        """The figures of both files, by the names of their columns; those of `mixture.csv` alone without `extra`."""
        named: dict[str, float] = dict(zip(self._fields[:4], self[:4], strict=True))
        for name, value in self.extra.items() if self.pi else ():
            named |= {f"{name}_{k}": v for k, v in enumerate(value)} if isinstance(value, tuple) else {name: value}
        return named

    @property
    def share_B(self) -> float:
        """Share of the variance between components, tr B / tr T; 0 if there is no variance."""
        return self.trace_B / self.trace_T if self.trace_T != 0 else 0.0

    @classmethod
    def of(cls, numbers: Tensor, pairs: Tensor | None) -> "Figures":
        """Returns the figures in what `numbers_of` returned; `pairs` holds the last two, (2,)."""
        pi_min, pi_max, trace_B, opnorm_B, *others = numbers.tolist()
        n_ignored, N, n_relocated = map(int, others[:3])
        trace_T, norm, diagonal, *each = others[3:] or [math.nan] * 3
        K, has_variance = len(each) // 3, trace_T != 0
        within, pi, counts = tuple(each[:K]), tuple(each[K : 2 * K]), tuple(each[2 * K :])
        rel = tuple([trace / trace_T if has_variance else 0.0 for trace in within])
        ratio = 1 / (2 * norm**2 - diagonal**2) if has_variance else 0.0
        if n_ignored == N:
            pi_min = pi_max = trace_B = opnorm_B = trace_T = ratio = math.nan
            rel = pi = (math.nan,) * K
        se_trace_B, alignment = [math.nan] * 2 if pairs is None or n_ignored == N else pairs.tolist()
        return cls(
            pi_min, pi_max, trace_B, opnorm_B, n_ignored, N, n_relocated, trace_T, ratio,
            rel=rel, pi=pi, counts=counts, se_trace_B=se_trace_B, alignment=alignment,
        )  # fmt: skip


def numbers_of(stats: Mapping[str, Tensor], *, extra: bool) -> Tensor:
    """Returns the fields of `Figures` in their order, float32: (7,), or with `extra` (10 + 3 K,).

    On a CPU, the participation ratio of large covariances is computed at every tenth step and is nan at the others.
    """
    if not isinstance(stats, StepStats):  # a mapping of the user's own
        logged = _figures_of(stats)
        ignored = (stats["R"].sum(dim=1) == 0).sum() if "R" in stats else logged.new_zeros((), dtype=torch.int64)
        return torch.cat([logged, _counts(ignored, len(stats["R"]) if "R" in stats else 1, None, like=logged)])
    rows: Rows = getattr(stats, "rows", None) or Rows(len(stats.R))
    ignored, moved = stats.n_ignored + rows.n_ignored, getattr(stats, "n_relocated", None)
    if not extra:
        logged = figures(stats.moments)
        return torch.cat([logged, _counts(ignored, rows.N, moved, like=logged)])
    m: Moments = getattr(stats.moments, "lower", stats.moments)
    with_ratio = m.covariance.is_cuda or m.covariance.numel() <= LARGE or rows.n_steps % 10 == 0
    logged = more_figures(m, with_ratio=with_ratio)
    return torch.cat([logged[:4], _counts(ignored, rows.N, moved, like=logged), logged[4:], stats.counts + rows.counts])


def pair_numbers(pairs: Pairs) -> Tensor:
    """Returns the standard error of trace_B and the alignment, (2,); nan before the first usable pair."""
    figures = torch.stack([pairs.standard_errors[-2], alignment(pairs)])
    return torch.where(pairs.weight > 0, figures, torch.nan)


def _counts(n_ignored: Tensor, N: int | Tensor, n_relocated: Tensor | None, *, like: Tensor) -> Tensor:
    # Never from the host's memory to a GPU's, since the host would wait.
    n_rows = N if isinstance(N, Tensor) else n_ignored.new_full((), N)
    moved = torch.zeros_like(n_ignored) if n_relocated is None else n_relocated
    return torch.stack([n_ignored, n_rows, moved]).to(like.dtype)


def _figures_of(stats: Mapping[str, Tensor]) -> Tensor:
    pi = stats["pi"]
    trace_B = stats["trace_B"] if "trace_B" in stats else stats["B"].diagonal().sum()
    if "opnorm_B" in stats:
        opnorm_B = stats["opnorm_B"]
    else:  # the decomposition raises errors at NaN
        B = stats["B"].to(torch.float32)
        opnorm_B = torch.linalg.eigvalsh(B).amax() if bool(B.isfinite().all()) else B.sum() * torch.nan
    return torch.stack([figure.to(torch.float32) for figure in (pi.min(), pi.max(), trace_B, opnorm_B)])


def check_loggable(stats: Mapping[str, Tensor], *, stores_scores: bool) -> None:
    """Raises a ValueError if no row can be made of a mapping: of `pi` and `B`, or of `pi` and what derives from B."""
    if isinstance(stats, StepStats):
        return
    needed = ["pi"] if "trace_B" in stats and "opnorm_B" in stats else ["pi", "B"]
    if missing := [key for key in [*needed, *["R"] * stores_scores] if key not in stats]:
        raise ValueError(f"`stats` must be what `update` returned, got a mapping without {' and '.join(missing)}.")
    for key, shape in SHAPES.items():
        if key in stats and not _fits(value := stats[key], key):
            got = f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"`stats` must hold {key} as a dense tensor ({', '.join(shape)}), got {got}.")


def _fits(value: Any, key: str) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_complex():
        return False
    if value.ndim != len(SHAPES[key]) or (key == "B" and value.shape[0] != value.shape[1]):
        return False
    return key == "R" or value.numel() > 0


def responsibilities_of(stats: Mapping[str, Tensor]) -> Tensor:
    """Returns R of all rows of the step, (N, K), of whichever call they came with."""
    rows = getattr(stats, "rows", None)
    return torch.cat([*rows.earlier, stats["R"]]) if rows and rows.earlier else stats["R"]
