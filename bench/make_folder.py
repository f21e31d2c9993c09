"""Makes a folder of JPEGs such as a user would have: `python -m bench.make_folder DATA OUTPUT`.

OUTPUT/train and OUTPUT/val have a folder for each class of CIFAR-10, with enlarged images of DATA's training and test
split, always the same ones.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from fastgate.training.data import ImageSet, load_dataset

SIZE, QUALITY, SEED = 64, 90, 0


def choose(images: ImageSet, count: int, classes: int) -> torch.Tensor:
    """Indices of `count` images, the same number of each class."""
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(images), generator=generator)
    labels = images.labels[order]
    return torch.cat([order[labels == label][: count // classes] for label in range(classes)])


def write_images(images: ImageSet, indices: torch.Tensor, names: tuple[str, ...], folder: Path) -> None:
    """One JPEG per index, named after it, in the folder of its class."""
    for index in indices.tolist():
        path = folder / names[int(images.labels[index])] / f"{index:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(images.images[index].permute(1, 2, 0).numpy())
        image.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(path, quality=QUALITY)


def main() -> None:
    """Read the command line, write the images, and print their numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with CIFAR-10 in its binary or torchvision's layout")
    parser.add_argument("output", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--train", type=int, default=1000, help="number of images in train/, a tenth of each class")
    parser.add_argument("--val", type=int, default=500, help="number of images in val/, a tenth of each class")
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output}: expected a folder that does not exist yet; remove it, or choose another")
    data = load_dataset("cifar10", options.data)
    names = data.class_names or ()
    unfinished = options.output.with_name(f".{options.output.name}.tmp")  # a kill leaves no incomplete OUTPUT
    for split, images, count in (("train", data.train, options.train), ("val", data.test, options.val)):
        largest = min(torch.bincount(images.labels).tolist()) * len(names)
        if count % len(names) or not 0 < count <= largest:
            parser.error(f"--{split}: expected a multiple of {len(names)} from {len(names)} to {largest}, got {count}")
        write_images(images, choose(images, count, len(names)), names, unfinished / split)
    unfinished.rename(options.output)
    print(f"{options.output}: {options.train} images in train/, {options.val} in val/, {len(names)} classes")


if __name__ == "__main__":
    main()
