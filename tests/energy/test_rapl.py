"""CPU packages in a temporary powercap tree."""

import time
from pathlib import Path
from typing import Any

import pytest

from fastgate.energy import errors, rapl
from tests.energy.fake import T4, Fake

RANGE = 262_143_328_850


def add_zone(root: Path, folder: str, name: str, energy_uj: int | str = 0) -> Path:
    zone = root / folder
    zone.mkdir(parents=True)
    (zone / "name").write_text(f"{name}\n")
    (zone / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (zone / "energy_uj").write_text(f"{energy_uj}\n")
    return zone


def burn(zone: Path, joules: float) -> None:
    file = zone / "energy_uj"
    file.write_text(f"{(int(file.read_text()) + round(joules * 1e6)) % RANGE}\n")


@pytest.fixture
def no_gpu(fake: Fake) -> Fake:
    fake.fail("nvmlInitWithFlags", 12)
    return fake


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two packages; zone 1 is psys, which contains both, and mmio shows package-0 again."""
    root = tmp_path / "powercap"
    (root / "intel-rapl").mkdir(parents=True)
    (root / "intel-rapl" / "enabled").write_text("1\n")
    for folder, name in (
        ("intel-rapl-mmio:0", "package-0"),
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:0:1", "dram"),
        ("intel-rapl:1", "psys"),
        ("intel-rapl:2", "package-1"),
    ):
        add_zone(root, folder, name, 1_000_000)
    return root


def test_packages_are_summed_and_nothing_else(root: Path, no_gpu: Fake) -> None:
    meter = no_gpu.meter()
    with meter.window("w", items=10) as w:
        for zone in root.glob("intel-rapl*:*"):
            burn(zone, 1000)
        burn(root / "intel-rapl:0", 20)
        burn(root / "intel-rapl:2", 3)
        no_gpu.run(10)
    assert w.result.per_device == {"cpu:package-0": 1020.0, "cpu:package-1": 1003.0}
    assert (w.result.joules, w.result.source, w.result.joules_per_item) == (2023.0, "rapl", 202.3)


def dies(root: Path, *microjoules: int, package: int = 0) -> list[Path]:
    """One zone per die of a package, with these counters."""
    start = len(list(root.glob("*")))
    names = [f"package-{package}-die-{i}" for i in range(len(microjoules))]
    return [add_zone(root, f"intel-rapl:{start + i}", names[i], value) for i, value in enumerate(microjoules)]


@pytest.mark.parametrize("start", [0, 7_000_000_000, RANGE - 100_000_000], ids=["just-reset", "running", "wraps"])
def test_dies_that_mirror_one_counter_count_once(tmp_path: Path, no_gpu: Fake, start: int) -> None:
    zones = dies(tmp_path / "powercap", start, start + 40_000, start + 80_000, start + 80_000)
    meter = no_gpu.meter()
    laps = []
    with meter.window("w") as w:
        for joules in (300, 380):
            for zone in zones:
                burn(zone, joules)
            no_gpu.run(5)
            laps.append(w.lap().joules)
    assert laps == [300.0, 380.0]
    assert (w.result.joules, w.result.per_device) == (680.0, {"cpu:package-0": 680.0})


@pytest.mark.parametrize("apart", [0, 1_000_000, 3_000_000_000], ids=["just-reset", "a-joule-apart", "running"])
def test_dies_with_counters_of_their_own_add_up(tmp_path: Path, no_gpu: Fake, apart: int) -> None:
    first, second, third = dies(tmp_path / "powercap", 5_000_000, 5_000_000 + apart, 5_000_000 + 2 * apart)
    with no_gpu.meter().window("w") as w:
        for _ in range(2):
            burn(first, 200)
            burn(second, 140)
            burn(third, 60)
            no_gpu.run(5)
            w.lap()
    assert [lap.joules for lap in w.laps[:2]] == [400.0, 400.0]
    assert (w.result.joules, w.result.per_device) == (800.0, {"cpu:package-0": 800.0})


def test_packages_of_mirroring_dies_add_up(tmp_path: Path, no_gpu: Fake) -> None:
    # counters of two packages are two counters, whatever they show
    first = dies(tmp_path / "powercap", 5_000_000, 5_000_000)
    second = dies(tmp_path / "powercap", 5_000_000, 5_000_000, package=1)
    with no_gpu.meter().window("w") as w:
        for zone in (*first, *second):
            burn(zone, 68)
        no_gpu.run(1)
    assert w.result.per_device == {"cpu:package-0": 68.0, "cpu:package-1": 68.0}


def test_two_counters_that_two_zones_each_mirror(tmp_path: Path, no_gpu: Fake) -> None:
    zones = dies(tmp_path / "powercap", 5_000_000, 9_000_000, 5_000_000, 9_000_000)
    with no_gpu.meter().window("w") as w:
        for zone, joules in zip(zones, (20, 3, 20, 3), strict=True):
            burn(zone, joules)
        no_gpu.run(1)
    assert w.result.joules == 23.0


def test_a_mirror_is_seen_however_late_a_zone_is_read(
    tmp_path: Path, no_gpu: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 30 J go by between any two readings, as when the process is kept from running
    zones = dies(tmp_path / "powercap", 5_000_000, 5_000_000, 5_000_000)
    read = rapl._Zone.read

    def read_late(zone: Any) -> int:
        for other in zones:
            burn(other, 30)
        return read(zone)

    monkeypatch.setattr(rapl._Zone, "read", read_late)
    (package,) = rapl.packages(tmp_path / "powercap")
    before = package.read()
    assert package.read().microjoules - before.microjoules == 6 * 30 * 10**6


def test_a_wrap_inside_a_window(tmp_path: Path, no_gpu: Fake) -> None:
    zone = add_zone(tmp_path / "powercap", "intel-rapl:0", "package-0", RANGE - 1_000_000)
    with no_gpu.meter().window("w") as w:
        burn(zone, 5)
        no_gpu.run(1)
    assert int((zone / "energy_uj").read_text()) == 4_000_000
    assert w.result.joules == 5.0


def set_counter(zone: Path, microjoules: int) -> None:
    (zone / "energy_uj").write_text(f"{microjoules}\n")


@pytest.mark.parametrize(("start", "back"), [(5_000_000_000, 50_000_000), (7_000_001, 7_000_000)], ids=["reset", "1uJ"])
def test_a_step_back_that_is_no_wrap(tmp_path: Path, no_gpu: Fake, start: int, back: int) -> None:
    zone = add_zone(tmp_path / "powercap", "intel-rapl:0", "package-0", start)
    meter = no_gpu.meter()
    with meter.window("w") as w:
        no_gpu.run(1)
        set_counter(zone, back)
    assert (w.result.joules, w.result.microjoules) == (None, None)
    assert "the counter went backwards by" in w.result.warnings[0]
    assert "(it was reset, or the machine was suspended)" in w.result.warnings[0]
    for joules in (30, 50):
        with meter.window("afterwards") as w:
            burn(zone, joules)
            no_gpu.run(1)
    assert w.result.joules == 50.0


@pytest.mark.parametrize("wraps", [0, 1, 2])
def test_a_counter_that_was_not_read_for_longer_than_a_wrap_takes(tmp_path: Path, no_gpu: Fake, wraps: int) -> None:
    zone = add_zone(tmp_path / "powercap", "intel-rapl:0", "package-0", 1_000_000_000)
    with no_gpu.meter().window("w") as w:
        no_gpu.run(655)
        burn(zone, wraps * RANGE / 1e6 + 1)
    assert w.result.joules is None
    assert "wraps every 262143 J and was not read for 65" in w.result.warnings[0]


def test_a_jump_that_is_impossible(tmp_path: Path, no_gpu: Fake) -> None:
    zone = add_zone(tmp_path / "powercap", "intel-rapl:0", "package-0", 1_000_000_000)
    with no_gpu.meter().window("w") as w:
        burn(zone, 100_000)
        no_gpu.run(10)
    assert w.result.joules is None
    assert "the counter jumped by 100000 J in 10" in w.result.warnings[0]


def test_a_counter_that_was_not_read_for_a_while_warns(tmp_path: Path, no_gpu: Fake) -> None:
    zone = add_zone(tmp_path / "powercap", "intel-rapl:0", "package-0", 1_000_000_000)
    meter = no_gpu.meter()
    meter.lap()
    with meter.window("w") as w:
        burn(zone, 1000)
        no_gpu.run(10)
    assert w.result.joules == 1000.0
    assert any("the counter was not read for 10 s" in warning for warning in w.result.warnings)


@pytest.mark.parametrize("at", ["made", "used"])
def test_a_glitch_does_not_make_two_counters_of_mirrors(tmp_path: Path, no_gpu: Fake, at: str) -> None:
    first, second = dies(tmp_path / "powercap", 5_000_000_000, 5_000_000_000)
    if at == "made":
        set_counter(second, 0)
    meter = no_gpu.meter()
    no_gpu.run(1)
    set_counter(second, 5_000_000_000 if at == "made" else 0)
    meter.lap()
    no_gpu.run(1)
    set_counter(second, 5_000_000_000)
    meter.lap()
    for _ in range(2):
        with meter.window("w") as w:
            for zone in (first, second):
                burn(zone, 68)
            no_gpu.run(1)
    assert w.result.joules == 68.0


def test_one_of_two_packages_that_is_lost_makes_the_sum_unknown(root: Path, no_gpu: Fake) -> None:
    meter = no_gpu.meter()
    with meter.window("w") as w:
        burn(root / "intel-rapl:0", 300)
        (root / "intel-rapl:2" / "energy_uj").unlink()
        no_gpu.run(10)
    assert (w.result.joules, w.result.microjoules) == (None, None)
    assert w.result.per_device == {"cpu:package-0": 300.0, "cpu:package-1": None}


def test_many_wraps_in_a_long_window_are_kept_by_the_thread(
    tmp_path: Path, no_gpu: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone = add_zone(tmp_path / "powercap", "intel-rapl:0", "package-0")
    monkeypatch.setattr(rapl.RaplPackage, "sample_seconds", 0.01)
    meter = no_gpu.meter()
    source: Any = meter.sources[0]
    with meter.window("w") as w:
        for _ in range(5):
            no_gpu.run(250)  # at 800 W
            burn(zone, 200_000)
            while source._zones[0].trail._value != int((zone / "energy_uj").read_text()):
                time.sleep(0.001)
    assert w.result.joules == 1_000_000.0
    meter.close()


def test_energy_that_only_root_may_read(root: Path, no_gpu: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    read_text = Path.read_text

    def refuse(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    with no_gpu.meter("cpu").window("w") as w:
        no_gpu.run(1)
    assert (w.result.joules, w.result.per_device) == (None, {"cpu": None})
    assert (
        "can be read only by root (since CVE-2020-8694); run as root, or allow reading with `sudo chmod a+r "
        in (w.result.warnings[0])
    )
    with pytest.raises(errors.PermissionDenied, match="CVE-2020-8694"):
        no_gpu.meter(cpu="require")


@pytest.mark.parametrize("content", ["", "many", None])
def test_a_broken_zone(tmp_path: Path, no_gpu: Fake, content: str | None) -> None:
    zone = add_zone(tmp_path / "powercap", "intel-rapl:0", "package-0")
    meter = no_gpu.meter("cpu")
    with meter.window("w") as w:
        if content is None:
            (zone / "energy_uj").unlink()
        else:
            (zone / "energy_uj").write_text(content)
    assert w.result.joules is None
    assert "expected a number of microjoules, got" in w.result.warnings[0]


def test_no_rapl(no_gpu: Fake) -> None:
    with no_gpu.meter("cpu").window("w") as w:
        no_gpu.run(1)
    assert w.result.joules is None
    assert "no RAPL packages under" in w.result.warnings[0]
    with pytest.raises(errors.NotSupported, match="usual in virtual machines and containers"):
        no_gpu.meter(cpu="require")
    with pytest.raises(errors.NotSupported):
        no_gpu.meter("cpu", require=True)


def test_the_cpu_beside_a_gpu_only_on_request(root: Path, fake: Fake) -> None:
    fake.board(watts=70)

    def window(cpu: str) -> dict[str, float | None]:
        with fake.meter(cpu=cpu).window("w") as w:
            burn(root / "intel-rapl:0", 20)
            burn(root / "intel-rapl:2", 3)
            fake.run(2)
        assert w.result.joules == sum(w.result.per_device.values())
        assert w.result.source == "nvml-counter"
        return w.result.per_device

    gpu = {T4[0]: 140.0}
    assert window("auto") == window("off") == gpu
    assert window("require") == {**gpu, "cpu:package-0": 20.0, "cpu:package-1": 3.0}


def test_a_gpu_that_was_asked_for_is_not_replaced_by_the_cpu(root: Path, no_gpu: Fake) -> None:
    assert no_gpu.meter("cuda:0").sources == []
    assert no_gpu.meter(cpu="off").sources == []


def test_a_broken_driver_is_said_beside_the_cpu(root: Path, fake: Fake) -> None:
    fake.fail("nvmlInitWithFlags", 18)
    with fake.meter().window("w") as w:
        burn(root / "intel-rapl:0", 20)
        burn(root / "intel-rapl:2", 3)
        fake.run(1)
    assert w.result.joules == 23.0
    assert "no GPU is metered" in w.result.warnings[0] and "reboot" in w.result.warnings[0]


def test_the_tick_is_observed(tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    zone = add_zone(tmp_path / "powercap", "intel-rapl:0", "package-0")
    fake.fail("nvmlInitWithFlags", 12)
    sleep = fake.clock.sleep

    def burn_and_sleep(seconds: float) -> None:
        sleep(seconds)
        if fake.now_us() % 2000 == 0:
            burn(zone, 0.1)

    monkeypatch.setattr(fake.clock, "sleep", burn_and_sleep)
    meter = fake.meter()
    assert meter.sources[0].tick == pytest.approx(0.002)
    burn(zone, 0.1)  # time has gone by until the fake's own tick
    with meter.window("w") as w:
        burn(zone, 10)
        fake.run(1)
    # one tick at the window's 10 W
    assert (w.result.joules, w.result.error_bound_joules) == (10.0, pytest.approx(0.02))
