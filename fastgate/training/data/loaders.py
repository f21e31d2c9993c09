"""The user's own loaders as a data set."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastgate.training.data.interface import check_split


class DeviceBatches:
    """A loader of `(x, y)` that moves its batches to a device; each process has a loader for its own part."""

    shard = (0, 1)

    def __init__(self, loader: Any, device: torch.device, batch_size: int, channels_last: bool) -> None:
        self.loader = loader
        self.batch_size = batch_size
        self._device = device
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    @property
    def samples(self) -> int:
        """Images in a whole pass, counting the last batch as full."""
        return len(self.loader) * self.batch_size

    @property
    def sampler(self) -> Any:
        """The loader's sampler, to set its epoch."""
        return getattr(self.loader, "sampler", None)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.loader:
            yield x.to(self._device, memory_format=self._format), y.to(self._device)


class Loaders:
    """A data set of two loaders, which determine the batch size; see :class:`~fastgate.training.data.Data`.

    Args:
        train: loader with a length, of batches `(x float [N, C, H, W], y int64 [N])`.
        test: the same for the test images.
        num_classes: labels are 0 to num_classes - 1.
        device: device of the batches.

    Raises:
        ValueError, TypeError: loaders without a length, or other batches.
    """

    name = "own loaders"
    class_names: tuple[str, ...] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __init__(self, train: Any, test: Any, num_classes: int, device: torch.device | str = "cpu") -> None:
        self._loaders = {"train": train, "test": test}
        self.num_classes = num_classes
        self._device = torch.device(device)
        self._sizes: dict[str, int] = {}
        for split, loader in self._loaders.items():
            if not hasattr(loader, "__len__") or not hasattr(loader, "__iter__"):
                raise TypeError(
                    f"{split}: expected a loader with a length, such as torch's DataLoader, got {type(loader).__name__}"
                )
            with torch.random.fork_rng(devices=[]):
                batch = next(iter(loader), None)
            if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Tensor)):
                raise ValueError(f"{split}: expected batches (images, labels), got {type(batch).__name__}")
            self._sizes[split] = len(batch[0])
            if split == "train":
                if batch[0].dim() != 4:
                    raise ValueError(f"{split}: expected images [N, C, H, W], got {list(batch[0].shape)}")
                c, h, w = batch[0].shape[1:]
                self.image_size = (c, h, w)

    @property
    def batch_size(self) -> int:
        """Of the training loader."""
        return self._sizes["train"]

    @property
    def splits(self) -> Mapping[str, int]:
        """Numbers of images, counting the last batch as full."""
        return {name: len(loader) * self._sizes[name] for name, loader in self._loaders.items()}

    def training(
        self, batch_size: int, *, seed: int = 0, shard: tuple[int, int] = (0, 1), channels_last: bool = False
    ) -> Any:
        """The training loader as it is."""
        return DeviceBatches(self._loaders["train"], self._device, self.batch_size, channels_last)

    def evaluation(
        self, split: str, batch_size: int, *, shard: tuple[int, int] = (0, 1), channels_last: bool = False
    ) -> Any:
        """The loader of a split as it is."""
        check_split(self, split)
        return DeviceBatches(self._loaders[split], self._device, self._sizes[split], channels_last)
