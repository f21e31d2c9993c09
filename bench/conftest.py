"""Benchmarks synchronise with the device, and every result file describes its machine."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.machine import describe_machine
from bench.timing import Call, copy_bandwidth, device_times


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fastgate"] = describe_machine()


def device_clock() -> float:
    """Seconds, read after the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # 0.1 s per benchmark: there are hundreds
        item.add_marker(pytest.mark.benchmark(timer=device_clock, warmup=False, max_time=0.1, min_rounds=5))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def stream_bytes_per_second() -> float:
    """Bandwidth of a large copy on this GPU; unused on a CPU."""
    return copy_bandwidth() if torch.cuda.is_available() else float("nan")


@pytest.fixture
def measure(benchmark: Any, stream_bytes_per_second: float) -> Callable[..., None]:
    """Time calls that `make` returns: on the host's clock, and on a GPU also with events (see `device_times`)."""

    def measure(make: Callable[[], Call], *, bytes_moved: int, **labels: Any) -> None:
        benchmark.extra_info.update(labels)
        call = make()
        call()
        if torch.cuda.is_available() and benchmark.enabled:
            benchmark.extra_info.update(device_times(make, bytes_moved, stream_bytes_per_second))
        benchmark(call)

    return measure
