"""What the probe says of the boards, on the stand-in; the command line is in test_processes.py."""

import pytest

from fastgate.energy.probe import probe
from tests.energy.fake import A100, T4, Fake
from tests.energy.test_rapl import add_zone


def test_probe(fake: Fake, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.board(T4, 17.0, tick=0.1)
    fake.board(A100, 60.0, counter=False, instant=False)
    fake.set_average(1, 1)
    fake.add_process(0, 77)
    add_zone(tmp_path / "powercap", "intel-rapl:0", "package-0")
    add_zone(tmp_path / "powercap", "intel-rapl:0:0", "dram")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    said = probe(seconds=2.0, clock=fake.clock)
    gpu = said["gpu"]
    assert gpu["available"] and gpu["driver"] == gpu["nvml"] == "0.0-fake"
    assert gpu["visible_to_cuda"] == [T4[0]]
    a100, t4 = gpu["devices"]
    assert (t4["uuid"], t4["name"], t4["pci"]) == (T4[0], T4[1], T4[2].lower())
    assert (t4["processes"], t4["power_limit_watts"], t4["temperature_celsius"]) == (1, 70.0, 40)
    assert t4["counter"] == {
        "available": True,
        "tick_seconds": pytest.approx(0.1),
        "ticks_seen": 18,
        "smallest_step_joules": 1.7,
    }
    assert t4["power"] == {"instant": True, "average": False, "usage": True}
    assert t4["idle_watts"] == {"mean": 17.0, "deviation": 0.0, "lowest": 17.0, "highest": 17.0, "readings": 2000}
    assert t4["cross_check"]["counter_joules"] == pytest.approx(17 * 1.8)
    assert t4["cross_check"]["integral_joules"] == pytest.approx(17 * 1.8)
    assert t4["cross_check"]["agrees"]
    assert not a100["counter"]["available"] and "does not offer" in a100["counter"]["reason"]
    assert a100["power"] == {"instant": False, "average": True, "usage": True}
    assert (a100["cross_check"], a100["idle_watts"]["mean"]) == (None, 60.0)
    assert said["cpu"]["metered"] == ["cpu:package-0"] and set(said["cpu"]["zones"]) == {"package-0", "dram"}
    assert fake.references() == 0


def test_a_counter_that_contradicts_the_power(fake: Fake) -> None:
    fake.board(watts=40.0)
    probing = fake.clock.sleep

    def sleep(seconds: float) -> None:
        probing(seconds)
        if fake.now_us() % 100_000 == 50_000:  # energy that no power reading has seen
            fake.set_counter_mj(0, fake.exact_mj(0) + 1000)

    fake.clock.sleep = sleep  # type: ignore[method-assign]
    check = probe(seconds=2.0, clock=fake.clock)["gpu"]["devices"][0]["cross_check"]
    assert check["difference"] == pytest.approx(0.25, rel=0.1) and not check["agrees"]


def test_probe_of_boards_in_unknown_order(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.board(T4)
    fake.board(A100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    gpu = probe(seconds=0.01, clock=fake.clock)["gpu"]
    assert gpu["visible_to_cuda"] is None and "CUDA_DEVICE_ORDER=PCI_BUS_ID" in gpu["reason"]
    assert len(gpu["devices"]) == 2


def test_probe_without_anything(fake: Fake) -> None:
    fake.fail("nvmlInitWithFlags", 9)
    said = probe(seconds=0.01, clock=fake.clock)
    assert said["gpu"]["available"] is False and "kernel driver is not loaded" in said["gpu"]["reason"]
    assert said["cpu"]["available"] is False and "no RAPL packages" in said["cpu"]["reason"]


def test_bad_seconds() -> None:
    with pytest.raises(ValueError, match="seconds: expected a duration above 0, got 0"):
        probe(0)
