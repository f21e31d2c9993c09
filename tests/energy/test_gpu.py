"""Plausibility on a real board."""

import time

import pytest
import torch

import fastgate as fg
from fastgate.energy.probe import probe

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def work():
    """A matrix product that keeps any board busy for some milliseconds."""
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    return lambda: x @ x


@pytest.fixture
def meter():
    meter = fg.EnergyMeter("cuda:0", require=True)
    yield meter
    meter.close()


def busy(meter: fg.EnergyMeter, work, calls: int):
    work()
    with meter.window("busy", items=calls) as w:
        for _ in range(calls):
            work()
    return w.result


def calls_in(work, seconds: float) -> int:
    torch.cuda.synchronize()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < 1:
        work()
        torch.cuda.synchronize()
        calls += 1
    return round(calls * seconds)


def test_idle_is_less_than_busy_and_busy_within_the_limit(meter: fg.EnergyMeter, work) -> None:
    with meter.window("idle") as idle:
        time.sleep(5)
    result = busy(meter, work, calls_in(work, 5))
    limit = meter._boards[0].power_limit_watts()
    assert 1 < idle.result.mean_watts < result.mean_watts
    assert limit is None or result.mean_watts <= 1.1 * limit
    assert result.seconds > 2 and result.error_bound_joules < 0.2 * result.joules
    assert meter.sources[0].tick is None or 0.001 < meter.sources[0].tick < 0.5


def test_twice_the_work_is_twice_the_joules(meter: fg.EnergyMeter, work) -> None:
    calls = calls_in(work, 6)
    busy(meter, work, calls)  # warm: the clocks have settled
    once, twice = busy(meter, work, calls), busy(meter, work, 2 * calls)
    slack = 2 * once.error_bound_joules + twice.error_bound_joules + 0.1 * twice.joules
    assert abs(twice.joules - 2 * once.joules) <= slack


def test_the_window_waits_for_the_work(meter: fg.EnergyMeter, work) -> None:
    calls = calls_in(work, 3)
    start = time.perf_counter()
    with meter.window("queued") as w:
        for _ in range(calls):
            work()
    assert w.result.seconds == pytest.approx(time.perf_counter() - start, rel=0.05)
    assert w.result.seconds > 1


def test_laps_add_up(meter: fg.EnergyMeter, work) -> None:
    with meter.window("laps") as w:
        for _ in range(10):
            for _ in range(50):
                work()
            w.lap()
    assert sum(lap.microjoules for lap in w.laps) == w.result.microjoules


def test_counter_and_integral_agree() -> None:
    device = next(d for d in probe(10.0)["gpu"]["devices"] if d["uuid"] == fg.EnergyMeter("cuda:0").sources[0].key)
    assert device["cross_check"] is None or device["cross_check"]["agrees"], device["cross_check"]
