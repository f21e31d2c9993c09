from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastgate.training.data.layout import Split, find_splits
from tests.training.data.pictures import write_classes, write_splits

PETS = {"cat": 3, "dog": 2}


def names(split: Split) -> list[str]:
    """class/file of each image."""
    return ["/".join(Path(path).parts[-2:]) for path in split.paths]


def test_three_folders_are_three_splits(tmp_path: Path) -> None:
    write_splits(tmp_path, train=PETS, val={"cat": 1, "dog": 1}, test={"cat": 2, "dog": 1})
    classes, splits = find_splits(tmp_path)
    assert classes == ("cat", "dog")
    assert {name: len(split) for name, split in splits.items()} == {"train": 5, "test": 3, "validation": 2}
    assert names(splits["train"]) == ["cat/000.jpg", "cat/001.jpg", "cat/002.jpg", "dog/000.jpg", "dog/001.jpg"]
    assert splits["train"].labels.tolist() == [0, 0, 0, 1, 1]
    assert all("/test/" in path for path in splits["test"].paths)
    with pytest.raises(ValueError, match=r"validation: expected 0, as .*val has the validation images, got 2"):
        find_splits(tmp_path, 2)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_the_only_folder_beside_train_is_the_test_split(tmp_path: Path, name: str) -> None:
    write_splits(tmp_path, train=PETS, **{name: {"cat": 1, "dog": 1}})
    _, splits = find_splits(tmp_path)
    assert {split: len(images) for split, images in splits.items()} == {"train": 5, "test": 2}
    _, splits = find_splits(tmp_path, 0.4)
    assert {split: len(images) for split, images in splits.items()} == {"train": 3, "test": 2, "validation": 2}
    assert all("/train/" in path for path in splits["validation"].paths)


@pytest.mark.parametrize("inside", ["", "train"])
def test_of_one_folder_a_share_is_tested_on(tmp_path: Path, inside: str) -> None:
    write_classes(tmp_path / inside, {"cat": 20, "dog": 11, "eel": 9})
    _, splits = find_splits(tmp_path, 0.25)
    assert torch.bincount(splits["train"].labels).tolist() == [15, 8, 7]
    # a quarter of 20, 11 and 9 is 5, 2.75 and 2.25: ten images
    assert torch.bincount(splits["test"].labels).tolist() == [5, 3, 2]
    assert not set(splits["train"].paths) & set(splits["test"].paths)
    # drawn, not the first ones; always the same, whatever the global generator does
    assert names(splits["test"])[:5] != [f"cat/{i:03}.jpg" for i in range(5)]
    torch.manual_seed(99)
    assert find_splits(tmp_path, 10)[1]["test"].paths == splits["test"].paths
    with pytest.raises(ValueError, match=r"found none; add them, or hold out a fraction .*--validation 0.1"):
        find_splits(tmp_path)


def test_files_that_are_no_images_and_hidden_folders_are_passed_over(tmp_path: Path) -> None:
    write_classes(tmp_path, PETS | {".ipynb_checkpoints": 1})
    (tmp_path / "cat" / "notes.txt").write_text("two of these are tired")
    (tmp_path / "README").write_text("pets")
    (tmp_path / "dog" / "old").mkdir()
    (tmp_path / "dog" / "000.jpg").rename(tmp_path / "dog" / "old" / "000.JPG")
    classes, splits = find_splits(tmp_path, 1)
    assert classes == ("cat", "dog")
    assert sorted(Path(path).name for split in splits.values() for path in split.paths) == [
        "000.JPG",
        "000.jpg",
        "001.jpg",
        "001.jpg",
        "002.jpg",
    ]


def other_classes(folder: Path) -> None:
    write_splits(folder, train=PETS | {"eel": 1}, val={"cat": 1, "dog": 1, "fox": 1})


def empty_class(folder: Path) -> None:
    write_splits(folder, train=PETS, val={"cat": 1, "dog": 0})


def two_validations(folder: Path) -> None:
    write_splits(folder, train=PETS, val=PETS, valid=PETS)


def no_class_folders(folder: Path) -> None:
    write_classes(folder, {"train": 3, "val": 2})


def other_names(folder: Path) -> None:
    write_splits(folder, Training=PETS, Testing=PETS)


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            other_classes,
            r"val: expected the classes of .*train, got other ones \(only in .*train: eel; only in .*val: fox\)",
            id="other-classes",
        ),
        pytest.param(empty_class, r"val/dog: expected images \(.jpg, .*found none; add some", id="empty-class"),
        pytest.param(two_validations, r"expected one folder of validation images, found val and valid", id="two"),
        pytest.param(no_class_folders, r"expected train/ with a folder of images per class.*train/CLASS", id="flat"),
        pytest.param(other_names, r"found Testing, Training; put each image under .*train/CLASS", id="other-names"),
        pytest.param(nothing, r"expected train/ with a folder of images per class", id="nothing"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        find_splits(tmp_path, 0.2)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="lost: expected a folder of images, found none; check the path"):
        find_splits(tmp_path / "lost")


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        (5, r"validation: expected 0 to 4 images, got 5; or a fraction"),
        (0.05, r"validation: expected 0 to 4 images, got 0.05; or a fraction of the 5 .*at least one image"),
        (1.5, r"validation: expected 0 to 4 images, got 1.5"),
        (-1, r"validation: expected 0 to 4 images, got -1"),
        (float("nan"), r"validation: expected 0 to 4 images, got nan"),
        (4, r"expected to leave training images of every class, but 4 images held out include all of dog"),
    ],
)
def test_shares_that_are_refused(tmp_path: Path, validation: float, message: str) -> None:
    write_classes(tmp_path, PETS)
    with pytest.raises(ValueError, match=message):
        find_splits(tmp_path, validation)
