"""Small image files in folders of classes."""

from pathlib import Path

import numpy as np
from PIL import Image


def draw(seed: int, width: int = 24, height: int = 20) -> np.ndarray:
    """uint8 [height, width, 3]: blocks of random colours, which JPEG keeps apart."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    return blocks.repeat(4, 0).repeat(4, 1)[:height, :width]


def write_classes(folder: Path, counts: dict[str, int], *, first: int = 0) -> Path:
    """`counts[name]` JPEGs of odd sizes in folder/name, all different; returns the folder."""
    seed = first
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(draw(seed, 20 + seed % 7, 16 + seed % 5)).save(folder / name / f"{i:03}.jpg", quality=95)
            seed += 1
    return folder


def write_splits(folder: Path, **splits: dict[str, int]) -> Path:
    """A folder of class folders for each split; returns the folder above them."""
    for number, (split, counts) in enumerate(splits.items()):
        write_classes(folder / split, counts, first=1000 * number)
    return folder
