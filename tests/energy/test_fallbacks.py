"""Boards without a counter, old drivers, wrong bindings: power added up, or a typed error with the remedy."""

import gc
import os
import sys
import threading
import time
from types import ModuleType

import pytest
import torch

import fastgate as fg
from fastgate.energy import EnergyError, errors
from fastgate.energy.sources import NvmlCounter, PowerIntegral, Sampler, nvml_source
from tests.energy.fake import ENSURE_RUNNING, T4, T4_TOO, Fake

AAAA, BBBB = T4[0], T4_TOO[0]


def hold_samplers(meter: fg.EnergyMeter) -> None:
    """Leave the samples to the test: a meter's thread runs in real time."""
    for sampler in meter._samplers:
        sampler.stop()


@pytest.mark.parametrize("instant", [True, False])
def test_a_board_without_a_counter_is_integrated(fake: Fake, instant: bool) -> None:
    fake.board(watts=60, counter=False, instant=instant)
    meter = fake.meter()
    hold_samplers(meter)
    with meter.window("vGPU", items=60) as w:
        for _ in range(40):
            fake.run(0.05)
            meter.sources[0].read()
    assert (w.result.joules, w.result.joules_per_item) == (120.0, 2.0)
    assert (w.result.source, w.result.warnings) == ("nvml-power-integral", ())
    # the power never changed; what it did in the last 0.1 s is not known, and no more than the limit of 70 W
    assert w.result.error_bound_joules == pytest.approx(7.0)


def test_the_integral_follows_a_changing_power(fake: Fake) -> None:
    fake.board(watts=20, counter=False, tick=0.01)
    source = PowerIntegral(fake.open_board(), fake.clock)
    fake.run(1)
    begin = source.read()
    start = fake.exact_mj(0)
    for watts in (70, 30, 65):
        fake.run(0.5, watts)
        for _ in range(10):
            fake.run(0.05)
            end = source.read()
    exact = (fake.exact_mj(0) - start) / 1000
    joules = (end.microjoules - begin.microjoules) / 1e6
    bound = source.error_bound(begin, end, 4.0)
    assert bound is not None and 0 < abs(joules - exact) <= bound


def test_power_between_distant_samples_is_a_guess_and_said_so(fake: Fake) -> None:
    fake.board(watts=60, counter=False)
    with fake.meter().window("suspended") as w:
        fake.run(30)
    assert w.result.joules == 1800.0
    assert "power was not sampled for 30 s" in w.result.warnings[0]


@pytest.mark.parametrize("counter", [False, True])
def test_the_sampling_thread_samples_and_ends_with_the_meter(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, counter: bool
) -> None:
    monkeypatch.setattr(Sampler, "ensure_running", ENSURE_RUNNING)
    fake.board(watts=60, counter=counter)
    others = threading.enumerate()  # a meter of an earlier test, not collected yet
    meter = fake.meter()
    before = fake.calls()
    time.sleep(0.3)
    assert 2 <= fake.calls() - before <= 30
    sampling = [t for t in threading.enumerate() if t.name == "fastgate-energy" and t not in others]
    assert len(sampling) == 1 and sampling[0].daemon
    del meter
    gc.collect()
    sampling[0].join(timeout=2)
    assert not sampling[0].is_alive()


def test_a_lost_board_does_not_end_the_sampling(fake: Fake) -> None:
    fake.board(watts=60, counter=False)
    meter = fake.meter()
    fake.set_error(0, 15)
    time.sleep(0.15)
    fake.set_error(0, 0)
    before = fake.calls()
    time.sleep(0.2)
    assert fake.calls() > before
    meter.close()


def test_a_fork_inside_an_integrated_window_is_said(fake: Fake) -> None:
    fake.board(watts=60, counter=False)
    meter = fake.meter()
    window = meter.begin("across the fork")
    meter.sources[0]._lock.acquire()  # type: ignore[attr-defined]  # as if the thread was just reading
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with meter.window("in the child") as w:
            fake.run(2)
        threads = [thread.name for thread in threading.enumerate()].count("fastgate-energy")
        os.write(write, f"{window.end().joules} {w.result.joules} {threads} {window.result.warnings}".encode())
        os._exit(0)
    meter.sources[0]._lock.release()  # type: ignore[attr-defined]
    os.waitpid(child, 0)
    os.close(write)
    said = os.read(read, 1000).decode()
    os.close(read)
    assert said.startswith("None 120.0 1 ")
    assert "forked inside the window" in said
    fake.run(0.5)
    assert window.end().joules == 30.0


def test_counter_and_integral_beside_each_other(fake: Fake) -> None:
    fake.board(T4, 70)
    fake.board(T4_TOO, 35, counter=False)
    with fake.meter().window("w") as w:
        fake.run(0.5)
        fake.run(0.5)
    assert w.result.per_device == {AAAA: 70.0, BBBB: 35.0}
    assert w.result.sources == {AAAA: "nvml-counter", BBBB: "nvml-power-integral"}
    assert w.result.source == "nvml-power-integral"  # the weaker one


def test_an_old_driver_without_the_calls(old_fake: Fake) -> None:
    old_fake.board(watts=60)
    meter = old_fake.meter()
    with meter.window("w") as w:
        old_fake.run(0.5)
        old_fake.run(0.5)
    assert (w.result.joules, w.result.source) == (60.0, "nvml-power-integral")
    with pytest.raises(errors.NotSupported, match="the installed driver is too old to know this call"):
        old_fake.open_board().read_millijoules()


def test_neither_counter_nor_power(fake: Fake) -> None:
    fake.board(counter=False, instant=False)
    fake.fail("nvmlDeviceGetPowerUsage", 3)
    with fake.meter().window("w") as w:
        fake.run(1)
    assert w.result.per_device == {AAAA: None}
    assert "this board does not offer the reading" in w.result.warnings[0]
    with pytest.raises(errors.NotSupported):
        fake.meter(require=True)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (3, errors.NotSupported),
        (4, errors.PermissionDenied),
        (6, errors.DeviceMissing),
        (13, errors.NotSupported),
        (15, errors.DeviceLost),
        (16, errors.DeviceLost),
        (999, EnergyError),
    ],
)
def test_return_codes_become_typed_errors(fake: Fake, code: int, kind: type[EnergyError]) -> None:
    fake.board()
    board = fake.open_board()
    fake.fail("nvmlDeviceGetTotalEnergyConsumption", code)
    with pytest.raises(kind, match="nvmlDeviceGetTotalEnergyConsumption: ") as caught:
        board.read_millijoules()
    assert type(caught.value) is kind


@pytest.mark.parametrize(("code", "kind"), [(4, errors.PermissionDenied), (15, errors.DeviceLost)])
def test_only_a_missing_counter_falls_back_to_power(fake: Fake, code: int, kind: type[EnergyError]) -> None:
    fake.board()
    assert isinstance(nvml_source(fake.open_board(), fake.clock), NvmlCounter)
    fake.fail("nvmlDeviceGetTotalEnergyConsumption", code)
    with pytest.raises(kind):
        nvml_source(fake.open_board(), fake.clock)


def test_a_field_that_failed_is_not_read(fake: Fake) -> None:
    # the call succeeds as a whole: the status of the element is what counts
    fake.board(watts=60, instant=False)
    board = fake.open_board()
    fake.run(1)
    assert board.power_readings() == {"instant": None, "average": None, "usage": 60.0}
    assert board.read_milliwatts() == 60_000
    fake.set_average(0, 1)
    assert board.power_readings()["average"] == 60.0


def test_bindings_that_lack_a_function(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    fake.board(watts=60)
    monkeypatch.delattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption")
    with pytest.raises(errors.NotSupported, match="unknown to this nvidia-ml-py; update the package"):
        fake.open_board().read_millijoules()


def test_the_wrong_pynvml(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ModuleType("pynvml")
    wrong.__file__ = "/site-packages/pynvml/__init__.py"
    monkeypatch.setitem(sys.modules, "pynvml", wrong)
    with pytest.raises(errors.LibraryMissing, match=r"/site-packages/pynvml/__init__.py is not NVIDIA's; run `pip"):
        fg.EnergyMeter(require=True)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(errors.LibraryMissing, match="run `pip install nvidia-ml-py`"):
        fg.EnergyMeter(require=True)
    with fg.EnergyMeter(torch.device("cuda:0")).window("w") as w:
        pass
    assert w.result.joules is None


def test_a_sampler_stops_before_it_has_started() -> None:
    before = threading.active_count()
    sampler = Sampler([], 1.0)
    sampler.stop()
    assert threading.active_count() == before
    sampler.ensure_running()
    assert threading.active_count() == before + 1
    sampler.stop()
