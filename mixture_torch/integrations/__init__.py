"""Mixture diagnostics in other people's training code; each module imports its own optional package.

Example:
    >>> import torch
    >>> from mixture_torch import MixtureStats
    >>> from mixture_torch.integrations import watch
    >>> layer, estimator = torch.nn.Linear(8, 4), MixtureStats(K=2, enabled=True)
    >>> with watch(layer, estimator):
    ...     _ = layer(torch.randn(32, 8))
    >>> estimator.stats.R.shape
    torch.Size([32, 2])
"""

from mixture_torch.integrations.hooks import LayerHook, watch

__all__ = ["LayerHook", "watch"]
