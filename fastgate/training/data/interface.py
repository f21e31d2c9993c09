"""The interface between trainer and data sets, and the arithmetic of batches that all data sets share."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# evaluation of folders: shorter side of an image / side of its centre crop, as for torchvision's weights
RESIZED = 256 / 224


class Loader(Protocol):
    """Batches `(x float32 [B, C, H, W], y int64 [B])` on the training device, x normalised."""

    @property
    def batch_size(self) -> int:
        """Images per batch, over all shards if a batch is shared."""

    @property
    def samples(self) -> int:
        """Images in a whole pass, over all shards."""

    @property
    def shard(self) -> tuple[int, int]:
        """(index of a process, number of processes): the part of the images in this loader."""

    def __len__(self) -> int:
        """Batches in a whole pass of this shard."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


class TrainingLoader(Loader, Protocol):
    """Shuffled and augmented full batches. Each pass repeats the same epoch unless `start_at` sets another."""

    def start_at(self, epoch: int, step: int = 0) -> "TrainingLoader":
        """Let the next pass yield epoch `epoch`, starting at step `step`; returns the loader itself."""


class Data(Protocol):
    """A data set: the properties that a network and a trainer need, and its batches.

    "train" trains the weights and the gates; "validation", if there is one, is evaluated during training; results are
    reported on "test", which is evaluated during training if there is no validation split. Nothing is selected on
    either.
    """

    @property
    def name(self) -> str:
        """The name that :func:`~fastgate.training.data.load_data` takes."""

    @property
    def image_size(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    @property
    def num_classes(self) -> int:
        """Labels are 0 to num_classes - 1."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names by label; None if unknown."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, of images scaled to 0..1, for the normalisation of x."""

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, as `mean`."""

    @property
    def splits(self) -> Mapping[str, int]:
        """Numbers of images of "train", "test" and, if there is one, "validation"."""

    def training(
        self, batch_size: int, *, seed: int = 0, shard: tuple[int, int] = (0, 1), channels_last: bool = False
    ) -> TrainingLoader:
        """The training images, shuffled and augmented; the last short batch is dropped.

        Order and augmentation depend only on `seed`, the epoch and the position in it. Each process of `shard` gets an
        equal part of every batch.

        Raises:
            ValueError: fewer images than a batch, or a batch size that the processes cannot share equally.
        """

    def evaluation(
        self, split: str, batch_size: int, *, shard: tuple[int, int] = (0, 1), channels_last: bool = False
    ) -> Loader:
        """Every image of a split once, in order, without augmentation. The processes of `shard` take turns.

        Batches are smaller than `batch_size` if a process would otherwise have none.

        Raises:
            ValueError: there is no such split.
        """


@dataclass(frozen=True)
class Batching:
    """The division of images into batches and over processes.

    Args:
        images: number of images.
        batch_size: images per batch.
        shard: (index of a process, number of processes).
        full: only full batches, of which each process gets an equal part; otherwise all images, in batches that the
            processes take in turns.

    Raises:
        ValueError: an empty batch, an impossible shard, or full batches of more images than there are or that the
            processes cannot share equally.
    """

    images: int
    batch_size: int
    shard: tuple[int, int] = (0, 1)
    full: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {self.batch_size}")
        if not 0 <= self.shard[0] < self.shard[1]:
            raise ValueError(
                f"shard: expected (index of a process, number of processes), such as (0, 2), got {self.shard}"
            )
        if self.full and self.batch_size % self.shard[1]:
            raise ValueError(
                f"batch_size: expected a multiple of the {self.shard[1]} processes, among which a batch is shared, "
                f"got {self.batch_size}; change one of them"
            )
        if self.full and self.batch_size > self.images:
            raise ValueError(f"batch_size: expected at most {self.images} (the training images), got {self.batch_size}")

    @property
    def samples(self) -> int:
        """Images in a whole pass, over all shards."""
        return self.images // self.batch_size * self.batch_size if self.full else self.images

    def __len__(self) -> int:
        return len(self._starts(0))

    def parts(self, first_step: int = 0) -> Iterator[slice]:
        """This process's part of each batch from step `first_step` on, as positions in the order of a pass."""
        size = self.batch_size // self.shard[1] if self.full else self.batch_size
        for start in self._starts(first_step):
            yield slice(start, min(start + size, self.images))

    def _starts(self, first_step: int) -> range:
        own, processes = self.shard
        if self.full:
            share = self.batch_size // processes
            return range(first_step * self.batch_size + own * share, self.samples, self.batch_size)
        return range((first_step * processes + own) * self.batch_size, self.images, processes * self.batch_size)


def evaluation_batch_size(batch_size: int, images: int, shard: tuple[int, int]) -> int:
    """`batch_size`, reduced if that is needed to give every process a batch."""
    return min(batch_size, max(images // shard[1], 1))


def check_split(data: Data, split: str) -> None:
    """Check that a data set has this split.

    Raises:
        ValueError: it does not.
    """
    if split not in data.splits:
        raise ValueError(f"split: {data.name} has {', '.join(data.splits)}, got {split!r}; choose one of them")


def images_held_out(validation: float, images: int) -> int:
    """Number of images to hold out of `images` training images, given a number or a fraction below 1.

    Raises:
        ValueError: neither of these, or a value that leaves no training images or no validation images.
    """
    count = round(validation * images) if 0 < validation < 1 else validation
    if not (0 <= count < images and count == int(count) and (count > 0 or validation == 0)):
        raise ValueError(
            f"validation: expected 0 to {images - 1} images, got {validation}; or a fraction of the {images} training "
            "images, between 0 and 1, that is at least one image"
        )
    return int(count)


def images_taken(train_images: float, images: int) -> int:
    """Number of images to use out of `images` training images, given a number or a fraction below 1.

    Raises:
        ValueError: neither of these, less than one image, or more than there are.
    """
    count = round(train_images * images) if 0 < train_images < 1 else train_images
    if not (1 <= count <= images and count == int(count)):
        raise ValueError(
            f"train_images: expected 1 to {images} images, got {train_images}; or a fraction of the {images} training "
            "images, between 0 and 1, that is at least one image"
        )
    return int(count)
