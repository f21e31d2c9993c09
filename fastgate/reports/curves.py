"""What a report draws over the epochs: which quantities, from which lines, on which axes."""

import statistics
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from fastgate.reports.charts import Curve, Strip, draw_curves
from fastgate.reports.quantities import format_si
from fastgate.reports.runs import RunRecord, look_up


class Quantity(NamedTuple):
    """Something that is drawn over the epochs.

    Attributes:
        title: of its chart.
        path: where it stands in a record of `metrics.jsonl`.
        form: writes a number of the vertical axis.
        scale: of the vertical axis, see :func:`fastgate.reports.charts.draw_curves`.
    """

    title: str
    path: tuple[str, ...]
    form: Callable[[float], str]
    scale: Literal["zero", "range", "log"] = "zero"


class Track(NamedTuple):
    """A run or a control, as the charts show it.

    Attributes:
        style: CSS classes of its curves.
        control: whether it is one.
    """

    label: str
    run: RunRecord
    style: str
    control: bool


def _percent(share: float) -> str:
    return f"{share * 100:.4g}%"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s"


_ACCURACY = Quantity("Accuracy", ("eval", "accuracy"), _percent, "range")
JOULES = Quantity("Training joules per epoch", ("joules", "train"), lambda joules: format_si(joules, "J"))
QUANTITIES = (
    _ACCURACY,
    Quantity("Open gates", ("open_ratio",), _percent),
    Quantity("MACs per image, closed gates left out", ("macs",), format_si),
    Quantity("MACs computed per training image", ("macs_training", "per_image"), format_si),
    Quantity("Training seconds per epoch", ("seconds", "train"), _seconds),
    JOULES,
)
LOSSES = (
    Quantity("Task loss in training", ("train", "task"), lambda loss: f"{loss:.3g}", "log"),
    Quantity("Loss in evaluation", ("eval", "loss"), lambda loss: f"{loss:.3g}", "log"),
)
# of epochs, where there are enough of them: the part that the second chart of the accuracy shows
_LAST_PART, _ENOUGH = 1 / 3, 6
_LEAST_SPAN = 0.01  # of its axis


def draw(quantity: Quantity, tracks: Sequence[Track]) -> str | None:
    """The chart of a quantity; None where no run knows it."""
    curves = [Curve(track.style, _points(track.run, quantity.path)) for track in tracks]
    values = [y for curve in curves for _, y in curve.points]
    if not values:
        return None
    scale = quantity.scale
    if scale == "log" and min(values) <= 0:  # nothing left to lose: a logarithm could not show it
        scale = "zero"
    epochs = max(track.run.epochs for track in tracks)
    return draw_curves(curves, (1, epochs), quantity.form, scale=scale, strips=_strips(tracks))


def draw_last_accuracy(tracks: Sequence[Track]) -> tuple[str, str] | None:
    """Title and chart of the accuracy of the last third, on an axis of its own; None where it is too early for that.

    The axis spans at least a point. It leaves out drops that lie far below the rest (as Tukey's whiskers do: more
    than 1.5 quartile distances below the lower quartile), but never the value that a curve ends with.
    """
    epochs = max(track.run.epochs for track in tracks)
    first = epochs - round(epochs * _LAST_PART) + 1
    curves = [
        Curve(track.style, [point for point in _points(track.run, _ACCURACY.path) if point[0] >= first])
        for track in tracks
    ]
    values = [y for curve in curves for _, y in curve.points]
    if epochs < _ENOUGH or len(values) < 2:
        return None
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    whisker = min(value for value in values if value >= lower - 1.5 * (upper - lower))
    floor = min([whisker, max(values) - _LEAST_SPAN, *(curve.points[-1][1] for curve in curves if curve.points)])
    title = f"Accuracy, from epoch {first}"
    below = sum(value < floor for value in values)
    if below:
        title += f" ({below} lower {'value' if below == 1 else 'values'} not shown)"
    svg = draw_curves(curves, (first, epochs), _percent, scale="range", floor=floor, strips=_strips(tracks))
    return title, svg


def draw_gate_losses(tracks: Sequence[Track]) -> dict[str, str]:
    """Title -> chart of every gate loss that a run's recipe gives a weight, in the epochs of the search.

    Before and after it no gate learns, and the loss is not computed.
    """
    charts = {}
    for loss in dict.fromkeys(name for track in tracks for name in track.run.recipe.weights):
        curves = []
        for track in tracks:
            searched = {
                epoch for name, first, last in track.run.phases if name == "search" for epoch in range(first, last + 1)
            }
            weighted = track.run.recipe.weights.get(loss, "0") not in ("0", "0.0")
            points = _points(track.run, ("train", loss)) if weighted else []
            curves.append(Curve(track.style, [point for point in points if point[0] in searched]))
        if any(y for curve in curves for _, y in curve.points):
            epochs = max(track.run.epochs for track in tracks)
            title = f"{loss.capitalize()} loss, without its weight"
            charts[title] = draw_curves(curves, (1, epochs), lambda loss: f"{loss:.3g}", strips=_strips(tracks))
    return charts


def _points(run: RunRecord, path: tuple[str, ...]) -> list[tuple[float, float]]:
    values = [(line["epoch"], look_up(line, *path)) for line in run.history]
    return [(epoch, value) for epoch, value in values if value is not None]  # joules that were not metered


def _strips(tracks: Sequence[Track]) -> list[Strip]:
    """The phases of the runs, each course once: grey where all have the same, else in the first one's colour."""
    styles: dict[tuple[tuple[str, int, int], ...], str] = {}
    for track in tracks:
        if not track.control and track.run.phases:
            styles.setdefault(tuple(track.run.phases), track.style)
    return [Strip(style if len(styles) > 1 else "shared", phases) for phases, style in styles.items()]
