"""Prune a torchvision network in a loop of your own: `python examples/own_loop.py`. Half a minute on two CPU cores."""

import sys

import torch
import torchvision
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

import fastgate as fg

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
torch.manual_seed(1)
pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8).repeat(1, 3, 1, 1) / 8 - 1
train, test = random_split(TensorDataset(images, torch.tensor(labels)), [1437, 360])
loader, test_loader = DataLoader(train, 64, shuffle=True, drop_last=True), DataLoader(test, 360)

model = fg.attach(torchvision.models.resnet18(num_classes=10), gating="channel")
optimizer = torch.optim.SGD(fg.parameter_groups(model), lr=0.05, momentum=0.9, weight_decay=5e-4)
config = fg.SearchConfig(target=0.5)  # half of the MACs
search = fg.GateSearch(model, (3, 8, 8), optimizer, epochs=epochs, config=config)

for epoch in range(epochs):
    search.begin_epoch(epoch, loader)
    model.train()
    for i, (x, y) in enumerate(loader):
        loss = torch.nn.functional.cross_entropy(model(x), y) + search.loss(i / len(loader))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    search.refresh(loader)  # recompute running statistics before an evaluation
    model.eval()
    with torch.no_grad():
        accuracy = sum(float((model(x).argmax(1) == y).float().mean()) for x, y in test_loader)
    line = search.metrics()
    print(f"epoch {epoch + 1}: {line['phase']}, accuracy {accuracy:.3f}, MACs {line['macs'] / search.macs:.3f}")

small = search.compact(loader)
fg.save(small, "small.safetensors")
print(f"small.safetensors: {fg.macs(small, (3, 8, 8)) / search.macs:.3f} of the MACs, a plain {type(small).__name__}")
