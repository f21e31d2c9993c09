"""Image data sets behind one interface, :class:`Data`; :func:`load_data` loads them by name.

- `"digits"`, `"cifar10"`, `"cifar100"` are kept on the training device as uint8, where batches are cropped, flipped and
  normalised: :class:`Dataset`.
- `"folder:PATH"` is a folder of the user's images, read and cropped in worker processes; batches are flipped,
  colour-jittered and normalised on the training device: :class:`~fastgate.training.data.folder.Folder`.

A :class:`Data` has a `name`, `image_size` (C, H, W), `num_classes`, `class_names` (or None), `mean` and `std` per
channel and `splits`, the numbers of images of "train", "test" and, where images were held out, "validation". Its
batches are `(x float32 [B, C, H, W], y int64 [B])`, x normalised, both on the training device:

- `training(batch_size, seed=0, shard=(0, 1), channels_last=False)`: the training images, shuffled and augmented. Order
  and augmentation depend only on the seed, the epoch and the position in the epoch, so that `start_at(epoch, step)`
  gives the batches of an uninterrupted run, with any number of workers.
- `evaluation(split, batch_size, shard=(0, 1), channels_last=False)`: every image of a split once, in order, without
  augmentation.

Both are loaders with `batch_size`, `samples`, `shard` and a length: :class:`Loader`.
"""

import difflib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastgate.training.data.augmentation import Augmentation, check_channels, crop_and_flip
from fastgate.training.data.interface import Data, Loader, TrainingLoader
from fastgate.training.data.resident import Batches, Dataset, ImageSet
from fastgate.training.data.sources import DATASETS, load_dataset

__all__ = [
    "DATASETS",
    "Augmentation",
    "Batches",
    "Data",
    "Dataset",
    "ImageSet",
    "Loader",
    "TrainingLoader",
    "crop_and_flip",
    "load_data",
    "load_dataset",
]


def load_data(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    download: bool = False,
    validation: float = 0,
    train_images: float | None = None,
    device: torch.device | str = "cpu",
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    workers: int | None = None,
    augmentation: Augmentation | None = None,
) -> Data:
    """Load a data set by its name.

    Args:
        name: one of :data:`DATASETS`, see :func:`load_dataset`, or `"folder:PATH"`, see
            :class:`~fastgate.training.data.folder.Folder`.
        root: folder that holds CIFAR, or that a relative PATH of a folder is relative to.
        download: let torchvision download CIFAR into `root` if it is not there.
        validation: number of training images to hold out, or a fraction below 1; always the same ones.
        train_images: number of the remaining training images to use, or a fraction below 1; always the same ones. None
            uses all.
        device: device of the batches.
        image_size: side of the images in pixels. None: 224 for folders, unchanged for the others, which are averaged
            down, so it must divide their size.
        mean, std: per channel, of images scaled to 0..1, as the initial weights require. None: the data set's own;
            ImageNet's for folders.
        workers: processes that read images, 0 to read them in this one; None: one per CPU, up to 8. Folders only.
        augmentation: augmentation of the training images. Folders only.

    Raises:
        ValueError: an unknown name, an option that does not apply to the data set, or a value that it rejects.
        FileNotFoundError: the data do not exist.
    """
    kind, _, path = name.partition(":")
    if kind == "folder" and path:
        if download:
            raise ValueError(f"download: expected cifar10 or cifar100, got {name!r}; leave it out")
        from fastgate.training.data.folder import Folder

        return Folder(
            Path(root or "") / Path(path).expanduser(),
            name=name,
            validation=validation,
            train_images=train_images,
            device=device,
            image_size=224 if image_size is None else image_size,
            mean=mean,
            std=std,
            workers=workers,
            augmentation=augmentation,
        )
    if name not in DATASETS:
        raise ValueError(f"dataset: expected one of {', '.join(DATASETS)} or folder:PATH, got {name!r}{_meant(name)}")
    for option, value in (("workers", workers), ("augmentation", augmentation)):
        if value is not None:
            raise ValueError(
                f"{option}: expected none for {name}, whose images are in memory with a fixed augmentation, got "
                f"{value}; leave it out, or use folder:PATH"
            )
    data = load_dataset(
        name,
        root,
        download=download,
        validation=validation,
        train_images=train_images,
        image_size=image_size,
        device=device,
    )
    channels = data.image_size[0]
    return replace(
        data,
        mean=data.mean if mean is None else check_channels("mean", mean, channels),
        std=data.std if std is None else check_channels("std", std, channels),
    )


def _meant(name: str) -> str:
    if Path(name).is_dir():
        return f"; did you mean 'folder:{name}'?"
    near = difflib.get_close_matches(name.lower(), DATASETS, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
