"""The same job without the estimator: by textbook formulas in plain torch, and with scikit-learn.

Both average the parameters of the batches exponentially, which is the usual way, and start from the true means, which
saves them a search. What they compute of a single batch is what the estimator computes of it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor
from torch.nn import functional

DECAY = 0.95
LLOYD_ITERATIONS = 2

Floats = npt.NDArray[np.float32]


class RowFile:
    """A CSV file with the estimator's columns; each row is flushed."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "mixture.csv").open("w", buffering=1, encoding="ascii")
        self._file.write("step,epoch,K,pi_min,pi_max,trace_B,opnorm_B\n")
        self._rows = 0

    def write(self, K: int, *figures: float) -> None:
        """Appends a row."""
        self._file.write(f"{self._rows},0,{K}," + ",".join(f"{figure:.9g}" for figure in figures) + "\n")
        self._rows += 1

    def __enter__(self) -> "RowFile":
        """Returns the file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self._file.close()


class Textbook:
    """One-hot responsibilities, differences of all rows to all means, einsum, and the eigenvalues of B.

    Args:
        centers: (K, D) means to start from.
        rows: The file of rows.
    """

    def __init__(self, centers: Tensor, rows: RowFile) -> None:
        self._rows = rows
        self.pi: Tensor | None = None
        self.mu = centers
        self.Sigma: Tensor | None = None
        self.B: Tensor | None = None

    def step(self, x: Tensor) -> None:
        """Takes one batch, (N, D)."""
        K, means = len(self.mu), self.mu
        for _ in range(LLOYD_ITERATIONS):
            R = functional.one_hot(torch.cdist(x, means).argmin(dim=1), K).to(x.dtype)
            weight = R.sum(dim=0)
            divisor = weight.clamp(min=1)
            means = torch.where(weight[:, None] > 0, R.T @ x / divisor[:, None], means)
        difference = x[:, None] - means
        covariances = torch.einsum("nk,nkd,nke->kde", R, difference, difference) / divisor[:, None, None]
        pi = weight / len(x)
        apart = means - torch.einsum("k,kd->d", pi, means)
        between = torch.einsum("k,kd,ke->de", pi, apart, apart)
        self.mu = means if self.pi is None else averaged(self.mu, means)
        self.pi, self.Sigma = averaged(self.pi, pi), averaged(self.Sigma, covariances)
        self.B = averaged(self.B, between)
        opnorm = torch.linalg.eigvalsh(self.B)[-1]
        self._rows.write(K, self.pi.min().item(), self.pi.max().item(), self.B.trace().item(), opnorm.item())


class ScikitLearn:
    """MiniBatchKMeans for the means, and NumPy for a covariance per cluster, B and its eigenvalues.

    Args:
        centers: (K, D) means to start from.
        N: Rows of a batch.
        rows: The file of rows.
    """

    def __init__(self, centers: Tensor, N: int, rows: RowFile) -> None:
        self._rows = rows
        K = len(centers)
        self.kmeans = MiniBatchKMeans(K, init=centers.numpy(), batch_size=N, n_init=1, random_state=0)
        self.pi: Floats | None = None
        self.mu: Floats | None = None
        self.Sigma: Floats | None = None
        self.B: Floats | None = None

    def step(self, x: Tensor) -> None:
        """Takes one batch, (N, D)."""
        rows: Floats = x.numpy()
        self.kmeans.partial_fit(rows)
        nearest, K = self.kmeans.predict(rows), self.kmeans.n_clusters
        pi = (np.bincount(nearest, minlength=K) / len(rows)).astype(np.float32)
        members = [rows[nearest == k] for k in range(K)]
        means: Floats = np.stack([part.mean(axis=0) if len(part) else np.zeros_like(rows[0]) for part in members])
        scatters = [(part - mean).T @ (part - mean) for part, mean in zip(members, means, strict=True)]
        covariances = np.stack([s / max(len(part), 1) for s, part in zip(scatters, members, strict=True)])
        apart = means - pi @ means
        self.pi, self.mu = averaged(self.pi, pi), averaged(self.mu, means)
        self.Sigma, self.B = averaged(self.Sigma, covariances), averaged(self.B, (pi[:, None] * apart).T @ apart)
        opnorm = np.linalg.eigvalsh(self.B)[-1]
        self._rows.write(K, self.pi.min(), self.pi.max(), np.trace(self.B), opnorm)


def averaged(old: Any, new: Any) -> Any:
    """Returns the exponential average of a parameter, which starts with its first value."""
    return new if old is None else DECAY * old + (1 - DECAY) * new
