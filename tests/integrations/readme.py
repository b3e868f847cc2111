"""What the reader of `mixture_torch/integrations/README.md` has already."""

from typing import Any

import torch
from torch import nn

from mixture_torch import NTXentLoss


def lightning_module() -> Any:
    """Returns a LightningModule with a layer `projector`."""
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.projector, self.criterion = nn.Linear(12, 8), nn.Linear(8, 4), NTXentLoss()

        def training_step(self, views: torch.Tensor, _: int) -> torch.Tensor:
            return self.criterion(*(self.projector(self.backbone(view)) for view in views))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.randn(3, 2, 40, 12), batch_size=None)

    return Module()


class Pooled(nn.Module):
    """A model for Transformers, with a layer `pooler`."""

    def __init__(self) -> None:
        super().__init__()
        self.pooler = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the loss."""
        return {"loss": self.pooler(x).square().mean()}
