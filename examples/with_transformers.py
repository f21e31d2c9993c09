"""Prune in Hugging Face's Trainer with one callback: `python examples/with_transformers.py`."""

import sys

import torch
import torchvision
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments

import fastgate as fg
from fastgate.integrations.transformers import GateSearchCallback

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 10


class Classifier(torch.nn.Module):
    """A torchvision network with the call signature that the Trainer expects."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torchvision.models.resnet18(num_classes=10)

    def forward(self, pixel_values, labels=None):
        """Return the logits, and the loss if there are labels."""
        logits = self.net(pixel_values)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8).repeat(1, 3, 1, 1) / 8 - 1
data = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, labels, strict=True)]
arguments = TrainingArguments(
    "runs/transformers", num_train_epochs=epochs, per_device_train_batch_size=64, report_to=[], save_strategy="epoch"
)
search = GateSearchCallback(fg.SearchConfig(target=0.5), gating="channel")
Trainer(Classifier(), arguments, train_dataset=data, callbacks=[search]).train()

small = fg.load("runs/transformers/small.safetensors")
print(f"small.safetensors: {fg.macs(small, (3, 8, 8)) / search.search.macs:.3f} of the MACs")
