"""How much structure a mixture has beyond what its estimator finds in a Gaussian cloud."""

import torch
from torch import Tensor

from mixture_core.config import as_integer, shown
from mixture_core.readings import share_B, spectrum
from mixture_core.relocate import relocate
from mixture_core.step import MixtureState, init, step


def excess(
    state: MixtureState, N: int, *, generator: torch.Generator | None = None, shadows: int = 4, steps: int = 120
) -> Tensor:
    """Returns how much of the variance lies between components beyond chance, (), at most 1: (s - s0) / (1 - s0).

    s is the share of variance between components, tr B / tr T. s0 is its mean over estimators with the same options
    that see only rows of a single Gaussian with the covariance T: k-means finds "clusters" there too. 0 means no more
    structure than a Gaussian has. It is an effect size, not a p-value: normalised rows without clusters give up to
    0.05. Without any weight, it is nan.

    Args:
        state: The mixture.
        N: Rows per step.
        generator: CPU generator; None is one with a fixed seed.
        shadows: Number of estimators that see the Gaussian.
        steps: Steps of each; the default is several windows of the default `ema_decay`.

    Raises:
        TypeError: `N`, `shadows` or `steps` is not an integer.
        ValueError: One of them is less than 1.

    Example:
        >>> import torch, mixture_core
        >>> from mixture_core.null import excess
        >>> x = torch.cat([torch.randn(200, 2), torch.randn(200, 2) + 9])
        >>> state = mixture_core.init(mixture_core.MixtureConfig(K=2), x)
        >>> for _ in range(20):
        ...     state, _ = mixture_core.step(state, x)
        >>> float(excess(state, 400)) > 0.5
        True

    The reference is that of Tibshirani, Walther and Hastie, "Estimating the number of clusters in a data set via the
    gap statistic" (2001), section 2, drawn from a Gaussian.
    """
    share = share_B(state.moments)
    by_chance = chance_share(state, N, generator=generator, shadows=shadows, steps=steps)
    return (share - by_chance) / (1 - by_chance)


def chance_share(
    state: MixtureState, N: int, *, generator: torch.Generator | None = None, shadows: int = 4, steps: int = 120
) -> Tensor:
    """Returns s0 of `excess`, (); the arguments are the same."""
    if not all(isinstance(as_integer(count), int) and not isinstance(count, bool) for count in (N, shadows, steps)):
        given = ", ".join(map(shown, (N, shadows, steps)))
        raise TypeError(f"`N`, `shadows` and `steps` must be integers, got {given}.")
    if min(N, shadows, steps) < 1:
        raise ValueError(f"`N`, `shadows` and `steps` must be at least 1, got {N}, {shadows} and {steps}.")
    if generator is None:
        generator = torch.Generator(device="cpu").manual_seed(0)
    config, moments = state.config, state.moments
    if not bool(moments.weight.sum() > 0):
        return moments.weight.new_full((), torch.nan)
    # Neither the mean nor a rotation changes a share.
    spread, pi = spectrum(moments).sqrt(), moments.pi.cpu()

    def draw() -> tuple[Tensor, Tensor | None]:
        rows = torch.randn(N, len(spread), generator=generator)
        x = spread * rows.to(spread)
        if not config.uses_labels:
            return x, None
        return x, torch.multinomial(pi, N, replacement=True, generator=generator).to(spread.device)

    shares = []
    for _ in range(shadows):
        shadow = init(config, *draw(), generator=generator)
        for n in range(steps):
            if config.relocates and n and n % config.window == 0:
                shadow, _ = relocate(shadow)
            shadow, _ = step(shadow, *draw())
        shares.append(share_B(shadow.moments))
    return torch.stack(shares).mean()
