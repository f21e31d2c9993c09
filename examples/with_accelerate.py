"""Prune with accelerate: `python examples/with_accelerate.py`.

On two GPUs `torchrun --nproc-per-node 2 examples/with_accelerate.py`, or the same with `accelerate launch --multi_gpu`;
in two processes on a CPU `ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/with_accelerate.py`.
"""

import sys

import torch
import torchvision
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import fastgate as fg

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
accelerator = Accelerator()
torch.manual_seed(1)
pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8).repeat(1, 3, 1, 1) / 8 - 1
loader = DataLoader(TensorDataset(images, torch.tensor(labels)), 64, shuffle=True, drop_last=True)

model = fg.attach(torchvision.models.resnet18(num_classes=10), gating="channel")
optimizer = torch.optim.SGD(fg.parameter_groups(model), lr=0.05, momentum=0.9)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
search = fg.GateSearch(model, (3, 8, 8), optimizer, epochs=epochs, config=fg.SearchConfig(target=0.5))

for epoch in range(epochs):
    if search.begin_epoch(epoch, loader):  # the network was pruned: wrap it again
        model = accelerator.prepare(search.model)
    model.train()
    for i, (x, y) in enumerate(loader):
        loss = torch.nn.functional.cross_entropy(model(x), y) + search.loss(i / len(loader))
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()

small = search.compact(loader)
if accelerator.is_main_process:
    fg.save(small, "small.safetensors")
    print(f"small.safetensors: {fg.macs(small, (3, 8, 8)) / search.macs:.3f} of the MACs")
    print(f"trained in {accelerator.num_processes} processes")
accelerator.end_training()
