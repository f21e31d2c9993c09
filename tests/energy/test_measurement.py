"""`measure_energy` on the stand-in: joules per call, functions that take turns."""

from typing import Any

import pytest
from torch import nn

import fastgate as fg
from fastgate.energy.errors import WindowClosedError
from tests.energy.fake import Fake


def test_one_function(fake: Fake) -> None:
    fake.board(watts=50)
    calls = []

    def step() -> None:
        calls.append(fake.now_us())
        fake.run(0.5)

    meter = fake.meter()
    results = fg.measure_energy(step, min_seconds=10.0, trials=3, warmup=2, meter=meter)
    assert len(calls) == 2 + 3 * 20
    assert [(r.name, r.items, r.seconds, r.joules, r.joules_per_item) for r in results] == [
        ("step", 20, 10.0, 500.0, 25.0)
    ] * 3


def test_several_functions_take_turns(fake: Fake) -> None:
    fake.board(watts=50)
    log: list[str] = []

    def dense() -> None:
        log.append("dense")
        fake.run(2, watts=60)

    def pruned() -> None:
        log.append("pruned")
        fake.run(1, watts=40)

    options: dict[str, Any] = {"min_seconds": 6, "trials": 2, "warmup": 1, "meter": fake.meter()}
    results = fg.measure_energy([dense, pruned], **options)
    turns = [*["dense"] * 3, *["pruned"] * 6]
    assert log == ["dense", "pruned", *turns, *turns]
    assert [r.name for r in results] == ["dense", "pruned"] * 2
    assert [r.joules_per_item for r in results[0::2]] == [120.0] * 2
    assert [r.joules_per_item for r in results[1::2]] == [40.0] * 2
    named = fg.measure_energy({"a": dense, "b": pruned}, **options)
    assert [r.name for r in named] == ["a", "b"] * 2


def test_a_trial_lasts_50_ticks_of_a_slow_counter(fake: Fake) -> None:
    fake.board(watts=50, tick=0.1)
    (result,) = fg.measure_energy(lambda: fake.run(1), min_seconds=0.01, trials=1, warmup=0, meter=fake.meter())
    assert (result.seconds, result.items, result.warnings) == (5.0, 5, ())


def test_a_slow_function_is_called_once_per_trial_and_waited_for_once(fake: Fake) -> None:
    fake.board(watts=50)
    waits = []
    meter = fake.meter(synchronize=lambda: waits.append(1))
    waits.clear()
    results = fg.measure_energy(lambda: fake.run(30), min_seconds=5, trials=2, warmup=0, meter=meter)
    assert [r.items for r in results] == [1, 1]
    assert len(waits) == 4  # begin and end of each trial


def test_where_nothing_can_be_metered_it_is_said_at_once(fake: Fake) -> None:
    fake.fail("nvmlInitWithFlags", 12)
    meter = fake.meter("cuda:0")
    calls: list[int] = []

    def step() -> None:
        calls.append(fake.now_us())
        fake.run(30)

    with pytest.warns(UserWarning, match=r"nothing can be metered, .* cuda:0 not metered: .*driver") as said:
        results = fg.measure_energy(step, trials=2, meter=meter)
    assert said[0].filename == __file__
    # one call per trial, for the time
    assert [(r.joules, r.seconds, r.items) for r in results] == [(None, 30.0, 1)] * 2 and len(calls) == 2
    assert "install the NVIDIA driver" in results[0].warnings[0]


def test_a_board_that_is_lost_before_the_trials_is_said_at_once(fake: Fake) -> None:
    fake.board(watts=50)
    meter = fake.meter()
    fake.set_error(0, 15)
    with pytest.warns(UserWarning, match="nothing can be metered"):
        (result,) = fg.measure_energy(lambda: fake.run(0.01), trials=1, meter=meter)
    assert result.joules is None and result.seconds == pytest.approx(0.05, abs=0.01)
    assert "fell off the bus" in result.warnings[0]


def test_its_own_meter_is_closed(fake: Fake) -> None:
    with pytest.warns(UserWarning, match="nothing can be metered"):
        results = fg.measure_energy(lambda: None, min_seconds=0.01, trials=1)
    assert results[0].seconds >= 0.01 and fake.references() == 0


def with_argument(x: object) -> object:
    return x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "fn: expected at least one function"),
        ((3,), "fn: expected functions without arguments, got 3"),
        ((with_argument,), "fn: expected functions without arguments, got with_argument, which requires some"),
        ((nn.Linear(2, 2),), r"got Linear, which requires some: pass `lambda: f\(x\)`"),
        (([print, nn.Sequential(nn.Linear(2, 2))],), "got Sequential, which requires some"),
        ((print, float("inf")), "min_seconds: expected a finite duration, got inf"),
        ((print, float("nan")), "min_seconds: expected a duration above 0, got nan"),
        ((print, "5"), "min_seconds: expected a number of seconds, got '5'"),
        ((print, True), "min_seconds: expected a number of seconds, got True"),
        ((print, 1, True), "trials: expected an integer of at least 1, got True"),
        ((print, 0), "min_seconds: expected a duration above 0, got 0"),
        ((print, 1, 0), "trials: expected an integer of at least 1, got 0"),
        ((print, 1, 1, -1), "warmup: expected an integer of at least 0, got -1"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fg.measure_energy(*arguments)


def test_a_meter_that_is_none_or_closed(fake: Fake) -> None:
    fake.board()
    meter = fake.meter()
    meter.close()
    with pytest.raises(WindowClosedError, match="this meter was closed: create another EnergyMeter"):
        fg.measure_energy(print, meter=meter)
    with pytest.raises(TypeError, match="meter: expected an EnergyMeter or None, got 'cuda'"):
        fg.measure_energy(print, meter="cuda")  # type: ignore[arg-type]
