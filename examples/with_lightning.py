"""Prune in Lightning with one callback; the module does not change. `python examples/with_lightning.py`."""

import sys

import lightning.pytorch as pl
import torch
import torchvision
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import fastgate as fg
from fastgate.integrations.lightning import EnergyCallback, GateSearchCallback

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 10


class Digits(pl.LightningModule):
    """An ordinary module, without any pruning code."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torchvision.models.resnet18(num_classes=10)

    def training_step(self, batch, index):
        """Cross-entropy; the callback adds the gate losses."""
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        """SGD, as usual."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


pl.seed_everything(1)
pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8).repeat(1, 3, 1, 1) / 8 - 1
loader = DataLoader(TensorDataset(images, torch.tensor(labels)), 64, shuffle=True, drop_last=True)
search = GateSearchCallback(fg.SearchConfig(target=0.5), gating="channel")
energy = EnergyCallback()
trainer = pl.Trainer(max_epochs=epochs, callbacks=[search, energy], logger=False, enable_progress_bar=False)
trainer.fit(Digits(), loader)

small = fg.load("small.safetensors")
print(f"small.safetensors: {fg.macs(small, (3, 8, 8)) / search.search.macs:.3f} of the MACs")
print(f"joules of training: {[entry['train']['joules'] for entry in energy.history]}")
