import math
import random

import pytest
import torch
from torchvision.transforms.v2 import functional as transforms

from fastgate.training.data.augmentation import Augmentation, flip_and_colour
from fastgate.training.data.reading import random_crop


def test_flip_and_colour_equals_torchvision_one_image_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    # pixels that no factor takes out of 0..255, where torchvision clamps after each step
    images = torch.randint(90, 150, (12, 3, 5, 7), dtype=torch.uint8, generator=generator)
    flips = torch.rand(12, generator=generator) < 0.5
    factors = 1 + 0.3 * (2 * torch.rand(12, 3, generator=generator) - 1)
    got = flip_and_colour(images, flips, factors)
    for i, image in enumerate(images):
        brightness, contrast, saturation = factors[i].tolist()
        x = transforms.horizontal_flip(image) if flips[i] else image
        x = transforms.adjust_brightness(x.double() / 255, brightness)
        x = transforms.adjust_saturation(transforms.adjust_contrast(x, contrast), saturation)
        # torchvision weighs red with 0.2989 in place of 0.299: up to 0.02 of 150, by factors' distance from 1
        torch.testing.assert_close(got[i].double(), 255 * x, atol=0.02, rtol=0)


def test_an_image_has_the_same_bits_in_any_batch() -> None:
    images = torch.randint(0, 256, (32, 3, 33, 31), dtype=torch.uint8)
    flips, factors = torch.rand(32) < 0.5, 0.5 + torch.rand(32, 3)
    whole = flip_and_colour(images, flips, factors)
    parts = [flip_and_colour(images[i : i + 1], flips[i : i + 1], factors[i : i + 1]) for i in range(32)]
    assert torch.equal(torch.cat(parts), whole)
    assert (whole.min(), whole.max()) == (0, 255)


def test_factors_of_one_leave_images_as_they_are() -> None:
    images = torch.randint(0, 256, (4, 3, 6, 6), dtype=torch.uint8)
    got = flip_and_colour(images, torch.zeros(4, dtype=torch.bool), torch.ones(4, 3))
    assert torch.equal(got, images.float())


def test_random_crops_are_drawn_as_torchvision_does() -> None:
    augmentation, draws = Augmentation(scale=(0.2, 0.8), ratio=(0.5, 2)), random.Random(0)
    width, height, count = 600, 400, 4000
    crops = [random_crop(width, height, augmentation, draws) for _ in range(count)]
    assert all(t >= 0 and le >= 0 and t + h <= height and le + w <= width for t, le, h, w in crops)
    areas = torch.tensor([h * w / (width * height) for _, _, h, w in crops])
    ratios = torch.tensor([w / h for _, _, h, w in crops])
    # rounding a side to whole pixels moves an area by less than 1 %
    assert areas.min() > 0.2 * 0.99 and areas.max() < 0.8 * 1.01
    assert ratios.min() > 0.5 * 0.99 and ratios.max() < 2 * 1.01
    torch.manual_seed(0)
    from torchvision.transforms.v2 import RandomResizedCrop

    theirs = RandomResizedCrop(8, scale=(0.2, 0.8), ratio=(0.5, 2))
    image = torch.empty(3, height, width)
    boxes = [theirs.make_params([image]) for _ in range(count)]
    for ours, other in (
        (areas, torch.tensor([box["height"] * box["width"] / (width * height) for box in boxes])),
        (ratios.log(), torch.tensor([math.log(box["width"] / box["height"]) for box in boxes])),
        (torch.tensor([float(crop[0]) for crop in crops]), torch.tensor([float(box["top"]) for box in boxes])),
        (torch.tensor([float(crop[1]) for crop in crops]), torch.tensor([float(box["left"]) for box in boxes])),
    ):
        # both are means of 4000 draws: five standard errors of their difference
        assert abs(ours.mean() - other.mean()) < 5 * (ours.var() / count + other.var() / count).sqrt()
        assert 0.9 < ours.std() / other.std() < 1.1


@pytest.mark.parametrize(
    ("width", "height", "crop"),
    [
        (900, 10, (0, 443, 10, 13)),  # far too wide: ratio 4/3 in the middle
        (10, 900, (443, 0, 13, 10)),
        (1, 1, (0, 0, 1, 1)),
    ],
)
def test_an_image_that_no_crop_fits_gives_its_middle(width: int, height: int, crop: tuple[int, int, int, int]) -> None:
    assert random_crop(width, height, Augmentation(scale=(1, 1)), random.Random(0)) == crop


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0, 1)}, r"scale: expected 0 < smallest <= largest <= 1.*got \(0, 1\)"),
        ({"scale": (0.5, 1.1)}, "scale: expected"),
        ({"ratio": (2, 1)}, "ratio: expected 0 < smallest <= largest"),
        ({"colour": 1}, r"colour: expected 0 \(none\) to below 1, got 1"),
    ],
)
def test_ranges_that_are_refused(options: dict[str, tuple[float, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)  # type: ignore[arg-type]
