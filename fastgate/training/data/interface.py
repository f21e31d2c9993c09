"""What the trainer asks of a data set, and the arithmetic of batches that all data sets share."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# of images of folders in evaluation: shorter side / side of the centre crop, as for torchvision's weights
RESIZED = 256 / 224


class Loader(Protocol):
    """Batches `(x float32 [B, C, H, W], y int64 [B])` on the training device, x normalised."""

    @property
    def batch_size(self) -> int:
        """Images per batch, those of all shards together where a batch is shared."""

    @property
    def samples(self) -> int:
        """Images that a whole pass gives, in all shards together."""

    @property
    def shard(self) -> tuple[int, int]:
        """(number of a process, number of processes): which part of the images this loader gives."""

    def __len__(self) -> int:
        """Batches of a whole pass of this shard."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


class TrainingLoader(Loader, Protocol):
    """Shuffled and augmented full batches. A pass repeats its epoch unless `start_at` names another."""

    def start_at(self, epoch: int, step: int = 0) -> "TrainingLoader":
        """Let the next pass give epoch `epoch` from step `step` on; returns the loader itself."""


class Data(Protocol):
    """A data set: what a network and a trainer have to know of it, and its batches.

    "train" is learned from, also by the gates; "validation", where there is one, is evaluated during training; "test"
    is what results are reported on, and evaluated during training where there is no validation split. Nothing is
    selected by either.
    """

    @property
    def name(self) -> str:
        """As :func:`~fastgate.training.data.load_data` takes it."""

    @property
    def image_size(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    @property
    def num_classes(self) -> int:
        """Labels are 0 to num_classes - 1."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """By label; None if nobody named them."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, of images scaled to 0..1: what x is normalised with."""

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, as `mean`."""

    @property
    def splits(self) -> Mapping[str, int]:
        """Numbers of images of "train", "test" and, where images were held out, "validation"."""

    def training(
        self, batch_size: int, *, seed: int = 0, shard: tuple[int, int] = (0, 1), channels_last: bool = False
    ) -> TrainingLoader:
        """The training images, shuffled and augmented; the last short batch is dropped.

        Order and augmentation depend on `seed`, the epoch and the place in it alone. Each process of `shard` gets an
        equal part of every batch.

        Raises:
            ValueError: more images per batch than there are, or a batch that the processes cannot share equally.
        """

    def evaluation(
        self, split: str, batch_size: int, *, shard: tuple[int, int] = (0, 1), channels_last: bool = False
    ) -> Loader:
        """Every image of a split once, in order, without augmentation. The processes of `shard` take turns.

        Batches are smaller than `batch_size` where otherwise a process would have none.

        Raises:
            ValueError: there is no such split.
        """


@dataclass(frozen=True)
class Batching:
    """How images are dealt out.

    Args:
        images: how many there are.
        batch_size: images per batch.
        shard: (number of a process, number of processes).
        full: full batches alone, of which each process gets an equal part; else all images, in batches that the
            processes take in turns.

    Raises:
        ValueError: no images per batch, a shard that there is not, or full batches of more images than there are or
            that the processes cannot share equally.
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
                f"shard: expected (number of a process, number of processes), such as (0, 2), got {self.shard}"
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
        """Images of a whole pass, in all shards together."""
        return self.images // self.batch_size * self.batch_size if self.full else self.images

    def __len__(self) -> int:
        return len(self._starts(0))

    def parts(self, first_step: int = 0) -> Iterator[slice]:
        """This process' part of each batch, places in the order of a pass, from step `first_step` on."""
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
    """`batch_size`, or what leaves every process a batch."""
    return min(batch_size, max(images // shard[1], 1))


def check_split(data: Data, split: str) -> None:
    """Refuse the name of a split that a data set does not have.

    Raises:
        ValueError: that.
    """
    if split not in data.splits:
        raise ValueError(f"split: {data.name} has {', '.join(data.splits)}, got {split!r}; choose one of them")


def images_held_out(validation: float, images: int) -> int:
    """How many of `images` training images a validation split of a number or a share below 1 of them has.

    Raises:
        ValueError: it is neither, or it leaves no training images or no validation images.
    """
    count = round(validation * images) if 0 < validation < 1 else validation
    if not (0 <= count < images and count == int(count) and (count > 0 or validation == 0)):
        raise ValueError(
            f"validation: expected 0 to {images - 1} images, got {validation}; or a share of the {images} training "
            "images, between 0 and 1, that is one image at least"
        )
    return int(count)


def images_taken(train_images: float, images: int) -> int:
    """How many of `images` training images a number or a share below 1 of them is.

    Raises:
        ValueError: it is neither, or none, or more than there are.
    """
    count = round(train_images * images) if 0 < train_images < 1 else train_images
    if not (1 <= count <= images and count == int(count)):
        raise ValueError(
            f"train_images: expected 1 to {images} images, got {train_images}; or a share of the {images} training "
            "images, between 0 and 1, that is one image at least"
        )
    return int(count)
