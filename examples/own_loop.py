"""Prune a ResNet on a folder of your own images, in a loop of your own: `python examples/own_loop.py FOLDER`.

FOLDER holds train/ and val/, and in each of them a folder of images for every class.
"""

import argparse
import json
from pathlib import Path

import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import fastgate as fg


def main() -> None:
    """Train, prune and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()

    torch.manual_seed(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = options.image_size
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    to_tensor = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    train_transform = transforms.Compose(
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *to_tensor]
    )
    eval_transform = transforms.Compose([transforms.Resize(size * 256 // 224), transforms.CenterCrop(size), *to_tensor])
    train = ImageFolder(options.folder / "train", train_transform)
    val = ImageFolder(options.folder / "val", eval_transform)
    if train.classes != val.classes:
        raise SystemExit(f"val/: expected the classes of train/, {train.classes}, got {val.classes}")
    loader = DataLoader(train, options.batch_size, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)
    val_loader = DataLoader(val, options.batch_size, num_workers=2, persistent_workers=True)

    # to fine-tune: resnet18(weights="DEFAULT"), model.fc = torch.nn.Linear(512, len(train.classes)), lr=0.01, and
    # parameter_groups(model, gate_lr=0.1), since gates learn too slowly at that rate
    model = torchvision.models.resnet18(num_classes=len(train.classes))
    model = fg.attach(model, gating="channel").to(device)
    optimizer = torch.optim.SGD(fg.parameter_groups(model), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    config = fg.SearchConfig(target=0.5)  # half of the MACs
    search = fg.GateSearch(model, (3, size, size), optimizer, epochs=options.epochs, config=config)

    for epoch in range(options.epochs):
        search.begin_epoch(epoch, loader)
        model.train()
        for i, (x, y) in enumerate(loader):
            loss = torch.nn.functional.cross_entropy(model(x.to(device)), y.to(device)) + search.loss(i / len(loader))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        search.refresh(loader)  # recompute running statistics before an evaluation
        model.eval()
        with torch.no_grad():
            correct = sum(int((model(x.to(device)).argmax(1).cpu() == y).sum()) for x, y in val_loader)
        line = search.metrics()
        share = line["macs"] / search.macs
        print(f"epoch {epoch + 1}: {line['phase']}, accuracy {correct / len(val):.3f}, MACs {share:.3f}")

    small = search.compact(loader)
    fg.save(small, "small.safetensors", metadata={"classes": json.dumps(train.classes)})
    print(f"small.safetensors: {fg.macs(small, (3, size, size)) / search.macs:.3f} of the MACs")
    images = next(iter(val_loader))[0]
    difference = fg.export_onnx(fg.fuse(small, images), images, "small.onnx", dynamic_batch=True)
    print(f"small.onnx: largest difference in onnxruntime {difference:.1g}")


if __name__ == "__main__":
    main()
