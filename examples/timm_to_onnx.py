"""Prune a timm network and export it to ONNX: `python examples/timm_to_onnx.py [EPOCHS [WEIGHTS.safetensors]]`."""

import sys

import timm
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import fastgate as fg

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
weights = sys.argv[2] if len(sys.argv) > 2 else ""  # a checkpoint of this network with 10 classes, loaded by timm
torch.manual_seed(1)
pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8).repeat(1, 3, 2, 2) / 8 - 1
loader = DataLoader(TensorDataset(images, torch.tensor(labels)), 64, shuffle=True, drop_last=True)

model = timm.create_model("resnet10t", num_classes=10, checkpoint_path=weights)
model = fg.attach(model, gating="both", inputs=images[:2])  # layers, and the channels inside them
optimizer = torch.optim.AdamW(fg.parameter_groups(model), lr=2e-3)
search = fg.GateSearch(model, (3, 16, 16), optimizer, epochs=epochs, config=fg.SearchConfig(target=0.5))

for epoch in range(epochs):
    search.begin_epoch(epoch, loader)
    model.train()
    for i, (x, y) in enumerate(loader):
        loss = torch.nn.functional.cross_entropy(model(x), y) + search.loss(i / len(loader))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: {search.phase}, MACs {search.metrics()['macs'] / search.macs:.3f}")

small = search.compact(loader)
fg.save(small, "small.safetensors")
print(f"small.safetensors: {fg.macs(small, (3, 16, 16)) / search.macs:.3f} of the MACs")
difference = fg.export_onnx(fg.fuse(small, images[:1]), images[:1], "small.onnx", dynamic_batch=True)
print(f"small.onnx: largest difference in onnxruntime {difference:.1g}")
