"""The statistics that a step returns."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import attrs
from torch import Tensor

from mixture_core.moments import Moments
from mixture_core.pytrees import pytree


@pytree
@attrs.frozen(eq=False, kw_only=True, repr=False)
class StepStats(Mapping[str, Tensor]):
    """The mixture after a step, and the responsibilities of the step's samples; read by attribute or by key.

    Attributes:
        moments: Weight, mean and covariance of each component in the new state, and their derived properties.
        R: (N, K) responsibilities; a row is 0 if its sample is ignored.
        n_ignored: () int64, number of ignored samples.
        counts: (K,) samples of the batch in each component; the sums of R if left out.
        pi: (K,) mixing weights, sum 1.
        mu: (K, D) component means, in the units of the embeddings.
        Sigma: (K, D, D) component covariances, in the square of these units, as are B and what derives from it.
        B: (D, D) between-component covariance.
        trace_B: () trace of B, the variance between components.
        opnorm_B: () largest eigenvalue of B.
        participation_ratio: () number of directions in use, between 1 and D.

    Example:
        >>> import torch, mixture_core
        >>> x = torch.tensor([[0.0], [2.0], [10.0]])
        >>> _, stats = mixture_core.step(mixture_core.init(mixture_core.MixtureConfig(K=2), x), x)
        >>> stats["R"].sum(dim=0).sort().values.tolist(), float(stats.participation_ratio)
        ([1.0, 2.0], 1.0)
    """

    moments: Moments
    R: Tensor
    n_ignored: Tensor
    counts: Tensor = attrs.field(default=attrs.Factory(lambda self: self.R.sum(dim=-2), True))

    KEYS: ClassVar[tuple[str, ...]] = (
        "pi", "mu", "Sigma", "B", "R", "trace_B", "opnorm_B", "participation_ratio", "n_ignored", "counts"
    )  # fmt: skip

    # Typed one by one, for type checkers.
    @property
    def pi(self) -> Tensor:
        return self.moments.pi

    @property
    def mu(self) -> Tensor:
        return self.moments.mu

    @property
    def Sigma(self) -> Tensor:
        return self.moments.Sigma

    @property
    def B(self) -> Tensor:
        return self.moments.B

    @property
    def trace_B(self) -> Tensor:
        return self.moments.trace_B

    @property
    def opnorm_B(self) -> Tensor:
        return self.moments.opnorm_B

    @property
    def participation_ratio(self) -> Tensor:
        return self.moments.participation_ratio

    def __getitem__(self, key: str) -> Tensor:
        """Returns a statistic by its name."""
        if key not in self.KEYS:
            raise KeyError(f"{key!r} is not a statistic; choose one of {', '.join(self.KEYS)}.")
        value: Tensor = getattr(self, key)
        return value

    def __contains__(self, key: object) -> bool:
        return key in self.KEYS

    def __iter__(self) -> Iterator[str]:
        return iter(self.KEYS)

    def __len__(self) -> int:
        return len(self.KEYS)

    def __repr__(self) -> str:
        """Returns N, K, D and the names, in one line."""
        N, (K, D) = self.R.shape[-2], self.mu.shape[-2:]
        return f"StepStats(N={N}, K={K}, D={D}; {', '.join(self.KEYS)})"

    # A Mapping would compare tensors entry by entry, which has no truth value.
    def __eq__(self, other: Any) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)
