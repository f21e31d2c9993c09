from pathlib import Path

import pytest
import torch

from fastgate.training.data import Augmentation, Batches, Data, Loader, load_data, load_dataset
from fastgate.training.data.folder import Folder
from fastgate.training.data.interface import images_held_out
from tests.training.data.pictures import write_splits


def assert_same(got: Loader, expected: Loader) -> None:
    assert len(got) == len(expected) > 0
    for (x, y), (expected_x, expected_y) in zip(got, expected, strict=True):
        assert torch.equal(x, expected_x) and torch.equal(y, expected_y)
        assert x.stride() == expected_x.stride()


def test_a_resident_set_gives_its_batches_through_the_interface() -> None:
    data: Data = load_data("digits", validation=137)
    known = load_dataset("digits", validation=137)
    assert (data.name, data.image_size, data.num_classes) == ("digits", (1, 8, 8), 10)
    assert data.class_names == tuple("0123456789")
    assert data.splits == {"train": 1300, "test": 360, "validation": 137}
    training = data.training(128, seed=5, shard=(1, 2), channels_last=True).start_at(3, 2)
    batches = Batches(known, known.train, 128, augment=True, seed=5, shard=(1, 2), channels_last=True)
    assert_same(training, batches.start_at(3, 2))
    assert (training.batch_size, training.samples) == (128, 1280)
    assert known.validation is not None
    for split, images in (("train", known.train), ("test", known.test), ("validation", known.validation)):
        evaluation = data.evaluation(split, 100)
        assert_same(evaluation, Batches(known, images, 100))
        assert (evaluation.batch_size, evaluation.samples) == (100, len(images))
    with pytest.raises(ValueError, match="split: digits has train, test, validation, got 'val'; choose one of them"):
        data.evaluation("val", 100)


def test_every_process_has_a_batch_to_evaluate() -> None:
    shards = [load_data("digits").evaluation("test", 500, shard=(i, 2)) for i in range(2)]
    assert [[len(y) for _, y in shard] for shard in shards] == [[180], [180]]
    assert [(len(shard), shard.batch_size, shard.samples) for shard in shards] == [(1, 180, 360)] * 2


def test_mean_and_std_may_be_those_of_the_weights() -> None:
    known = load_data("digits")
    data = load_data("digits", mean=[0.25], std=[0.5])
    x, _ = next(iter(data.evaluation("test", 4)))
    own, _ = next(iter(known.evaluation("test", 4)))
    pixels = own.double() * known.std[0] + known.mean[0]
    # both normalise in fp32, numbers up to 3
    torch.testing.assert_close(x.double(), (pixels - 0.25) / 0.5, atol=2e-6, rtol=0)
    with pytest.raises(ValueError, match=r"mean: expected 1 numbers, one per channel, got \[0.5, 0.5\]"):
        load_data("digits", mean=[0.5, 0.5])


def test_a_folder_may_lie_in_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_splits(tmp_path / "pets", train={"cat": 4, "dog": 4}, test={"cat": 1, "dog": 1})
    for data in (load_data("folder:pets", tmp_path), load_data(f"folder:{tmp_path / 'pets'}", "/elsewhere")):
        assert isinstance(data, Folder)
        assert (data.splits, data.image_size) == ({"train": 8, "test": 2}, (3, 224, 224))
    monkeypatch.chdir(tmp_path)
    options = Augmentation(flip=False)
    data = load_data("folder:pets", validation=2, image_size=12, workers=0, mean=[0, 0, 0], augmentation=options)
    assert isinstance(data, Folder)
    assert (data.name, data.splits) == ("folder:pets", {"train": 6, "test": 2, "validation": 2})
    assert (data.image_size, data.mean, data.workers, data.augmentation) == ((3, 12, 12), (0.0, 0.0, 0.0), 0, options)
    x, _ = next(iter(data.training(6)))
    assert x.shape == (6, 3, 12, 12)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("cifar-10", "'cifar-10'; did you mean 'cifar10'?"),
        ("Digits", "'Digits'; did you mean 'digits'?"),
        ("pets", "'pets'; did you mean 'folder:pets'?"),
        ("imagenet", "'imagenet'"),
        ("folder:", "'folder:'"),
    ],
)
def test_unknown_names(name: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pets").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="dataset: expected one of") as caught:
        load_data(name)
    assert str(caught.value) == f"dataset: expected one of digits, cifar10, cifar100 or folder:PATH, got {meant}"


@pytest.mark.parametrize("options", [{"workers": 2}, {"augmentation": Augmentation()}])
def test_options_of_folders_are_refused_elsewhere(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(options))}: expected none for digits.*or use folder:PATH"):
        load_data("digits", **options)  # type: ignore[arg-type]


def test_folders_are_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="download: expected cifar10 or cifar100, got 'folder:pets'"):
        load_data("folder:pets", tmp_path, download=True)


@pytest.mark.parametrize(("validation", "count"), [(0, 0), (1, 1), (199, 199), (0.1, 20), (0.995, 199), (3.0, 3)])
def test_a_number_or_a_share_is_held_out(validation: float, count: int) -> None:
    assert images_held_out(validation, 200) == count


def test_a_share_of_a_resident_set() -> None:
    assert load_data("digits", validation=0.1).splits == {"train": 1293, "test": 360, "validation": 144}
    with pytest.raises(ValueError, match=r"validation: expected 0 to 1436 images, got 0.0001; or a fraction"):
        load_data("digits", validation=0.0001)


def test_a_part_of_the_training_images() -> None:
    """Always the same ones, whatever is held out stays held out, and the test images stay as they are."""
    whole, part = load_dataset("digits", validation=137), load_dataset("digits", validation=137, train_images=100)
    assert part.splits == {"train": 100, "test": 360, "validation": 137}
    assert whole.validation is not None and part.validation is not None
    assert torch.equal(whole.validation.images, part.validation.images)
    known = {image.numpy().tobytes() for image in whole.train.images}
    assert all(image.numpy().tobytes() in known for image in part.train.images)
    assert torch.equal(
        load_dataset("digits", train_images=0.1).train.labels, load_dataset("digits", train_images=144).train.labels
    )
    for wrong in (0, 1438, 0.0001, 2.5):
        with pytest.raises(ValueError, match=f"train_images: expected 1 to 1437 images, got {wrong}; or a fraction"):
            load_data("digits", train_images=wrong)


def test_a_part_of_a_folder_keeps_the_shares_of_the_classes(tmp_path: Path) -> None:
    write_splits(tmp_path, train={"cat": 12, "dog": 4}, test={"cat": 1, "dog": 1})
    data = load_data(f"folder:{tmp_path}", train_images=8, image_size=8, workers=0)
    (_, labels), *_ = data.training(8)
    assert data.splits == {"train": 8, "test": 2} and labels.bincount().tolist() == [6, 2]
    with pytest.raises(ValueError, match="train_images: expected to leave training images of every class"):
        load_data(f"folder:{tmp_path}", train_images=1)


def test_images_in_memory_are_averaged_down() -> None:
    known, data = load_dataset("digits"), load_data("digits", image_size=4)
    assert data.image_size == (1, 4, 4)
    x, _ = next(iter(data.evaluation("test", 10)))
    blocks = known.test.images[:10].double().unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-1, -2)).round()
    torch.testing.assert_close(x.double(), (blocks / 255 - known.mean[0]) / known.std[0], atol=2e-6, rtol=0)
    with pytest.raises(ValueError, match=r"image_size: expected a divisor of the images' 8x8 pixels.* got 3"):
        load_data("digits", image_size=3)
