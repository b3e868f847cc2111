"""A contrastive loss that updates the active estimator."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mixture_core.config import as_number
from mixture_core.inputs import as_tensor
from mixture_torch.context import ACTIVE, active_estimator, update_compiled


class NTXentLoss(nn.Module):
    """The normalized temperature-scaled cross entropy of SimCLR, which also updates the active estimator.

    With z the 2N rows of cat([z1, z2]), each L2-normalized, and j(i) the other view of the sample of row i:

        loss = mean_i -log( exp(z_i . z_j(i) / temperature) / sum_{k != i} exp(z_i . z_k / temperature) )

    Each call feeds the detached 2N rows to the active estimator as two views, with the labels repeated for both.

    Args:
        temperature: Above 0.

    Raises:
        ValueError: `temperature` is not a positive number.

    Example:
        >>> import torch
        >>> from mixture_torch import NTXentLoss
        >>> z = torch.eye(4)
        >>> round(float(NTXentLoss(temperature=1.0)(z, z)), 4)
        1.1654

    Chen et al., "A simple framework for contrastive learning of visual representations" (2020), section 2.1.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = as_number(temperature)
        if not (isinstance(self.temperature, float) and 0 < self.temperature < math.inf):
            raise ValueError(f"`temperature` must be a number greater than 0, got {temperature!r}.")

    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
        """Returns the loss, ().

        Args:
            z1: (N, D) embeddings of one view, N at least 1; need not be normalized.
            z2: (N, D) embeddings of the other view of the same samples.
            labels: (N,) integers for the active estimator; the loss does not use them.

        Raises:
            ValueError: The shapes differ from (N, D).
        """
        if z1.ndim != 2 or z1.shape != z2.shape or len(z1) < 1:
            shapes = f"{tuple(z1.shape)} and {tuple(z2.shape)}"
            raise ValueError(f"`z1` and `z2` must have the same shape (N, D), N at least 1, got {shapes}.")
        z = torch.cat([z1, z2])
        # A norm in half precision is off by 1e-3, and with it every similarity.
        z = functional.normalize(z if z.dtype == torch.float64 else z.to(torch.float32), dim=1)
        if torch.compiler.is_compiling():
            update_compiled(ACTIVE, z, _of_both_views(labels), None, 2)
        elif (estimator := active_estimator()) is not None:
            estimator.update(z.detach(), _of_both_views(labels), views=2)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        similarity = (z @ z.mT / self.temperature).masked_fill(itself, -torch.inf)
        positive = torch.arange(len(z), device=z.device).roll(len(z1))
        return functional.cross_entropy(similarity, positive)

    def extra_repr(self) -> str:
        """Returns the options, as `print` shows them."""
        return f"temperature={self.temperature}"


def _of_both_views(labels: Any) -> Any:
    """Returns the labels repeated for both views; the estimator will refuse anything that is not a vector."""
    try:
        vector = as_tensor(labels, name="labels")
    except TypeError:
        return labels
    return torch.cat([vector, vector]) if vector.ndim == 1 else labels
