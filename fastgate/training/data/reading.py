"""Reading image files in worker processes, with each image cropped and resized to the size of the batches."""

import math
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from fastgate.training.data.augmentation import Augmentation
from fastgate.training.data.interface import RESIZED

# modes that Pillow converts to 8 bits per channel without losing more than transparency
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


@dataclass(frozen=True)
class Reader(Dataset[Tensor | str]):
    """Reads images of one size from files. It holds no list of files: workers get them with each request.

    Args:
        size: side of the images in pixels.
        augmentation: determines the random crops.
    """

    size: int
    augmentation: Augmentation

    def __getitem__(self, wanted: list[tuple[str, int | None]]) -> Tensor | str:
        """Images uint8 `[N, 3, size, size]`, or an error message about one of them.

        Args:
            wanted: pairs of a file and the seed of its random crop; None takes the centre crop.
        """
        # a message, since an exception would leave a worker with the worker's traceback as its message
        images = []
        for path, seed in wanted:
            try:
                images.append(self._read(path, seed))
            except Exception as error:  # decoders raise all kinds, SyntaxError and struct.error among them
                return f"{path}: expected an image, got {type(error).__name__}: {error}; replace or remove the file"
        return torch.stack(images)

    def _read(self, path: str, seed: int | None) -> Tensor:
        image = open_rgb(path)
        size = [self.size, self.size]
        if seed is not None:
            box = random_crop(image.width, image.height, self.augmentation, random.Random(seed))
            return transforms.pil_to_tensor(transforms.resized_crop(image, *box, size))
        image = transforms.resize(image, [round(self.size * RESIZED)])
        return transforms.pil_to_tensor(transforms.center_crop(image, size))


def open_rgb(path: str) -> Image.Image:
    """The image in a file, upright, in RGB; transparent pixels show their own colour.

    Raises:
        ValueError: more than 8 bits per channel.
        Exception: any error of Pillow for a file that it cannot read.
    """
    with Image.open(path) as image:
        if image.mode not in _MODES:
            raise ValueError(f"more than 8 bits per channel (mode {image.mode}), with no unambiguous reduction to 8")
        upright = ImageOps.exif_transpose(image)  # as cameras record it and viewers show it
        if upright.mode == "P" and "transparency" in upright.info:
            upright = upright.convert("RGBA")  # Pillow warns about direct conversion and advises this
        return upright.convert("RGB")


def random_crop(width: int, height: int, augmentation: Augmentation, draws: random.Random) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop of random area and ratio, drawn as in torchvision's RandomResizedCrop.

    If no crop fits the image in ten trials, it is the largest centred one with an allowed ratio.
    """
    (smallest, largest), (narrow, wide) = augmentation.scale, augmentation.ratio
    for _ in range(10):
        area = width * height * draws.uniform(smallest, largest)
        ratio = math.exp(draws.uniform(math.log(narrow), math.log(wide)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        top, left = draws.random(), draws.random()
        if 0 < w <= width and 0 < h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    ratio = min(max(width / height, narrow), wide)
    w, h = min(width, max(round(height * ratio), 1)), min(height, max(round(width / ratio), 1))
    return (height - h) // 2, (width - w) // 2, h, w


def default_workers() -> int:
    """One worker per CPU, divided among the training processes of the machine; up to 8."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min(processors // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 8), 1)


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Block Ctrl-C while workers start, which inherit this: it would end one that has not reached `start_worker`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(number: int) -> None:
    """Leave Ctrl-C to the training process, which finishes its step, saves, and ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
