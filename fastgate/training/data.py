"""Image sets that live on the device as uint8, and batches that are cropped, flipped and normalised there."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DATASETS = ("digits", "cifar10", "cifar100")


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 `[N, C, H, W]` and labels int64 `[N]`, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device) -> "ImageSet":
        """The same set on another device."""
        return ImageSet(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor) -> "ImageSet":
        """The images at these indices."""
        indices = indices.to(self.labels.device)
        return ImageSet(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """A data set with its splits and what preprocessing needs.

    Attributes:
        train, test: the splits; `validation` is None unless images were held out from `train`.
        mean, std: per channel, of the training images scaled to 0..1.
        pad: random crops are taken from images padded by this many zero pixels.
        flip: whether mirrored images are of the same class.
    """

    name: str
    train: ImageSet
    test: ImageSet
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool
    validation: ImageSet | None = None

    @property
    def image_size(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        c, h, w = self.train.images.shape[1:]
        return (c, h, w)


def load_dataset(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    download: bool = False,
    validation: int = 0,
    device: torch.device | str = "cpu",
) -> Dataset:
    """Load a data set onto a device.

    Args:
        name: `"digits"` (scikit-learn's 1797 handwritten digits, 8x8), `"cifar10"` or `"cifar100"`.
        root: where CIFAR lies: the folder with the official binary layout (`cifar-10-batches-bin`,
            `cifar-100-binary`) or torchvision's (`cifar-10-batches-py`, `cifar-100-python`). None reads the
            environment variable FASTGATE_DATA.
        download: let torchvision download CIFAR into `root` if it is not there.
        validation: number of training images to hold out, always the same ones.
        device: where the images live.

    Raises:
        ValueError: an unknown name, no root, damaged files, or a validation split that leaves no training images.
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
        # per-channel statistics of the 50,000 training images, as everybody uses them
        if name == "cifar10":
            mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
        else:
            mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
        classes, pad, flip = (10 if name == "cifar10" else 100), 4, True
    held_out = None
    if validation:
        if not 0 < validation < len(train):
            raise ValueError(f"validation: expected 0 to {len(train) - 1} images, got {validation}")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        held_out, train = train.take(order[:validation]).to(device), train.take(order[validation:])
    return Dataset(name, train.to(device), test.to(device), classes, mean, std, pad, flip, held_out)


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


class Batches:
    """Batches of normalised images and labels, `(x float32 [B, C, H, W], y int64 [B])`, made on the set's device.

    With `augment`, each sample is cropped from its zero-padded image at a random offset and, where the data set allows,
    mirrored with probability 0.5. Order and augmentation depend on `seed` and `epoch` alone, so that a run can start
    at any step of any epoch and see what it would have seen.

    Args:
        dataset: gives the preprocessing.
        images: the split to read.
        batch_size: samples per batch.
        augment: shuffle and augment, and drop the last short batch (batch statistics need full ones).
        seed: of the run.
        channels_last: memory format of x.
        shard: (number of a process, number of processes): read only what is that process' part. With `augment` these
            are equal parts of every batch, else every so-manieth batch.

    Raises:
        ValueError: more samples per batch than there are, or a batch that processes cannot share equally.
    """

    def __init__(
        self,
        dataset: Dataset,
        images: ImageSet,
        batch_size: int,
        *,
        augment: bool = False,
        seed: int = 0,
        channels_last: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        if augment and batch_size % shard[1]:
            raise ValueError(
                f"batch_size: expected a multiple of the {shard[1]} processes, among which a batch is shared, got "
                f"{batch_size}; change one of them"
            )
        if augment and batch_size > len(images):
            raise ValueError(f"batch_size: expected at most {len(images)} (the training images), got {batch_size}")
        device = images.labels.device
        self.dataset = dataset
        self.images = images
        self.batch_size = batch_size
        self.augment = augment
        self.seed = seed
        self.shard = shard
        self.epoch = 0
        self.first_step = 0
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._mean = torch.tensor(dataset.mean, device=device)[:, None, None] * 255
        self._scale = 1 / (torch.tensor(dataset.std, device=device)[:, None, None] * 255)

    def __len__(self) -> int:
        full, rest = divmod(len(self.images), self.batch_size)
        return full if self.augment or not rest else full + 1

    def start_at(self, epoch: int, step: int = 0) -> "Batches":
        """Let the next iteration give epoch `epoch` from step `step` on."""
        self.epoch, self.first_step = epoch, step
        return self

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device, n = self.images.labels.device, len(self.images)
        own, processes = self.shard
        if not self.augment:
            for start in range((self.first_step + own) * self.batch_size, n, processes * self.batch_size):
                part = slice(start, start + self.batch_size)
                yield self._normalise(self.images.images[part]), self.images.labels[part]
            return
        # all of an epoch's random numbers at once: no host work per step
        generator = torch.Generator(device).manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(n, generator=generator, device=device)
        offsets = torch.randint(2 * self.dataset.pad + 1, (2, n), generator=generator, device=device)
        flips = torch.rand(n, generator=generator, device=device) < (0.5 if self.dataset.flip else 0.0)
        share = self.batch_size // processes
        for step in range(self.first_step, len(self)):
            start = step * self.batch_size + own * share
            part = slice(start, start + share)
            index = order[part]
            images = crop_and_flip(self.images.images[index], self.dataset.pad, offsets[:, part], flips[part])
            yield self._normalise(images), self.images.labels[index]

    def _normalise(self, images: Tensor) -> Tensor:
        x = (images.float() - self._mean) * self._scale
        return x.contiguous(memory_format=self._memory_format)


def crop_and_flip(images: Tensor, pad: int, offsets: Tensor, flips: Tensor) -> Tensor:
    """Crop each image `[N, C, H, W]` from its zero-padded self at offsets `[2, N]` (row, column), mirror where `flips`.

    One gather for the whole batch.
    """
    n, _, h, w = images.shape
    rows = offsets[0][:, None] + torch.arange(h, device=images.device)
    columns = torch.arange(w, device=images.device).expand(n, w)
    columns = offsets[1][:, None] + torch.where(flips[:, None], columns.flip(1), columns)
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    samples = torch.arange(n, device=images.device)[:, None, None]
    return padded[samples, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
