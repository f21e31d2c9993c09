"""Data sets by name: scikit-learn's digits, CIFAR-10 and CIFAR-100."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgate.training.data.interface import images_held_out, images_taken
from fastgate.training.data.resident import Dataset, ImageSet

DATASETS = ("digits", "cifar10", "cifar100")

_CLASS_NAMES = {
    "digits": tuple("0123456789"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}


def load_dataset(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    download: bool = False,
    validation: float = 0,
    train_images: float | None = None,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
) -> Dataset:
    """Load a data set onto a device.

    Args:
        name: `"digits"` (scikit-learn's 1797 handwritten digits, 8x8), `"cifar10"` or `"cifar100"`.
        root: the folder that holds CIFAR in its official binary layout (`cifar-10-batches-bin`, `cifar-100-binary`) or
            torchvision's (`cifar-10-batches-py`, `cifar-100-python`). None reads the environment variable
            FASTGATE_DATA.
        download: let torchvision download CIFAR into `root` if it is not there.
        validation: number of training images to hold out, or a fraction below 1; always the same ones.
        train_images: number of the remaining images to train on, or a fraction below 1; always the same ones. None uses
            all.
        image_size: side in pixels to which the images are averaged down. None leaves them unchanged.
        device: device of the images.

    Raises:
        ValueError: an unknown name, no root, damaged files, a size that does not divide the images', more images than
            there are, or a validation split that leaves none to train on.
        FileNotFoundError: the data are not under `root`.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset: expected one of {', '.join(DATASETS)}, got {name!r}")
    device = torch.device(device)
    if name == "digits":
        train, test = _digits()
        scaled = train.images.double() / 255
        mean: tuple[float, ...] = (float(scaled.mean()),)
        std: tuple[float, ...] = (float(scaled.std()),)
        classes, pad, flip = 10, 1, False
    else:
        train, test = _cifar(name, root, download)
        # the customary per-channel statistics of the 50,000 training images
        if name == "cifar10":
            mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
        else:
            mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
        classes, pad, flip = (10 if name == "cifar10" else 100), 4, True
    if image_size is not None:
        size = train.images.shape[-1]
        train, test = (images.shrunk(image_size) for images in (train, test))
        pad = max(1, pad * image_size // size)
    held_out = None
    if count := images_held_out(validation, len(train)):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        held_out, train = train.take(order[:count]).to(device), train.take(order[count:])
    if train_images is not None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        train = train.take(order[: images_taken(train_images, len(train))])
    names = _CLASS_NAMES.get(name)
    return Dataset(name, train.to(device), test.to(device), classes, mean, std, pad, flip, held_out, names)


def _digits() -> tuple[ImageSet, ImageSet]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    split = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.from_numpy(np.ascontiguousarray(part)) for part in split)
    return ImageSet(train_x, train_y.long()), ImageSet(test_x, test_y.long())


def _cifar(name: str, root: str | os.PathLike[str] | None, download: bool) -> tuple[ImageSet, ImageSet]:
    root = root or os.environ.get("FASTGATE_DATA")
    if not root:
        raise ValueError(
            f"data root: expected the folder that holds {name}, got none; pass --data-root or set FASTGATE_DATA"
        )
    folder = Path(root)
    if name == "cifar10":
        binary, label_bytes = "cifar-10-batches-bin", 1
        files = [[f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]]
    else:
        binary, label_bytes = "cifar-100-binary", 2
        files = [["train.bin"], ["test.bin"]]
    for candidate in (folder / binary, folder):
        if (candidate / files[0][0]).is_file():
            train, test = (_read_binary(candidate, names, label_bytes) for names in files)
            return train, test
    python = folder / ("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")
    if not (python.is_dir() or download):
        raise FileNotFoundError(
            f"data root: expected {binary} or {python.name} under {folder}, found neither; put the official files "
            "there, or pass --download"
        )
    return _torchvision_cifar(name, folder, download)


def _read_binary(folder: Path, names: list[str], label_bytes: int) -> ImageSet:
    record = label_bytes + 3 * 32 * 32
    images, labels = [], []
    for name in names:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected a file of the official binary layout, found none")
        data = np.fromfile(path, np.uint8)
        expected = (50_000 if name == "train.bin" else 10_000) * record
        if data.size != expected:
            raise ValueError(f"{path}: expected {expected:,} bytes, got {data.size:,}; the file is cut off or foreign")
        rows = data.reshape(-1, record)
        # the last label byte is the class; in CIFAR-100 the first one is the coarse class
        labels.append(rows[:, label_bytes - 1].astype(np.int64))
        images.append(rows[:, label_bytes:].reshape(-1, 3, 32, 32))
    return ImageSet(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)))


def _torchvision_cifar(name: str, folder: Path, download: bool) -> tuple[ImageSet, ImageSet]:
    from torchvision import datasets

    cls = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    sets = []
    for is_train in (True, False):
        try:
            data: Any = cls(str(folder), train=is_train, download=download)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{folder}: torchvision could not load {name} ({error}); check the files") from error
        images = torch.from_numpy(np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)))
        sets.append(ImageSet(images, torch.tensor(data.targets)))
    return sets[0], sets[1]
