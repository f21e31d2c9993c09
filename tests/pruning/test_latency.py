"""Times of passes: the median, and what lies around it."""

import time

import pytest
import torch
from torch import nn

from fastgate.pruning import latency
from fastgate.pruning.latency import latency_quartiles, measure_latency


class Slow(nn.Module):
    """Takes so many seconds of a made-up clock, pass by pass."""

    def __init__(self, clock: list[float], seconds: list[float]) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock[0] += self.seconds.pop(0)
        return x


def test_quartiles_over_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    x = torch.zeros(1)
    # the first pass warms up and is not counted
    models = {"a": Slow(clock, [99.0, 5.0, 1.0, 3.0, 2.0, 4.0]), "b": Slow(clock, [99.0, *[7.0] * 5])}
    found = latency_quartiles(models, x, rounds=5, warmup=1)
    assert found == {"a": pytest.approx((2.0, 3.0, 4.0)), "b": pytest.approx((7.0, 7.0, 7.0))}
    once = {"a": Slow(clock, [2.5])}
    assert latency_quartiles(once, x, rounds=1, warmup=0) == {"a": pytest.approx((2.5, 2.5, 2.5))}


def test_the_median_is_a_real_time() -> None:
    start = time.perf_counter()
    (seconds,) = measure_latency({"a": nn.Linear(8, 8)}, torch.zeros(2, 8), rounds=4).values()
    assert 0 < seconds < time.perf_counter() - start


def test_no_rounds() -> None:
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        measure_latency({"a": nn.Identity()}, torch.zeros(1), rounds=0)
