"""Image sets kept on the device as uint8, and batches that are cropped, flipped and normalised there."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgate.training.data.augmentation import Normalisation, crop_and_flip
from fastgate.training.data.interface import Batching, check_split, evaluation_batch_size


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

    def shrunk(self, size: int) -> "ImageSet":
        """The same images averaged down to sides of `size` pixels.

        Raises:
            ValueError: the images' sides are not multiples of `size`.
        """
        height, width = self.images.shape[-2:]
        if size < 1 or height % size or width % size:
            raise ValueError(
                f"image_size: expected a divisor of the images' {height}x{width} pixels, which are averaged, got {size}"
            )
        if height == width == size:
            return self
        means = F.avg_pool2d(self.images.float(), (height // size, width // size))
        return ImageSet(means.round().to(torch.uint8), self.labels)

    def take(self, indices: Tensor) -> "ImageSet":
        """The images at these indices."""
        indices = indices.to(self.labels.device)
        return ImageSet(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """A data set with its splits and the parameters of its preprocessing.

    Attributes:
        train, test: the splits; `validation` is None unless images were held out from `train`.
        mean, std: per channel, of the training images scaled to 0..1.
        pad: zero pixels of padding on each side for random crops.
        flip: whether mirroring preserves the class.
        class_names: by label, if the data set has names.
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
    class_names: tuple[str, ...] | None = None

    @property
    def image_size(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        c, h, w = self.train.images.shape[1:]
        return (c, h, w)

    @property
    def splits(self) -> dict[str, int]:
        """Numbers of images, see :class:`~fastgate.training.data.Data`."""
        return {name: len(images) for name, images in self._images.items()}

    @property
    def _images(self) -> dict[str, ImageSet]:
        held_out = {} if self.validation is None else {"validation": self.validation}
        return {"train": self.train, "test": self.test} | held_out

    def training(
        self, batch_size: int, *, seed: int = 0, shard: tuple[int, int] = (0, 1), channels_last: bool = False
    ) -> "Batches":
        """The training images, augmented, see :class:`~fastgate.training.data.Data`."""
        return Batches(self, self.train, batch_size, augment=True, seed=seed, channels_last=channels_last, shard=shard)

    def evaluation(
        self, split: str, batch_size: int, *, shard: tuple[int, int] = (0, 1), channels_last: bool = False
    ) -> "Batches":
        """A split without augmentation, see :class:`~fastgate.training.data.Data`."""
        check_split(self, split)
        images = self._images[split]
        batch_size = evaluation_batch_size(batch_size, len(images), shard)
        return Batches(self, images, batch_size, channels_last=channels_last, shard=shard)


class Batches:
    """Batches of normalised images and labels, `(x float32 [B, C, H, W], y int64 [B])`, made on the set's device.

    With `augment`, each sample is cropped from its zero-padded image at a random offset and, if the data set allows,
    mirrored with probability 0.5. Order and augmentation depend only on `seed` and `epoch`, so that a run can start at
    any step of any epoch and see the same batches.

    Args:
        dataset: defines the preprocessing.
        images: the split to read.
        batch_size: samples per batch.
        augment: shuffle and augment, and drop the last short batch (batch statistics need full ones).
        seed: of the run.
        channels_last: memory format of x.
        shard: (index of a process, number of processes): read only that process's part. With `augment` this is an equal
            part of every batch, otherwise every k-th batch of k processes.

    Raises:
        ValueError: fewer samples than a batch, or a batch size that processes cannot share equally.
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
        self.dataset = dataset
        self.images = images
        self.batch_size = batch_size
        self.augment = augment
        self.seed = seed
        self.shard = shard
        self.epoch = 0
        self.first_step = 0
        self._batching = Batching(len(images), batch_size, shard, full=augment)
        self._normalise = Normalisation(dataset.mean, dataset.std, images.labels.device, channels_last)

    def __len__(self) -> int:
        return len(self._batching)

    @property
    def samples(self) -> int:
        """Images in a whole pass, over all shards."""
        return self._batching.samples

    def start_at(self, epoch: int, step: int = 0) -> "Batches":
        """Let the next pass yield epoch `epoch`, starting at step `step`."""
        self.epoch, self.first_step = epoch, step
        return self

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device, n = self.images.labels.device, len(self.images)
        if not self.augment:
            for part in self._batching.parts(self.first_step):
                yield self._normalise(self.images.images[part]), self.images.labels[part]
            return
        # all of an epoch's random numbers at once: no host work per step
        generator = torch.Generator(device).manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(n, generator=generator, device=device)
        offsets = torch.randint(2 * self.dataset.pad + 1, (2, n), generator=generator, device=device)
        flips = torch.rand(n, generator=generator, device=device) < (0.5 if self.dataset.flip else 0.0)
        for part in self._batching.parts(self.first_step):
            index = order[part]
            images = crop_and_flip(self.images.images[index], self.dataset.pad, offsets[:, part], flips[part])
            yield self._normalise(images), self.images.labels[index]
