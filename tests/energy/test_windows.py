"""Windows used as they are not meant to be, by several threads, or after the meter was closed."""

import threading
import time

import pytest

from fastgate.energy import WindowOpenError
from fastgate.energy.errors import WindowClosedError
from tests.energy.fake import T4, T4_TOO, Fake

AAAA, BBBB = T4[0], T4_TOO[0]


def test_laps_from_threads_count_everything_once(fake: Fake) -> None:
    fake.board(watts=50)
    meter = fake.meter()
    laps: list[int | None] = []

    def take_laps() -> None:
        for _ in range(100):
            laps.append(meter.lap().microjoules)

    with meter.window("w") as w:
        threads = [threading.Thread(target=take_laps) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            fake.run(0.1)
            time.sleep(0.0005)
        for thread in threads:
            thread.join()
    laps.append(meter.lap().microjoules)
    assert None not in laps
    # what came before the window, while the tick was learned, is in the first lap
    assert sum(lap or 0 for lap in laps) == meter.total.microjoules
    assert meter.total.microjoules == pytest.approx(w.result.microjoules, abs=50e6)


def test_a_window_entered_inside_itself(fake: Fake) -> None:
    fake.board(watts=50)
    window = fake.meter().window("w")
    with window as w:
        fake.run(3)
        with (
            pytest.raises(WindowOpenError, match="window 'w' is already open: end it before beginning it again"),
            window,
        ):
            pytest.fail("the block of the second one ran")
        with pytest.raises(WindowOpenError, match="is already open"):
            window.begin()
        fake.run(2)
    assert w.result.joules == 250.0


def test_a_lap_after_the_end(fake: Fake) -> None:
    fake.board(watts=50)
    meter = fake.meter()
    with pytest.raises(WindowOpenError, match="window 'w' has not begun"):
        meter.window("w").lap()
    with meter.window("w") as w:
        fake.run(3)
    with pytest.raises(WindowClosedError, match="window 'w' has ended: take laps before its end, or begin it again"):
        w.lap()
    assert w.result.joules == 150.0 and w.laps == []


def test_a_meter_that_was_closed(fake: Fake) -> None:
    fake.board(watts=50)
    meter = fake.meter()
    unused = meter.window("unused")
    fake.run(2)
    meter.lap()
    with meter.window("open") as w:
        fake.run(3)
        meter.close()
    assert w.result.joules is None and w.result.per_device == {AAAA: None}
    assert f"{AAAA}: the meter was closed inside the window" in w.result.warnings
    for use in (lambda: meter.window("w"), lambda: meter.begin("w"), meter.lap, unused.begin):
        with pytest.raises(WindowClosedError, match="this meter was closed: create another EnergyMeter"):
            use()
    assert meter.total.microjoules == pytest.approx(100e6, abs=30e6)  # what it has metered is still known
    assert w.end() is w.result


def test_print_says_what_is_metered(fake: Fake) -> None:
    fake.board(T4)
    fake.board(T4_TOO, counter=False, instant=False)
    fake.fail("nvmlDeviceGetPowerUsage", 3)
    meter = fake.meter()
    assert str(meter) == (
        f"<EnergyMeter: {AAAA} (Tesla T4) by nvml-counter; {BBBB} not metered: nvmlDeviceGetPowerUsage: this board "
        "does not offer the reading>"
    )
    meter.close()
    assert str(meter).startswith("<EnergyMeter, closed: ")
    assert str(fake.meter("cpu", cpu="off")) == (
        "<EnergyMeter: nothing metered; nothing is metered: no GPU was requested, and cpu is 'off'>"
    )
