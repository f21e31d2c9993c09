import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgate.schedules import LAMBDA_UP, Piecewise, parse, stretch


@pytest.mark.parametrize(
    ("epoch", "value"),
    [(0, 0), (124, 0), (124.999, 0), (125, 2), (189.9, 2), (190, 3), (349, 3), (1e6, 3), (-1, 0)],
)
def test_the_papers_rising_lambda(epoch: float, value: float) -> None:
    assert LAMBDA_UP(epoch) == value


@pytest.mark.parametrize(
    ("epoch", "value"), [(0, 5), (9.9, 5), (10, 5), (19.9, 5), (20, 7), (29.9, 7), (30, 1), (31, 1)]
)
def test_steps_hold_the_value_of_the_last_point(epoch: float, value: float) -> None:
    # before the first point: its value
    assert parse("10:5, 20:7, 30:1")(epoch) == value


@pytest.mark.parametrize(
    ("epoch", "value"), [(0, 1), (10, 1), (20, 0.875), (30, 0.75), (50, 0.5), (55, 0.75), (60, 1), (99, 1)]
)
def test_ramps_are_straight_between_points_and_constant_outside(epoch: float, value: float) -> None:
    # dyadic values, so the arithmetic is exact
    assert parse("10:1 -> 50:0.5 -> 60:1")(epoch) == value


@pytest.mark.parametrize("text", ["2.5", 2.5, " 2.5 ", "0:2.5", "7 : 2.5"])
def test_one_number_is_a_constant(text: str | float) -> None:
    schedule = parse(text)
    assert [schedule(epoch) for epoch in (-1, 0, 3.5, 300)] == [2.5] * 4


def test_spaces_signs_and_exponents_are_read() -> None:
    assert parse("0:1e-3,  10 : -2E1").points == ((0.0, 1e-3), (10.0, -20.0))
    assert parse(3).points == ((0.0, 3.0),)


@pytest.mark.parametrize(
    "text",
    [
        "",  # nothing
        "fast",  # no number
        "0:1, 5",  # a point without a value
        "0:1, 5:2,",  # a comma too many
        "0:1:2",
        "5:1, 5:2",  # epochs that do not increase
        "5:1, 3:2",
        "5:1 -> 3:2",
        "0:1 -> 5:2, 7:3",  # steps and ramps mixed
        "0:1 -> ",
        "0:e, 1:2",  # digits alone do not make a number
    ],
)
def test_anything_else_is_refused_with_the_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"schedule: expected a number, steps .* or a ramp .* got") as caught:
        parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("points", [(), ((1.0, 0.0), (1.0, 2.0)), ((2.0, 0.0), (1.0, 2.0))])
def test_points_must_increase(points: tuple) -> None:
    with pytest.raises(ValueError, match="points: expected at least one, with increasing epochs"):
        Piecewise(points)


numbers = st.floats(-1e6, 1e6)
points = st.dictionaries(st.integers(-1000, 1000), numbers, min_size=1, max_size=6).map(
    lambda values: tuple((float(epoch), values[epoch]) for epoch in sorted(values))
)


@given(points, st.floats(-2000, 2000))
def test_a_ramp_stays_between_its_smallest_and_largest_value(points: tuple, epoch: float) -> None:
    values = [value for _, value in points]
    got = Piecewise(points, linear=True)(epoch)
    # interpolation of numbers up to 1e6 rounds to within a few ulp, 1e-9
    assert min(values) - 1e-9 <= got <= max(values) + 1e-9


@given(points, st.floats(-2000, 2000))
def test_steps_take_only_the_values_given(points: tuple, epoch: float) -> None:
    schedule = Piecewise(points)
    wanted = next((value for start, value in reversed(points) if start <= epoch), points[0][1])
    assert schedule(epoch) == wanted


@given(points)
def test_both_kinds_meet_every_point(points: tuple) -> None:
    for linear in (False, True):
        schedule = Piecewise(points, linear)
        assert all(math.isclose(schedule(epoch), value, abs_tol=1e-9) for epoch, value in points)


@given(points, st.booleans())
def test_text_says_the_same_as_points(points: tuple, linear: bool) -> None:
    text = (" -> " if linear else ", ").join(f"{epoch!r}:{value!r}" for epoch, value in points)
    schedule = parse(text)
    assert schedule.points == points
    # one point is a constant either way
    assert len(points) == 1 or schedule.linear == linear


@pytest.mark.parametrize("text", ["0:1, 60:0.1, 120:0.01", "10:1 -> 50:0.5", "0.3"])
def test_a_stretched_schedule_has_the_same_values_at_the_same_share_of_the_epochs(text: str) -> None:
    schedule, stretched = parse(text), parse(stretch(text, 1.5))
    for epoch in (0, 9.5, 10, 30, 59.9, 60, 61, 200):
        assert stretched(1.5 * epoch) == pytest.approx(schedule(epoch), rel=1e-9)
