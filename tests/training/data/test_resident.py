from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision import datasets

from fastgate.training.data import Batches, Dataset, ImageSet, crop_and_flip, load_dataset

CIFAR10 = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def write_cifar10(folder: Path) -> np.ndarray:
    """The official binary layout with random pixels; returns the records of all files, [60000, 3073]."""
    folder.mkdir(parents=True)
    records = np.random.default_rng(0).integers(0, 256, (60_000, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    for i, name in enumerate(CIFAR10):
        records[i * 10_000 : (i + 1) * 10_000].tofile(folder / name)
    return records


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    root = tmp_path_factory.mktemp("data")
    return root, write_cifar10(root / "cifar-10-batches-bin")


def test_digits_are_the_real_ones() -> None:
    from sklearn.datasets import load_digits

    data = load_dataset("digits")
    assert (len(data.train), len(data.test), data.image_size, data.num_classes) == (1437, 360, (1, 8, 8), 10)
    pixels, labels = load_digits(return_X_y=True)
    ours = torch.cat([data.train.images, data.test.images]).flatten(1).double() * 16 / 255
    # every image is there once: the same multiset of rows (16 levels survive the scaling to 255 and back)
    assert sorted(map(tuple, ours.round().tolist())) == sorted(map(tuple, pixels.tolist()))
    assert torch.bincount(torch.cat([data.train.labels, data.test.labels])).tolist() == np.bincount(labels).tolist()
    assert min(torch.bincount(data.test.labels)) >= 34  # stratified: a tenth of 360 each, up to rounding


def test_cifar10_binary_layout(cifar10: tuple[Path, np.ndarray]) -> None:
    root, records = cifar10
    data = load_dataset("cifar10", root)
    assert (len(data.train), len(data.test), data.image_size) == (50_000, 10_000, (3, 32, 32))
    # a record is the label, then the red, green and blue planes row by row
    assert data.train.labels[12_345] == records[12_345, 0]
    assert data.train.images[12_345, 1, 7, 9] == records[12_345, 1 + 1024 + 7 * 32 + 9]
    assert torch.equal(data.test.images, torch.from_numpy(records[50_000:, 1:].reshape(-1, 3, 32, 32)))


def test_root_may_be_the_folder_itself_or_the_environment(
    cifar10: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = cifar10
    monkeypatch.setenv("FASTGATE_DATA", str(root))
    assert torch.equal(
        load_dataset("cifar10").test.labels, load_dataset("cifar10", root / "cifar-10-batches-bin").test.labels
    )


def test_cifar100_takes_the_fine_label(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    for name, count in (("train.bin", 50_000), ("test.bin", 10_000)):
        records = np.zeros((count, 3074), np.uint8)
        records[:, 0], records[:, 1] = 7, np.arange(count) % 100
        records.tofile(folder / name)
    data = load_dataset("cifar100", tmp_path)
    assert data.num_classes == 100
    assert torch.equal(data.test.labels, torch.arange(10_000) % 100)


def test_torchvision_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(1)
    batches = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batches[name] = {"data": rng.integers(0, 256, (10, 3072), np.uint8), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(batches[name]))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    # torchvision knows the checksums of the real files only; everything else of its reader runs
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    data = load_dataset("cifar10", tmp_path)
    assert torch.equal(data.test.images.flatten(1), torch.from_numpy(batches["test_batch"]["data"]))
    assert data.train.labels.tolist() == list(range(10)) * 5


def test_download_goes_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def refuse(self: object, root: str, train: bool, download: bool) -> None:
        asked.append((root, download))
        raise RuntimeError("no network here")

    monkeypatch.setattr(datasets.CIFAR100, "__init__", refuse)
    with pytest.raises(ValueError, match=r"torchvision could not load cifar100 .no network here"):
        load_dataset("cifar100", tmp_path, download=True)
    assert asked == [(str(tmp_path), True)]


def cut_off(folder: Path) -> None:
    with (folder / "data_batch_3.bin").open("r+b") as file:
        file.truncate(1_000_000)


def lost(folder: Path) -> None:
    (folder / "test_batch.bin").unlink()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        pytest.param(cut_off, ValueError, r"data_batch_3.bin: expected 30,730,000 bytes, got 1,000,000", id="cut-off"),
        pytest.param(lost, FileNotFoundError, r"test_batch.bin: expected a file", id="lost"),
    ],
)
def test_damaged_files(tmp_path: Path, damage: Callable[[Path], None], error: type[Exception], message: str) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in CIFAR10:
        with (folder / name).open("wb") as file:
            file.truncate(30_730_000)
    damage(folder)
    with pytest.raises(error, match=message):
        load_dataset("cifar10", tmp_path)


def test_missing_root_and_unknown_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTGATE_DATA", raising=False)
    with pytest.raises(ValueError, match="--data-root or set FASTGATE_DATA"):
        load_dataset("cifar10")
    with pytest.raises(FileNotFoundError, match="expected cifar-10-batches-bin or cifar-10-batches-py under"):
        load_dataset("cifar10", tmp_path)
    with pytest.raises(ValueError, match="expected one of digits, cifar10, cifar100, got 'mnist'"):
        load_dataset("mnist")


def test_validation_split_is_disjoint_and_fixed() -> None:
    whole, split, again = load_dataset("digits"), load_dataset("digits", validation=137), None
    again = load_dataset("digits", validation=137)
    assert split.validation is not None and again.validation is not None
    assert (len(split.train), len(split.validation)) == (1300, 137)
    assert torch.equal(split.validation.images, again.validation.images)
    rows = sorted(map(tuple, torch.cat([split.train.images, split.validation.images]).flatten(1).tolist()))
    assert rows == sorted(map(tuple, whole.train.images.flatten(1).tolist()))
    assert torch.equal(split.test.images, whole.test.images)
    with pytest.raises(ValueError, match="validation: expected 0 to 1436 images, got 1437"):
        load_dataset("digits", validation=1437)


def toy(images: torch.Tensor, *, pad: int = 1, flip: bool = True) -> Dataset:
    split = ImageSet(images, torch.arange(len(images)))
    channels = images.shape[1]
    return Dataset("toy", split, split, len(images), (0.5,) * channels, (0.25,) * channels, pad, flip)


def test_crop_and_flip_equals_one_image_at_a_time() -> None:
    # 5x7: height and width must not be mixed up
    images = torch.randint(0, 256, (40, 3, 5, 7), dtype=torch.uint8)
    offsets, flips = torch.randint(0, 5, (2, 40)), torch.rand(40) < 0.5
    got = crop_and_flip(images, 2, offsets, flips)
    for i, image in enumerate(images):
        row, column = offsets[:, i].tolist()
        crop = F.pad(image, (2, 2, 2, 2))[:, row : row + 5, column : column + 7]
        assert torch.equal(got[i], crop.flip(2) if flips[i] else crop)


def test_batches_normalise_and_keep_order_without_augmentation() -> None:
    data = toy(torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8))
    batches = Batches(data, data.test, 4)
    got = list(batches)
    assert len(batches) == len(got) == 3
    assert torch.cat([y for _, y in got]).tolist() == list(range(10))
    expected = (data.test.images.double() / 255 - 0.5) / 0.25
    # one rounding of the division and one of the product in fp32, on values up to 2
    torch.testing.assert_close(torch.cat([x for x, _ in got]).double(), expected, atol=4e-7, rtol=0)


def test_training_batches_are_permutations_that_depend_on_seed_and_epoch_alone() -> None:
    data = toy(torch.randint(0, 256, (33, 1, 4, 4), dtype=torch.uint8))

    def epoch(number: int, seed: int = 3, step: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(Batches(data, data.train, 8, augment=True, seed=seed).start_at(number, step))

    first = epoch(0)
    labels = torch.cat([y for _, y in first]).tolist()
    assert len(first) == 4 and len(set(labels)) == 32  # the short last batch is dropped
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, epoch(0), strict=True))
    assert torch.cat([y for _, y in epoch(1)]).tolist() != labels
    assert torch.cat([y for _, y in epoch(0, seed=4)]).tolist() != labels
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first[2:], epoch(0, step=2), strict=True))


def test_processes_share_every_batch() -> None:
    data = toy(torch.randint(0, 256, (33, 1, 4, 4), dtype=torch.uint8))
    whole = list(Batches(data, data.train, 8, augment=True))
    parts = [list(Batches(data, data.train, 8, augment=True, shard=(i, 4))) for i in range(4)]
    for step, (x, y) in enumerate(whole):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), x)
        assert torch.equal(torch.cat([part[step][1] for part in parts]), y)
    with pytest.raises(ValueError, match=r"batch_size: expected a multiple of the 3 processes.*got 8"):
        Batches(data, data.train, 8, augment=True, shard=(0, 3))


def test_processes_take_turns_with_batches_that_are_not_augmented() -> None:
    data = toy(torch.randint(0, 256, (33, 1, 4, 4), dtype=torch.uint8))
    labels = [[y.tolist() for _, y in Batches(data, data.test, 8, shard=(i, 2))] for i in range(2)]
    assert labels[0] == [[*range(8)], [*range(16, 24)], [32]]
    assert labels[1] == [[*range(8, 16)], [*range(24, 32)]]


def test_augmentation_is_per_sample_and_uses_every_crop() -> None:
    image = torch.arange(1, 10, dtype=torch.uint8).reshape(1, 1, 3, 3)
    data = toy(image.expand(4000, -1, -1, -1).contiguous())
    x, _ = next(iter(Batches(data, data.train, 4000, augment=True)))
    kinds, counts = x.flatten(1).unique(dim=0, return_counts=True)
    assert len(kinds) == 18  # 3 x 3 offsets, mirrored or not
    # each of 18 kinds is binomial(4000, 1/18): mean 222, standard deviation 14.5; six of them
    assert (counts - 4000 / 18).abs().max() < 6 * 14.5


def test_no_flip_where_mirrored_images_are_others() -> None:
    image = torch.arange(1, 10, dtype=torch.uint8).reshape(1, 1, 3, 3)
    data = toy(image.expand(900, -1, -1, -1).contiguous(), flip=False)
    x, _ = next(iter(Batches(data, data.train, 900, augment=True)))
    assert len(x.flatten(1).unique(dim=0)) == 9


def test_channels_last_and_too_large_batches() -> None:
    data = toy(torch.randint(0, 256, (9, 3, 4, 4), dtype=torch.uint8))
    x, _ = next(iter(Batches(data, data.train, 9, augment=True, channels_last=True)))
    assert x.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="batch_size: expected at most 9"):
        Batches(data, data.train, 10, augment=True)


@pytest.mark.gpu
def test_augmentation_on_the_device_equals_the_one_on_the_cpu() -> None:
    device = torch.device("cuda")
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    offsets, flips = torch.randint(0, 9, (2, 64)), torch.rand(64) < 0.5
    there = crop_and_flip(images.to(device), 4, offsets.to(device), flips.to(device))
    assert there.device.type == "cuda"
    assert torch.equal(there.cpu(), crop_and_flip(images, 4, offsets, flips))
