"""What a step tells its reader."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import attrs
from torch import Tensor

from mixture_core.moments import Moments
from mixture_core.pytrees import pytree


@pytree
@attrs.frozen(eq=False, kw_only=True, repr=False)
class StepStats(Mapping[str, Tensor]):
    """The mixture after a step, and what became of the step's samples; read by attribute or by key."""

    moments: Moments  # of the new state
    R: Tensor  # (N, K) responsibilities of this step's samples
    n_ignored: Tensor  # () int64: samples that were ignored, their row of R being 0

    KEYS: ClassVar[tuple[str, ...]] = (
        "pi", "mu", "Sigma", "B", "R", "trace_B", "opnorm_B", "participation_ratio", "n_ignored"
    )  # fmt: skip

    @property
    def pi(self) -> Tensor:
        """Mixing weights, (K,)."""
        return self.moments.pi

    @property
    def mu(self) -> Tensor:
        """Component means, (K, D)."""
        return self.moments.mu

    @property
    def Sigma(self) -> Tensor:
        """Component covariances, (K, D, D)."""
        return self.moments.Sigma

    @property
    def B(self) -> Tensor:
        """Between-component covariance, (D, D)."""
        return self.moments.B

    @property
    def trace_B(self) -> Tensor:
        """Trace of B, ()."""
        return self.moments.trace_B

    @property
    def opnorm_B(self) -> Tensor:
        """Operator norm of B, ()."""
        return self.moments.opnorm_B

    @property
    def participation_ratio(self) -> Tensor:
        """Number of directions in use, ()."""
        return self.moments.participation_ratio

    def __getitem__(self, key: str) -> Tensor:
        """Returns a statistic by its name."""
        if key not in self.KEYS:
            raise KeyError(f"{key!r} is not a statistic; there are {', '.join(self.KEYS)}.")
        value: Tensor = getattr(self, key)
        return value

    def __contains__(self, key: object) -> bool:
        """Is true of the names of the statistics, and computes none of them."""
        return key in self.KEYS

    def __iter__(self) -> Iterator[str]:
        """Goes through the names of the statistics."""
        return iter(self.KEYS)

    def __len__(self) -> int:
        """Returns the number of statistics."""
        return len(self.KEYS)

    def __repr__(self) -> str:
        """Returns the names and the shapes of what there is, in one line."""
        return f"StepStats(R: {tuple(self.R.shape)}, mu: {tuple(self.mu.shape)}, and {', '.join(self.KEYS)})"

    # A Mapping would compare tensors entry by entry, which has no truth value.
    def __eq__(self, other: Any) -> bool:
        """Is true of the same record only."""
        return self is other

    def __hash__(self) -> int:
        """Goes with identity."""
        return id(self)
