"""The splits and classes of a folder of images."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from fastgate.training.data.interface import images_held_out, images_taken

_TRAIN, _TEST, _VALIDATION = "train", "test", ("val", "valid", "validation")
# never names of classes, in upper or lower case: else a folder of other splits would be taken for two classes
_SPLITS = {_TRAIN, _TEST, *_VALIDATION, "training", "testing"}


@dataclass(frozen=True)
class Split:
    """Image files, and their labels int64 `[N]` on the CPU."""

    paths: list[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Tensor) -> "Split":
        """The images at these indices."""
        return Split([self.paths[i] for i in indices.tolist()], self.labels[indices])


def find_splits(
    folder: Path, validation: float = 0, train_images: float | None = None
) -> tuple[tuple[str, ...], dict[str, Split]]:
    """Class names by label, and the splits by name, of a folder laid out as torchvision's `ImageFolder`.

    See :class:`~fastgate.training.data.folder.Folder` for the layouts.

    Raises:
        ValueError: no classes, a class without images, splits with different classes, images held out although there
            are validation images, or too many, or more to train on than there are.
        FileNotFoundError: the folder does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder of images, found none; check the path")
    if _class_folders(folder / _TRAIN):
        paths = {_TRAIN: folder / _TRAIN, **_evaluated_folders(folder)}
    else:
        paths = {_TRAIN: folder}
        found = _class_folders(folder)
        if {name.lower() for name in found} <= _SPLITS:
            raise ValueError(
                f"{folder}: expected train/ with a folder of images per class, or only such folders, found "
                f"{', '.join(found) or 'neither'}; put each image under {folder / _TRAIN}/CLASS"
            )
    names = {split: _class_folders(path) for split, path in paths.items()}
    for split, path in paths.items():
        _check_same_classes(paths[_TRAIN], names[_TRAIN], path, names[split])
    splits = {split: _read(path, names[split]) for split, path in paths.items()}
    count = images_held_out(validation, len(splits[_TRAIN]))
    if _TEST not in splits and not count:
        raise ValueError(
            f"{folder}: expected test images, in test/ or val/ next to train/, found none; add them, or hold out a "
            "fraction of the training images with validation=0.1 (--validation 0.1)"
        )
    if "validation" in splits and count:
        raise ValueError(
            f"validation: expected 0, as {paths['validation']} has the validation images, got {validation}; leave it "
            "out, or remove that folder"
        )
    if count:
        kept, held_out = _hold_out(splits[_TRAIN].labels, count, names[_TRAIN])
        name = "validation" if _TEST in splits else _TEST
        splits = {**splits, _TRAIN: splits[_TRAIN].take(kept), name: splits[_TRAIN].take(held_out)}
    if train_images is not None:
        labels = splits[_TRAIN].labels
        rest = len(labels) - images_taken(train_images, len(labels))
        splits[_TRAIN] = splits[_TRAIN].take(_hold_out(labels, rest, names[_TRAIN], "train_images")[0])
    return tuple(names[_TRAIN]), splits


def _evaluated_folders(folder: Path) -> dict[str, Path]:
    """The evaluation folders next to train/; if there is only one, it is the test split, whatever its name."""
    test = [folder / _TEST] if (folder / _TEST).is_dir() else []
    validation = [folder / name for name in _VALIDATION if (folder / name).is_dir()]
    if len(validation) > 1:
        found = " and ".join(path.name for path in validation)
        raise ValueError(f"{folder}: expected one folder of validation images, found {found}; keep one")
    return dict(zip((_TEST, "validation"), test + validation, strict=False))


def _class_folders(folder: Path) -> list[str]:
    """Sorted names of the subfolders, except hidden ones such as .ipynb_checkpoints."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _check_same_classes(train: Path, expected: list[str], path: Path, got: list[str]) -> None:
    only = [
        f"only in {where}: {', '.join(sorted(names))}"
        for where, names in ((train, set(expected) - set(got)), (path, set(got) - set(expected)))
        if names
    ]
    if only:
        raise ValueError(
            f"{path}: expected the classes of {train}, got other ones ({'; '.join(only)}); give every split a folder "
            "for each class"
        )


def _read(folder: Path, classes: list[str]) -> Split:
    index = {name: label for label, name in enumerate(classes)}
    found = make_dataset(str(folder), index, IMG_EXTENSIONS, allow_empty=True)
    labels = torch.tensor([label for _, label in found], dtype=torch.int64)
    for label, images in enumerate(torch.bincount(labels, minlength=len(classes)).tolist()):
        if not images:
            raise ValueError(
                f"{folder / classes[label]}: expected images ({', '.join(IMG_EXTENSIONS)}), found none; add some, or "
                "remove the folder from every split"
            )
    return Split([path for path, _ in found], labels)


def _hold_out(labels: Tensor, count: int, classes: list[str], option: str = "validation") -> tuple[Tensor, Tensor]:
    """Indices of the images to keep and of `count` to hold out, always the same ones, stratified by class."""
    generator = torch.Generator().manual_seed(0)
    images = torch.bincount(labels, minlength=len(classes))
    shares = images * count // len(labels)
    # the remainder goes to the classes that lost most by rounding down
    losers = (images * count % len(labels)).sort(descending=True, stable=True).indices
    shares[losers[: count - int(shares.sum())]] += 1
    if (shares == images).any():
        name = classes[int((shares == images).nonzero()[0])]
        raise ValueError(
            f"{option}: expected to leave training images of every class, but {count} images held out include all of "
            f"{name}; hold out fewer, or add images"
        )
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label, share in enumerate(shares.tolist()):
        own = (labels == label).nonzero()[:, 0]
        held_out[own[torch.randperm(len(own), generator=generator)[:share]]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
