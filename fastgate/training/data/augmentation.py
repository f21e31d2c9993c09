"""Augmentation and normalisation of whole batches on the device: crops, flips, colour jitter."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# weights of red, green and blue in the luma (ITU-R BT.601, as in Pillow and torchvision)
_GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of a folder's training images.

    Args:
        scale: smallest and largest fraction of an image's area in a random crop.
        ratio: smallest and largest aspect ratio (width / height) of a crop.
        flip: whether half of the images are mirrored; not if mirroring changes the class.
        colour: brightness, contrast and saturation are each multiplied by a factor from 1 - colour to 1 + colour.

    Raises:
        ValueError: an empty range, or a value out of bounds.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    colour: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale: expected 0 < smallest <= largest <= 1, fractions of the area, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio: expected 0 < smallest <= largest, widths / heights, got {self.ratio}")
        if not 0 <= self.colour < 1:
            raise ValueError(f"colour: expected 0 (none) to below 1, got {self.colour}")


class Normalisation:
    """Normalises images with values 0..255 to (x - mean) / std, in fp32 and the given memory format.

    Args:
        mean, std: per channel, of images scaled to 0..1.
        device: of the images.
        channels_last: memory format of the output.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], device: torch.device, channels_last: bool = False
    ) -> None:
        self._mean = torch.tensor(mean, device=device)[:, None, None] * 255
        self._scale = 1 / (torch.tensor(std, device=device)[:, None, None] * 255)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise images, uint8 or float `[N, C, H, W]`."""
        x = (images.float() - self._mean) * self._scale
        return x.contiguous(memory_format=self._memory_format)


def check_channels(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """The checked mean or standard deviation per channel, as floats.

    Raises:
        ValueError: not one value per channel, or a standard deviation that is not above 0.
    """
    numbers = tuple(map(float, values))
    lowest = 0.0 if name == "std" else -math.inf
    if len(numbers) != channels or not all(lowest < number < math.inf for number in numbers):
        raise ValueError(
            f"{name}: expected {channels} numbers{' above 0' if name == 'std' else ''}, one per channel, got {values}"
        )
    return numbers


def crop_and_flip(images: Tensor, pad: int, offsets: Tensor, flips: Tensor) -> Tensor:
    """Zero-pad images `[N, C, H, W]`, crop them at offsets `[2, N]` (row, column), and mirror them where `flips`.

    One gather for the whole batch.
    """
    n, _, h, w = images.shape
    rows = offsets[0][:, None] + torch.arange(h, device=images.device)
    columns = torch.arange(w, device=images.device).expand(n, w)
    columns = offsets[1][:, None] + torch.where(flips[:, None], columns.flip(1), columns)
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    samples = torch.arange(n, device=images.device)[:, None, None]
    return padded[samples, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip_and_colour(images: Tensor, flips: Tensor, factors: Tensor) -> Tensor:
    """Mirror images uint8 `[N, 3, H, W]` where `flips`, and multiply brightness, contrast and saturation by `factors`.

    The result for an image is bit-identical in any batch.

    Args:
        images: RGB.
        flips: bool `[N]`.
        factors: fp32 `[N, 3]`: of brightness, of the difference from the mean grey, of the difference from each pixel's
            grey.

    Returns:
        fp32, values 0..255.
    """
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    # integer sums are exact in any order, however the device splits them
    sums = images.sum((2, 3), dtype=torch.int64, keepdim=True).float()
    mean = _grey(sums) / (images.shape[2] * images.shape[3]) * brightness
    x = torch.where(flips[:, None, None, None], images.flip(3), images).float()
    x.mul_(brightness * contrast).add_((1 - contrast) * mean)
    grey = _grey(x)
    return x.mul_(saturation).add_((1 - saturation) * grey).clamp_(0, 255)


def _grey(x: Tensor) -> Tensor:
    red, green, blue = x.split(1, dim=1)
    return _GREY[0] * red + _GREY[1] * green + _GREY[2] * blue
