"""Energies added up over time and over processes: part of a sum is never the sum."""

from fastgate.energy import Energy
from fastgate.energy.sums import add_energies, add_parts
from fastgate.energy.timeline import Timeline
from tests.energy.fake import T4, T4_TOO, Fake

A, B = "GPU-A", "GPU-B"


def energy(devices: dict[str, float | None], *, unknown: bool = False, seconds: float = 1.0) -> Energy:
    """A window in which devices used so many joules; None: its counter did not move, or, if `unknown`, nobody knows."""
    total = None if unknown else round(sum(joules or 0 for joules in devices.values()) * 1e6)
    bound = None if unknown else 0.5
    sources = dict.fromkeys(devices, "nvml-counter")
    return Energy("w", seconds, None, devices, sources, total, bound, (f"said of {len(devices)}",))


def test_parts_that_are_known_add_up() -> None:
    total = add_parts([energy({A: 100, B: 200}), energy({A: 50, B: 60}, seconds=2.0)])
    assert (total.joules, total.seconds, total.error_bound_joules) == (410, 3.0, 1.0)
    assert total.per_device == {A: 150, B: 260} and total.warnings == ("said of 2",)


def test_a_counter_that_moves_in_a_later_part_is_known() -> None:
    total = add_parts([energy({A: 100, B: None}), energy({A: 50, B: 260})])
    assert (total.joules, total.per_device) == (410, {A: 150, B: 260})


def test_a_counter_that_moves_in_no_part_is_not() -> None:
    total = add_parts([energy({A: 100, B: None}), energy({A: 200, B: None})])
    assert (total.joules, total.per_device) == (None, {A: 300, B: None})


def test_one_unknown_part_makes_the_sum_and_its_device_unknown() -> None:
    total = add_parts([energy({A: 100, B: 500}), energy({A: 200, B: None}, unknown=True)])
    assert (total.joules, total.microjoules, total.error_bound_joules) == (None, None, None)
    assert total.per_device == {A: 300, B: None}


def test_processes_that_share_some_of_their_devices() -> None:
    total = add_energies([("m", energy({A: 100, B: 200})), ("m", energy({B: 201}))])
    assert (total.joules, total.per_device) == (300, {A: 100, B: 200})
    # one of them could not read it
    total = add_energies([("m", energy({A: None}, unknown=True)), ("m", energy({A: 100}))])
    assert (total.joules, total.per_device) == (100, {A: 100})


def test_a_process_that_meters_nothing_makes_the_sum_unknown() -> None:
    total = add_energies([("m", energy({A: 100})), ("m", energy({}, unknown=True))])
    assert (total.joules, total.per_device) == (None, {A: 100})


def test_a_board_whose_counter_stands_still_through_a_phase(fake: Fake) -> None:
    fake.board(T4, 30)
    fake.board(T4_TOO, 70)
    meter = fake.meter()
    timeline = Timeline(meter)
    fake.set_stalled(1, 1)
    for _ in range(25):  # laps too short to tell that it stands still
        fake.run(0.4)
        timeline.end_phase("train")
    assert timeline.collect("train")["joules"] is None
    fake.set_stalled(1, 0)
    fake.run(0.2)
    timeline = Timeline(meter)
    for _ in range(25):
        fake.run(0.4)
        timeline.end_phase("train")
    assert timeline.collect("train")["joules"] == 1000.0
