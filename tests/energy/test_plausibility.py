"""What a board's counter or its power says wrongly: None with the reason where impossible, a warning where doubtful."""

import pytest

from fastgate.energy import Energy, EnergyError, EnergyMeter
from fastgate.energy.sources import NvmlCounter
from tests.energy.fake import T4, T4_TOO, Fake
from tests.energy.test_fallbacks import hold_samplers

AAAA, BBBB = T4[0], T4_TOO[0]
ALL_ONES = 2**64 - 1


def running(fake: Fake, watts: float = 50.0, seconds: float = 1000.0) -> EnergyMeter:
    """A meter on a board that has been running for a while."""
    fake.board(watts=watts)
    meter = fake.meter()
    fake.run(seconds)
    meter.lap()
    return meter


def holds(result: Energy, joules: float) -> bool:
    """Whether these are the true joules, as far as the result says anything."""
    assert result.joules is not None and result.error_bound_joules is not None
    return abs(result.joules - joules) <= result.error_bound_joules + 0.002


def test_a_reset_that_grows_past_its_start_contradicts_the_power(fake: Fake) -> None:
    fake.board(watts=70)
    meter = fake.meter()
    fake.set_counter_mj(0, 805e3)
    fake.run(0.1)
    meter.lap()
    with meter.window("w") as w:
        fake.set_counter_mj(0, 0)
        fake.run(20)
    # 595 J of 1400
    assert w.result.joules == pytest.approx(1400 - 805, abs=10) and holds(w.result, 1400)
    assert "is below the power readings in the window (70 to 70 W)" in w.result.warnings[0]
    assert "was reset, or stalled" in w.result.warnings[0]


def test_a_counter_that_stands_still_and_catches_up(fake: Fake) -> None:
    meter = running(fake)
    fake.set_stalled(0, 1)
    with meter.window("stalled") as stalled:
        fake.run(10)
    with meter.window("catches up") as late:
        fake.set_stalled(0, 0)
        fake.run(10)
    with meter.window("afterwards") as after:
        fake.run(10)
    assert (stalled.result.joules, stalled.result.microjoules) == (None, None)
    assert "nothing was counted in 10 s, much longer than a tick (100 ms): it has stalled" in stalled.result.warnings[0]
    assert late.result.joules == 1000.0 and holds(late.result, 500)
    assert "the counter had not changed for 10 s when the window began" in late.result.warnings[0]
    assert (after.result.joules, after.result.warnings) == (500.0, ())


def test_a_window_around_a_stall_is_right(fake: Fake) -> None:
    meter = running(fake)
    with meter.window("w") as w:
        fake.set_stalled(0, 1)
        fake.run(10)
        w.lap()
        fake.set_stalled(0, 0)
        fake.run(10)
    assert [lap.joules for lap in w.laps] == [None, 1000.0]
    assert (w.result.joules, w.result.warnings) == (1000.0, ())


def test_a_stall_that_begins_or_ends_inside_a_window_is_in_its_bound(fake: Fake) -> None:
    meter = running(fake)
    with meter.window("stalls") as stalls:
        fake.run(8)
        fake.set_stalled(0, 1)
        fake.run(2)
    with meter.window("catches up") as late:
        fake.set_stalled(0, 0)
        fake.run(10)
    assert (stalls.result.joules, late.result.joules) == (400.0, 600.0)
    assert holds(stalls.result, 500) and holds(late.result, 500)
    assert stalls.result.warnings == late.result.warnings == ()


@pytest.mark.parametrize(
    ("counter", "reason"),
    [(5e6, "jumped by 4.95e+06 J in 10 s, but at most 140 W are possible"), (50e3 - 1e-3, "backwards")],
    ids=["jump", "a-millijoule-back"],
)
def test_a_counter_that_jumps(fake: Fake, counter: float, reason: str) -> None:
    meter = running(fake)
    fake.set_counter_mj(0, 50e6)
    meter.lap()
    with meter.window("jump") as w:
        fake.run(10)
        fake.set_counter_mj(0, counter * 1e3)
    assert (w.result.joules, w.result.microjoules, w.result.per_device) == (None, None, {AAAA: None})
    assert reason in w.result.warnings[0]
    fake.run(1)
    meter.lap()  # after a millijoule back it may have been the one reading that was wrong: the next is doubted too
    with meter.window("afterwards") as w:
        fake.run(10)
    assert (w.result.joules, w.result.warnings) == (500.0, ())


@pytest.mark.parametrize("fault", [0, 120e3, -120e3])
def test_what_hides_behind_a_change_of_power_is_seen_where_the_counter_is_watched(fake: Fake, fault: float) -> None:
    """The mean lies between the power at both edges all the same."""
    fake.board(watts=20)
    meter = fake.meter()

    def watched(seconds: float) -> None:
        for _ in range(round(seconds / NvmlCounter.sample_seconds)):
            fake.run(NvmlCounter.sample_seconds)
            meter.sources[0].read()

    watched(20)
    with meter.window("w") as w:
        watched(10)
        fake.set_watts(0, 60)
        watched(10)
        fake.set_counter_mj(0, fake.exact_mj(0) + fault)
        watched(1)
    result = w.result
    if fault == 0:
        assert result.joules == pytest.approx(860, abs=10) and result.warnings == ()
        assert holds(result, 860) and result.error_bound_joules is not None and result.error_bound_joules < 20
    else:
        assert result.joules is None or (holds(result, 860) and "counter" in result.warnings[0])


def test_a_jump_that_is_possible_warns(fake: Fake) -> None:
    meter = running(fake)
    with meter.window("w") as w:
        fake.run(10)
        fake.set_counter_mj(0, fake.exact_mj(0) + 150e3)
    assert w.result.joules == 650.0 and holds(w.result, 500)
    assert "is above the power readings in the window (50 to 50 W)" in w.result.warnings[0]
    with meter.window("w") as w:
        fake.run(10)
        fake.set_counter_mj(0, fake.exact_mj(0) + 400e3)
    assert w.result.joules == 900.0
    assert "a mean of 90 W is implausible: the device stays below 84 W" in w.result.warnings[0]


@pytest.mark.parametrize("glitch", [ALL_ONES, 0], ids=["all-ones", "zero"])
@pytest.mark.parametrize("edge", ["begin", "end"])
def test_one_glitched_reading_of_the_counter(fake: Fake, glitch: int, edge: str) -> None:
    meter = running(fake)
    if edge == "begin":
        fake.glitch_energy(0, glitch)
    with meter.window("glitched") as w:
        fake.run(2)
        if edge == "end":
            fake.glitch_energy(0, glitch)
    assert w.result.joules is None and w.result.per_device == {AAAA: None}
    assert ("jumped by" if (edge == "begin") == (glitch == 0) else "went backwards") in w.result.warnings[0]
    with meter.window("good again") as w:
        fake.run(2)
        w.lap()
    assert edge == "end" or w.result.joules == 100.0


def test_a_first_reading_of_zero(fake: Fake) -> None:
    fake.board(watts=50)
    fake.set_counter_mj(0, 50_000e3)
    fake.glitch_energy(0, 0)  # by the question whether there is a counter at all
    fake.meter()
    fake.glitch_energy(0, 0)
    meter = fake.meter()
    assert meter.total.microjoules == 0
    with meter.window("w") as w:
        fake.run(5)
    assert (w.result.joules, w.result.warnings) == (250.0, ())
    fake.run(1.5)
    assert meter.lap().joules == pytest.approx(50 * 6.5, abs=10)


@pytest.mark.parametrize("edge", ["begin", "end"])
def test_a_glitched_power_at_an_edge_makes_no_bound(fake: Fake, edge: str) -> None:
    meter = running(fake)
    fake.glitch_power(0, 2**32 - 1) if edge == "begin" else None
    with meter.window("w") as w:
        fake.run(5)
        fake.glitch_power(0, 2**32 - 1) if edge == "end" else None
    assert w.result.joules == 250.0 and w.result.error_bound_joules == pytest.approx(7)
    assert "the power was not readable at both ends" in w.result.warnings[0]


def test_one_glitched_sample_of_the_power(fake: Fake) -> None:
    fake.board(watts=50, counter=False)
    meter = fake.meter()
    hold_samplers(meter)
    with meter.window("w") as w:
        for i in range(42):
            fake.run(0.05)
            if i == 20:
                fake.glitch_power(0, 2**32 - 1)
                with pytest.raises(EnergyError, match=r"a power reading of 4.29497e\+06 W is a glitch"):
                    meter.sources[0].read()
            else:
                meter.sources[0].read()
    assert w.result.joules == pytest.approx(105) and holds(w.result, 105)
    assert w.result.error_bound_joules < 15
    fake.glitch_power(0, 2**32 - 1)
    with meter.window("from a glitch") as w:
        fake.run(1)
    assert w.result.joules is None and "is a glitch: only 140 W are possible" in w.result.warnings[0]


def test_slow_readings_are_in_the_bound_and_said(fake: Fake) -> None:
    meter = running(fake)
    with meter.window("w") as w:
        fake.run(5)
        fake.set_slowness_us(2_000_000)
    assert w.result.joules == 350.0 and holds(w.result, 250)
    assert any("of readings besides the 5 s of the window" in warning for warning in w.result.warnings)


def test_many_boards_that_are_slow_to_read(fake: Fake) -> None:
    for i in range(8):
        fake.board((f"GPU-{i}", "Tesla T4", f"00000000:00:1{i}.0"), 25.0)
    meter = fake.meter()
    fake.set_slowness_us(100_000)
    meter.lap()
    with meter.window("w") as w:
        fake.run(1)
    assert w.result.joules is not None and w.result.joules > 400 and holds(w.result, 200)
    assert any("of readings besides the" in warning for warning in w.result.warnings)


def test_power_between_samples_that_are_apart(fake: Fake) -> None:
    fake.board(watts=20, counter=False)
    meter = fake.meter()
    hold_samplers(meter)
    exact = fake.exact_mj(0)
    with meter.window("w") as w:
        for _ in range(5):  # bursts that no sample sees
            fake.run(0.7, 70)
            fake.run(0.2, 20)
            meter.sources[0].read()
    exact = (fake.exact_mj(0) - exact) / 1e3
    assert w.result.joules == pytest.approx(90) and exact > 250 and holds(w.result, exact)
    assert "power was not sampled for 4.5 s" in w.result.warnings[0]


def test_a_board_without_a_counter_that_is_lost_for_a_moment(fake: Fake) -> None:
    fake.board(watts=60, counter=False)
    meter = fake.meter()
    hold_samplers(meter)
    exact = fake.exact_mj(0)
    with meter.window("w") as w:
        for i in range(60):
            fake.run(0.05, 5 if 20 <= i < 38 else 60)
            if not 20 <= i < 38:
                meter.sources[0].read()
    assert holds(w.result, (fake.exact_mj(0) - exact) / 1e3)
    assert "power was not sampled for 0.95 s (a suspended or starved process, or a lost device)" in w.result.warnings[0]


def test_one_of_two_boards_that_stands_still_makes_the_sum_unknown(fake: Fake) -> None:
    fake.board(T4, 30)
    fake.board(T4_TOO, 70)
    meter = fake.meter()
    with meter.window("w") as w:
        fake.set_stalled(1, 1)
        fake.run(10)
    assert (w.result.joules, w.result.microjoules, w.result.source) == (None, None, "unavailable")
    assert w.result.per_device == {AAAA: 300.0, BBBB: None}


def test_a_burst_in_the_last_tick_is_in_the_bound(fake: Fake) -> None:
    meter = running(fake, 10.0)
    exact = fake.exact_mj(0)
    with meter.window("w") as w:
        fake.run(3)
        fake.run(0.09, 70)
    assert w.result.joules == 30.0 and holds(w.result, (fake.exact_mj(0) - exact) / 1e3)
