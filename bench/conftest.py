"""Benchmarks wait for the device, and every result file says what it was measured on."""

import time
from typing import Any

import pytest
import torch

from fastgate.env import describe_environment


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fastgate"] = describe_environment()


def device_time() -> float:
    """Seconds, read after the device has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=device_time, warmup=True))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
