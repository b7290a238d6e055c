"""The same network with Lightning as its first page shows it: loaders, bar, logger, checkpoints.

`python -m benchmarks.peers.training_lightning EPOCHS` prints one JSON object last.
"""

import json
import os
import sys
import tempfile
import time

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.training import config, windows
from forecasting import model
from forecasting.loss import crps
from forecasting.network import Network
from forecasting.windows import Windows


class Plain(LightningModule):
    """Loss of a batch, logged; AdamW."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network, self.best = network, float("inf")

    def _loss(self, batch: list[Tensor]) -> Tensor:
        inputs, sigma, returns = batch
        return crps(returns, self.network.correct(inputs, sigma)).mean() * 1e4

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("val_loss", self._loss(batch), prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.best = min(self.best, float(self.trainer.callback_metrics["val_loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        chosen = config()
        return torch.optim.AdamW(self.parameters(), lr=chosen.lr, weight_decay=chosen.weight_decay)


def loader(network: Network, some: Windows, shuffle: bool) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of one part."""
    inputs = model._Inputs.of(network, some)
    data = TensorDataset(inputs.features, inputs.sigma, inputs.returns)
    return DataLoader(data, batch_size=config().batch_size, shuffle=shuffle)


def main() -> int:
    """Fit and tell."""
    epochs, parts, chosen = int(sys.argv[1]), windows(), config()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        began = time.perf_counter()
        torch.manual_seed(chosen.seed)
        network = model.untrained(parts, chosen)
        plain = Plain(network)
        trainer = Trainer(max_epochs=epochs, gradient_clip_val=1.0)
        trainer.fit(
            plain, loader(network, parts.train, True), loader(network, parts.validation, False)
        )
        seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "validation": plain.best}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
