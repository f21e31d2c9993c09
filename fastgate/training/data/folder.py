"""Folders of JPEGs and other images, read while the network trains."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastgate.training.data.augmentation import Augmentation, Normalisation, check_channels, flip_and_colour
from fastgate.training.data.interface import Batching, check_split, evaluation_batch_size
from fastgate.training.data.layout import Split, find_splits
from fastgate.training.data.reading import Reader, default_workers, interrupts_held_back, start_worker

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Folder:
    """A folder of images, laid out as torchvision's `ImageFolder`: a :class:`~fastgate.training.data.Data`.

    Each class is a folder of images, including its subfolders; classes are sorted by name. The splits:

    ==================================  ===========================  =================================================
    in the folder                       "test"                       "validation"
    ==================================  ===========================  =================================================
    train/, val/ and test/              test/                        val/
    train/ and val/, or train/ and      val/ or test/                none, or what `validation` holds out from train/
    test/
    train/ alone, or classes            what `validation` holds out  none
    ==================================  ===========================  =================================================

    (valid/ and validation/ count as val/.) Thus a single set of images outside training is the test split, on which
    results are reported, also when it is held out from a single folder: nothing is selected on it. The images held out
    are always the same ones, stratified by class.

    Training images are random resized crops, half of them mirrored, with colour jitter; all others are resized to a
    shorter side of 256/224 of the size and centre-cropped. Worker processes read, crop and resize the files, which
    differ in size; the rest runs in batches on the device. Images are rotated upright by their EXIF data, and converted
    to RGB.

    Args:
        path: the folder.
        name: of the data set; None: `"folder:PATH"`.
        validation: number of training images to hold out, or a fraction below 1.
        train_images: number of the remaining images to train on, or a fraction below 1, stratified by class. None uses
            all.
        device: device of the batches.
        image_size: side in pixels of the images in a batch.
        mean, std: per channel, of images scaled to 0..1; None: those of ImageNet, which most weights were trained with.
        workers: processes that read images, 0 to read them in this one; None: one per CPU, up to 8. Batches do not
            depend on it. Workers live as long as their loader.
        augmentation: augmentation of the training images; None: the defaults.

    Raises:
        ValueError: no classes, a class without images, splits with different classes, images held out although there
            are validation images, or too many; an argument out of range.
        FileNotFoundError: the folder does not exist.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        validation: float = 0,
        train_images: float | None = None,
        device: torch.device | str = "cpu",
        image_size: int = 224,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        workers: int | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size: expected 1 pixel or more, got {image_size}")
        if workers is not None and workers < 0:
            raise ValueError(f"workers: expected 0 or more processes, or None, got {workers}")
        self.name = f"folder:{os.fspath(path)}" if name is None else name
        self.image_size = (3, image_size, image_size)
        self.mean = check_channels("mean", IMAGENET_MEAN if mean is None else mean, 3)
        self.std = check_channels("std", IMAGENET_STD if std is None else std, 3)
        self.device = torch.device(device)
        self.workers = default_workers() if workers is None else workers
        self.augmentation = Augmentation() if augmentation is None else augmentation
        self.class_names, self._images = find_splits(Path(path), validation, train_images)

    @property
    def num_classes(self) -> int:
        """Labels are 0 to num_classes - 1."""
        return len(self.class_names)

    @property
    def splits(self) -> dict[str, int]:
        """Numbers of images, see :class:`~fastgate.training.data.Data`."""
        return {name: len(images) for name, images in self._images.items()}

    def training(
        self, batch_size: int, *, seed: int = 0, shard: tuple[int, int] = (0, 1), channels_last: bool = False
    ) -> "FolderLoader":
        """The training images, augmented, see :class:`~fastgate.training.data.Data`."""
        batching = Batching(len(self._images["train"]), batch_size, shard, full=True)
        return FolderLoader(self, self._images["train"], batching, seed=seed, channels_last=channels_last)

    def evaluation(
        self, split: str, batch_size: int, *, shard: tuple[int, int] = (0, 1), channels_last: bool = False
    ) -> "FolderLoader":
        """A split without augmentation, see :class:`~fastgate.training.data.Data`."""
        check_split(self, split)
        images = self._images[split]
        batching = Batching(len(images), evaluation_batch_size(batch_size, len(images), shard), shard)
        return FolderLoader(self, images, batching, channels_last=channels_last)


class FolderLoader:
    """Batches of images of a folder, see :meth:`Folder.training` and :meth:`Folder.evaluation`.

    Workers are started by the first pass and wait between passes; they end with the loader. Beginning a pass ends an
    unfinished one. A pass raises a ValueError that names a file that cannot be read.

    Args:
        data: the folder.
        images: the split to read.
        batching: how images are split into batches; full batches are shuffled and augmented.
        seed: of order and augmentation.
        channels_last: memory format of x.
    """

    def __init__(
        self, data: Folder, images: Split, batching: Batching, *, seed: int = 0, channels_last: bool = False
    ) -> None:
        self.batch_size = batching.batch_size
        self.samples = batching.samples
        self.shard = batching.shard
        self.seed = seed
        self.epoch = 0
        self.first_step = 0
        self._images = images
        self._batching = batching
        self._augmentation = data.augmentation
        self._device = data.device
        self._normalise = Normalisation(data.mean, data.std, data.device, channels_last)
        self._reader = Reader(data.image_size[1], data.augmentation)
        self._workers = min(data.workers, len(batching))
        self._plan = _Plan()
        self._reading: DataLoader[Tensor | str] | None = None
        self._pass: object = None  # the pass that the workers read for

    def __len__(self) -> int:
        return len(self._batching)

    def start_at(self, epoch: int, step: int = 0) -> "FolderLoader":
        """Let the next pass yield epoch `epoch`, starting at step `step`."""
        self.epoch, self.first_step = epoch, step
        return self

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        this_pass = self._pass = object()
        parts = list(self._batching.parts(self.first_step))
        if not parts:
            return
        order, crops, flips, factors = self._draw()
        labels = self._images.labels[order].to(self._device)
        paths = self._images.paths  # not through self: in a reference cycle workers end late, see below
        self._plan.batches = (_wanted(paths, order[part], crops[part]) for part in parts)
        if self._reading is None:
            self._reading = self._start_reading()
        with interrupts_held_back():
            batches = iter(self._reading)
        for part in parts:
            if self._pass is not this_pass:
                raise RuntimeError(
                    "a pass over this loader continued after another one has begun, for which its workers now read; "
                    "finish one first, or make a loader for each"
                )
            images = next(batches)
            if isinstance(images, str):
                # Workers end at once when their last reference is dropped, but take seconds each in the garbage
                # collector, which collects their queues first; and a reference to the error keeps this frame alive.
                del batches
                self._reading = None
                raise ValueError(images)
            x = images.to(self._device, non_blocking=True)
            if self._batching.full:
                x = flip_and_colour(x, flips[part], factors[part])
            yield self._normalise(x), labels[part]

    def _draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All random numbers of an epoch: order and seeds of crops, on the CPU; flips and colour, on the device."""
        n, augmentation = len(self._images), self._augmentation
        if not self._batching.full:
            nothing = torch.empty(0)
            return torch.arange(n), torch.full((n,), -1), nothing, nothing
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(n, generator=generator)
        crops = torch.randint(2**63 - 1, (n,), generator=generator)
        flips = torch.rand(n, generator=generator) < (0.5 if augmentation.flip else 0.0)
        factors = 1 + augmentation.colour * (2 * torch.rand(n, 3, generator=generator) - 1)
        return order, crops, flips.to(self._device), factors.to(self._device)

    def _start_reading(self) -> DataLoader[Tensor | str]:
        return DataLoader(
            self._reader,
            batch_size=None,  # a batch is read as a whole: the plan has one entry per batch
            sampler=self._plan,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=start_worker,
            # workers are seeded from it, although they draw nothing: it must not be the global generator
            generator=torch.Generator(),
            persistent_workers=self._workers > 0,
        )


def _wanted(paths: list[str], order: Tensor, crops: Tensor) -> list[tuple[str, int | None]]:
    """A request to a Reader: files with the seeds of their random crops, None where negative."""
    seeds = crops.tolist()
    return [(paths[i], seed if seed >= 0 else None) for i, seed in zip(order.tolist(), seeds, strict=True)]


class _Plan:
    """The batches to read in a pass, for a DataLoader that outlives passes; it iterates over them anew in each pass."""

    batches: Iterable[list[tuple[str, int | None]]] = ()

    def __iter__(self) -> Iterator[list[tuple[str, int | None]]]:
        return iter(self.batches)
