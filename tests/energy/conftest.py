from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest

from fastgate.energy import rapl
from fastgate.energy.sources import Sampler
from tests.energy.fake import ENSURE_RUNNING, Fake, build


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def old_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml-old"), "-DOLD_DRIVER")


@pytest.fixture(autouse=True)
def machine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests of a real board see this machine's RAPL, NVML and CUDA variables."""
    if request.node.get_closest_marker("gpu") is not None:
        return

    def refuse(name: str, *arguments: object) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    # the loader would find the stand-in again once a test has loaded it
    monkeypatch.setattr(pynvml, "CDLL", refuse)
    monkeypatch.setattr(rapl, "ROOT", tmp_path / "powercap")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)


@pytest.fixture(autouse=True)
def no_watching(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads run in real time: where time is the test's, they would take the readings that it wants to see."""

    def only_others(sampler: Sampler) -> None:
        if all(source.kind != "nvml-counter" for source in sampler._sources):
            ENSURE_RUNNING(sampler)

    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(Sampler, "ensure_running", only_others)


@pytest.fixture
def fake(library: Path) -> Iterator[Fake]:
    yield from installed(Fake(library))


@pytest.fixture
def old_fake(old_library: Path) -> Iterator[Fake]:
    yield from installed(Fake(old_library))


def installed(fake: Fake) -> Iterator[Fake]:
    fake.install()
    yield fake
    fake.uninstall()
