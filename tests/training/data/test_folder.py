import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from fastgate.training.data.augmentation import Augmentation
from fastgate.training.data.folder import IMAGENET_MEAN, IMAGENET_STD, Folder
from tests.training.data.pictures import draw, write_splits

Batch = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes: 23 training and 7 test images of odd sizes."""
    folder = tmp_path_factory.mktemp("animals")
    return write_splits(folder, train={"cat": 10, "dog": 8, "eel": 5}, val={"cat": 3, "dog": 2, "eel": 2})


def load(folder: Path, workers: int = 0, **options: object) -> Folder:
    return Folder(folder, image_size=16, workers=workers, **options)  # type: ignore[arg-type]


def assert_same(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected) > 0
    for (x, y), (expected_x, expected_y) in zip(got, expected, strict=True):
        assert torch.equal(x, expected_x) and torch.equal(y, expected_y)


def test_a_folder_says_what_it_is(animals: Path) -> None:
    data = load(animals)
    assert data.name == f"folder:{animals}"
    assert (data.image_size, data.num_classes, data.class_names) == ((3, 16, 16), 3, ("cat", "dog", "eel"))
    assert data.splits == {"train": 23, "test": 7}
    assert (data.mean, data.std) == (IMAGENET_MEAN, IMAGENET_STD)
    training, evaluation = data.training(4), data.evaluation("test", 4)
    assert (len(training), training.batch_size, training.samples) == (5, 4, 20)
    assert (len(evaluation), evaluation.batch_size, evaluation.samples) == (2, 4, 7)
    x, y = next(iter(training))
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((4, 3, 16, 16), torch.float32, (4,), torch.int64)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_that_starts_in_the_middle_gives_the_same_bits(animals: Path, workers: int) -> None:
    whole = [list(load(animals).training(4, seed=3).start_at(epoch)) for epoch in (0, 1)]
    loader = load(animals, workers).training(4, seed=3)
    torch.manual_seed(99)  # of no account
    before = torch.get_rng_state()
    assert_same(list(loader.start_at(1, 2)), whole[1][2:])
    assert_same(list(loader.start_at(0)), whole[0])
    # broken off with batches on the way, then another epoch with the same workers
    for _, batch in zip(range(2), loader.start_at(0, 1), strict=False):
        assert len(batch[1]) == 4
    assert_same(list(loader.start_at(1)), whole[1])
    assert list(loader.start_at(1, 5)) == []
    assert torch.equal(torch.get_rng_state(), before)


def test_epochs_and_seeds_differ_and_give_each_image_once(animals: Path) -> None:
    data = load(animals, augmentation=Augmentation(scale=(1, 1), flip=False, colour=0))

    def labels(epoch: int, seed: int = 0) -> list[int]:
        return torch.cat([y for _, y in data.training(23, seed=seed).start_at(epoch)]).tolist()

    assert sorted(labels(0)) == [0] * 10 + [1] * 8 + [2] * 5
    assert labels(0) != labels(1) != labels(0, seed=1)
    (x, _), (other, _) = (next(iter(data.training(23).start_at(epoch))) for epoch in (0, 0))
    assert torch.equal(x, other)
    # an image is cropped anew in every epoch
    data = load(animals)
    first, second = (next(iter(data.training(23).start_at(epoch)))[0] for epoch in (0, 1))
    assert not any(torch.equal(a, b) for a in first for b in second)


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_every_training_batch(animals: Path, workers: int) -> None:
    whole = list(load(animals).training(6).start_at(2))
    parts = [list(load(animals, workers).training(6, shard=(i, 3)).start_at(2)) for i in range(3)]
    together = [tuple(map(torch.cat, zip(*batches, strict=True))) for batches in zip(*parts, strict=True)]
    assert_same(together, whole)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batch_size: expected a multiple of the 4 processes.*got 6"):
        load(animals).training(6, shard=(0, 4))
    with pytest.raises(ValueError, match=r"batch_size: expected at most 23 \(the training images\), got 24"):
        load(animals).training(24)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_evaluation_gives_every_image_once_as_torchvision_would(animals: Path, workers: int) -> None:
    data = load(animals, workers, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    recipe = v2.Compose(
        [
            v2.Resize(18),  # 16 * 256 / 224, to the nearest
            v2.CenterCrop(16),
            v2.PILToTensor(),
            v2.ToDtype(torch.float64, scale=True),
            v2.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.1)),
        ]
    )
    for split, folder in (("test", "val"), ("train", "train")):
        files = sorted((animals / folder).rglob("*.jpg"))
        expected = torch.stack([recipe(Image.open(file)) for file in files])
        loader = data.evaluation(split, 3, channels_last=True)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in batches)
        assert torch.cat([y for _, y in batches]).tolist() == [
            ["cat", "dog", "eel"].index(f.parent.name) for f in files
        ]
        # one rounding of the difference and one of the product in fp32, on values up to 10
        torch.testing.assert_close(torch.cat([x for x, _ in batches]).double(), expected, atol=2e-6, rtol=0)
    with pytest.raises(ValueError, match=r"split: folder:.* has train, test, got 'validation'; choose one of them"):
        data.evaluation("validation", 3)


def test_processes_take_turns_in_evaluation(animals: Path) -> None:
    data = load(animals)
    whole = list(data.evaluation("test", 2))
    shards = [data.evaluation("test", 2, shard=(i, 2)) for i in range(2)]
    assert [len(shard) for shard in shards] == [2, 2]
    assert_same(list(shards[0]), whole[0::2])
    assert_same(list(shards[1]), whole[1::2])
    # everybody has a batch: 7 images among 3
    assert [[len(y) for _, y in data.evaluation("test", 500, shard=(i, 3))] for i in range(3)] == [[2, 1], [2], [2]]


def write(path: Path, image: Image.Image, **options: object) -> None:
    path.unlink(missing_ok=True)
    image.save(path, **options)  # type: ignore[arg-type]


def test_images_of_all_kinds_become_red_green_and_blue(tmp_path: Path) -> None:
    write_splits(tmp_path, train={"kind": 1}, val={"kind": 0})
    pixels = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    colour = Image.fromarray(pixels)
    grey, clear, palette = colour.convert("L"), colour.convert("RGBA"), Image.new("P", (16, 16))
    clear.putalpha(7)
    palette.putpalette([200, 100, 50])
    folder = tmp_path / "val" / "kind"
    write(folder / "0.png", grey)
    write(folder / "1.png", clear)
    write(folder / "2.png", palette, transparency=b"\x00" * 256)
    write(folder / "3.png", colour.convert("1"))
    write(folder / "4.jpg", colour.convert("CMYK"), quality=100)
    x, _ = next(iter(load(tmp_path, mean=(0, 0, 0), std=(1, 1, 1)).evaluation("test", 5)))
    got = (x * 255).round().flatten(2).mean(2).tolist()
    assert got[0] == [grey.getpixel((0, 0))] * 3
    assert got[1] == [200, 100, 50]
    assert got[2] == [200, 100, 50]
    assert got[3][0] == got[3][1] == got[3][2]
    assert np.abs(np.array(got[4]) - (200, 100, 50)).max() <= 2  # JPEG's own rounding


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    write_splits(tmp_path, train={"side": 1}, val={"side": 0})
    image = Image.fromarray(draw(1, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn by 90 degrees clockwise
    write(tmp_path / "val" / "side" / "0.png", image.rotate(90, expand=True), exif=exif)
    write(tmp_path / "val" / "side" / "1.png", image)
    x, _ = next(iter(load(tmp_path).evaluation("test", 2)))
    assert torch.equal(x[0], x[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_read_are_named(tmp_path: Path, workers: int) -> None:
    write_splits(tmp_path, train={"cat": 4}, val={"cat": 3})
    data = load(tmp_path, workers)
    broken = tmp_path / "val" / "cat" / "002.jpg"
    whole = broken.read_bytes()

    def message() -> str:
        with pytest.raises(ValueError, match="replace or remove the file") as caught:
            list(data.evaluation("test", 1))
        assert "Traceback" not in str(caught.value)
        return str(caught.value)

    broken.write_bytes(whole[: len(whole) // 2])
    assert message().startswith(f"{broken}: expected an image, got OSError: ")
    broken.write_text("not an image")
    assert message().startswith(f"{broken}: expected an image, got UnidentifiedImageError: ")
    deep = Image.fromarray(np.full((8, 8), 40_000, np.uint16))
    deep.save(broken, "png")
    assert "got ValueError: more than 8 bits per channel (mode I;16)" in message()
    broken.unlink()
    assert message().startswith(f"{broken}: expected an image, got FileNotFoundError: ")
    # training meets it as well
    (tmp_path / "train" / "cat" / "001.jpg").write_text("")
    with pytest.raises(ValueError, match=r"train/cat/001.jpg: expected an image"):
        list(data.training(2))


@pytest.mark.parametrize("workers", [0, 2])
def test_two_passes_at_once_over_one_loader_are_refused(animals: Path, workers: int) -> None:
    loader = load(animals, workers).training(4)
    first = iter(loader)
    next(first)
    assert len(list(loader)) == 5
    with pytest.raises(RuntimeError, match=r"another one has begun.*make a loader for each"):
        next(first)


def wait_until_gone(processes: list[multiprocessing.Process], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(process.is_alive() for process in processes)


def test_workers_outlive_ctrl_c_and_passes_but_not_their_loader(animals: Path) -> None:
    before = set(multiprocessing.active_children())
    loader = load(animals, 2).training(4)
    expected = list(load(animals).training(4))
    batches = iter(loader)
    got = [next(batches)]
    workers = [process for process in multiprocessing.active_children() if process not in before]
    assert len(workers) == 2
    for worker in workers:  # as a terminal does, to all processes of a group
        os.kill(worker.pid or 0, signal.SIGINT)
    got += list(batches)
    assert_same(got, expected)
    list(loader.start_at(1))
    assert {process for process in multiprocessing.active_children() if process not in before} == set(workers)
    del loader, batches
    gc.collect()
    wait_until_gone(workers)  # type: ignore[arg-type]


@pytest.fixture
def spawned() -> Iterator[None]:
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(method, force=True)


@pytest.mark.slow
def test_spawned_workers_read_the_same(animals: Path, spawned: None) -> None:
    assert_same(list(load(animals, 1).training(10)), list(load(animals).training(10)))


def test_arguments_that_are_refused(animals: Path) -> None:
    with pytest.raises(ValueError, match="image_size: expected 1 pixel or more, got 0"):
        Folder(animals, image_size=0)
    with pytest.raises(ValueError, match="workers: expected 0 or more processes, or None, got -1"):
        Folder(animals, workers=-1)
    with pytest.raises(ValueError, match=r"mean: expected 3 numbers, one per channel, got \(0.5,\)"):
        Folder(animals, mean=(0.5,))
    with pytest.raises(ValueError, match=r"std: expected 3 numbers above 0, one per channel, got \(1, 0, 1\)"):
        Folder(animals, std=(1, 0, 1))


def test_workers_by_default_share_the_processors(animals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert Folder(animals).workers == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Folder(animals).workers == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert Folder(animals).workers == 1


@pytest.mark.gpu
def test_batches_on_the_device_equal_those_on_the_cpu(animals: Path) -> None:
    there, here = load(animals, 2, device="cuda"), load(animals)
    for got, expected in (
        (there.training(4), here.training(4)),
        (there.evaluation("test", 3), here.evaluation("test", 3)),
    ):
        for (x, y), (expected_x, expected_y) in zip(got, expected, strict=True):
            assert x.device.type == y.device.type == "cuda"
            # contracted multiplications and additions round once less
            torch.testing.assert_close(x.cpu(), expected_x, atol=1e-5, rtol=0)
            assert torch.equal(y.cpu(), expected_y)
