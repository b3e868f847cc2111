"""Synthetic run folders: logs of steps, with and without a fault."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mixture_torch.files.extra import extra_header
from mixture_torch.files.log import HEADER

Columns = dict[str, npt.NDArray[Any]]


def healthy(S: int = 200, K: int = 6, *, N: int = 600, seed: int = 0) -> Columns:
    """Columns of both files for S steps in which nothing happens but sampling."""
    chance = np.random.default_rng(seed)
    n = chance.multinomial(N, np.ones(K) / K, size=S).astype(float)
    ones, noise = np.ones(S), chance.normal(1, 0.01, (3, S))
    whole = {"step": np.arange(S), "epoch": 0 * np.arange(S), "K": np.full(S, K), "n_rows": np.full(S, N)}
    whole |= {name: np.zeros(S, int) for name in ("n_ignored", "n_relocated")}
    trace_T, share_B = 0.9 * noise[0], 0.4 * noise[1]
    return whole | {
        "trace_B": trace_T * share_B, "opnorm_B": 0.1 * trace_T * share_B, "trace_T": trace_T, "share_B": share_B,
        "participation_ratio": 8 * noise[2], "se_trace_B": 0.01 * ones, "alignment": 0.1 * ones,
        "pi": np.full((S, K), 1 / K), "n": n, "rel": chance.normal(0.6, 0.01, (S, K)),
    }  # fmt: skip


def lose(columns: Columns, k: int, rows: slice, *, keep: float = 0.02) -> None:
    """Takes most samples of a component out of some rows."""
    columns["n"][rows, k] = np.floor(keep * columns["n"][rows, k])
    columns["n_rows"][rows] = columns["n"][rows].sum(axis=1)


def write(folder: Path, columns: Columns, *, extra: bool = True) -> Path:
    """Writes the columns as the two files of a run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = columns | {"pi_min": columns["pi"].min(axis=1), "pi_max": columns["pi"].max(axis=1)}
    names = HEADER.decode().split(",")
    save(folder / "mixture.csv", HEADER, [columns[name][:, None] for name in names])
    if extra:
        header = extra_header(columns["n"].shape[1])
        single = [name for name in header.decode().split(",") if not name[-1].isdigit()]
        parts = [columns[name][:, None] for name in single] + [columns[name] for name in ("pi", "n", "rel")]
        save(folder / "mixture_extra.csv", header, parts)
    return folder


def save(path: Path, header: bytes, parts: list[npt.NDArray[Any]]) -> None:
    rows = zip(*(part.tolist() for part in parts), strict=True)
    lines = [",".join(f"{number:.9g}" for cell in row for number in cell) for row in rows]
    path.write_bytes(header + b"\n" + "".join(f"{line}\n" for line in lines).encode())
