"""The energy of one source between two readings, and checks of its plausibility."""

from dataclasses import dataclass

from fastgate.energy.errors import EnergyError
from fastgate.energy.sources import Reading, Source
from fastgate.energy.trail import could_be

# below this many ticks of a counter a window is mostly noise: 2.8 % (95th percentile) at 20 ticks, 11 % at 5
_ENOUGH_TICKS = 20
# a counter that does not change for this many ticks, or seconds if its tick is unknown, has stalled
_STILL_TICKS, _STILL_SECONDS = 5, 5.0
# on average a board stays below its limit, and sensors are off by up to 13 % (reference data in the nvidia-smi study)
_OVER_LIMIT = 1.2
# counter and power readings differ by up to 10 % on healthy boards; beyond this they contradict each other
_CONTRADICTION = 0.25
# fraction of the energy: half of the sensors' own error
_HIDDEN = 0.05
# readings that take more than this fraction of a window are reported
_SLOW_SHARE = 0.1


@dataclass(frozen=True)
class Span:
    """The time of a window, from before its first readings to after its last.

    Attributes:
        begin, begun: seconds; the first readings were taken between these times.
        end, ended: seconds; the last readings were taken between these times.
    """

    begin: float
    begun: float
    end: float
    ended: float

    @property
    def seconds(self) -> float:
        """The duration, from the start of the first readings to the start of the last."""
        return self.end - self.begin


@dataclass(frozen=True)
class Spent:
    """Microjoules of one source (None if unknown), an error bound in joules, and warnings."""

    microjoules: int | None
    bound: float | None = None
    warnings: tuple[str, ...] = ()


def spent_between(source: Source, begin: Reading | EnergyError, end: Reading | EnergyError, span: Span) -> Spent:
    """Energy between two readings; unknown, with the reason, if it is invalid or impossible."""
    if isinstance(begin, EnergyError):
        return Spent(None, None, (str(begin),))
    if isinstance(end, EnergyError):
        return Spent(None, None, (str(end),))
    if begin.breaks != end.breaks:
        return Spent(None, None, (end.reason,))
    microjoules = end.microjoules - begin.microjoules
    seconds = (end.before + end.after - begin.before - begin.after) / 2
    seen = [reading.watts for reading in (begin, end) if reading.watts is not None]
    most = max(seen, default=0.0)
    if microjoules == 0:
        return _nothing(source, seconds)
    joules = microjoules / 1e6
    possible = max(source.possible_watts, 2 * most)
    if not could_be(microjoules, end.after - begin.before, possible, source.tick):
        return Spent(None, None, (f"{joules:.6g} J in {seconds:.3g} s are impossible: more than {possible:.4g} W",))

    mean = joules / seconds if seconds > 0 else 0.0
    highest = max(mean, source.limit_watts or 0.0, most)
    bound = source.error_bound(begin, end, highest)
    warnings = [*_doubts(source, begin, end, mean, seconds), *_slowness(begin, end, span)]
    if bound is not None:
        if source.reads_power and len(seen) == 2:
            unrest = end.unrest_joules - begin.unrest_joules
            lowest = end.lowest_joules - begin.lowest_joules - unrest
            most_joules = end.highest_joules - begin.highest_joules + unrest
            beyond = min(joules - lowest, 0.0) + max(joules - most_joules, 0.0)
            warnings += _contradictions(mean, beyond, bound, seconds, (max(lowest, 0.0), most_joules))
            # changes in power can hide a counter fault of this size, up to half of the sensors' own error
            bound = max(bound, abs(beyond)) + min(unrest, _HIDDEN * joules)
        # energy used while the meter was reading is in the difference, but not in the window
        bound += highest * (max(span.begun - begin.before, 0.0) + max(end.after - span.end, 0.0))
    return Spent(microjoules, bound, tuple(warnings))


def _nothing(source: Source, seconds: float) -> Spent:
    """Result for a source whose counter did not move."""
    tick = "a tick" if source.tick is None else f"a tick ({source.tick * 1e3:.3g} ms)"
    if seconds > (_STILL_SECONDS if source.tick is None else _STILL_TICKS * source.tick):
        return Spent(None, None, (f"nothing was counted in {seconds:.3g} s, much longer than {tick}: it has stalled",))
    return Spent(0, None, (f"nothing was counted in {seconds:.3g} s: shorter than {tick} of the counter",))


def _doubts(source: Source, begin: Reading, end: Reading, mean: float, seconds: float) -> list[str]:
    """Reasons for doubt that do not depend on the contradiction between counter and power."""
    doubts = []
    tick = source.tick
    if tick is None:
        doubts.append("the counter's update interval was not observed, so the error bound is unknown")
    elif seconds < _ENOUGH_TICKS * tick:
        doubts.append(
            f"the window of {seconds:.3g} s is shorter than {_ENOUGH_TICKS} ticks of {tick * 1e3:.3g} ms; "
            "make it longer, or repeat the work in it"
        )
    for edge, reading in (("began", begin), ("ended", end)):
        if tick is not None and reading.still_seconds > _STILL_TICKS * tick:
            doubts.append(f"the counter had not changed for {reading.still_seconds:.3g} s when the window {edge}")
    blind = end.blind_seconds - begin.blind_seconds
    if blind > 0:
        unseen = "the counter was not read" if source.kind == "rapl" else "power was not sampled"
        doubts.append(f"{unseen} for {blind:.3g} s (a suspended or starved process, or a lost device)")
    limit = source.possible_watts if source.limit_watts is None else _OVER_LIMIT * source.limit_watts
    if mean > max(limit, begin.watts or 0.0, end.watts or 0.0):  # if power readings agree, the limit must be wrong
        doubts.append(f"a mean of {mean:.4g} W is implausible: the device stays below {limit:.4g} W")
    if source.reads_power and (begin.watts is None or end.watts is None):
        doubts.append("the power was not readable at both ends of the window, so the counter is not checked against it")
    return doubts


def _slowness(begin: Reading, end: Reading, span: Span) -> list[str]:
    reading = max(span.begun - begin.before, 0.0) + max(end.after - span.end, 0.0)
    if reading <= _SLOW_SHARE * span.seconds:
        return []
    return [f"the energy includes {reading:.3g} s of readings besides the {span.seconds:.3g} s of the window"]


def _contradictions(
    mean: float, beyond: float, bound: float, seconds: float, between: tuple[float, float]
) -> list[str]:
    """`beyond`: joules by which the counter is below (negative) or above the energy implied by the power readings."""
    if abs(beyond) - bound <= _CONTRADICTION * between[beyond > 0]:
        return []
    side, why = ("below", "was reset, or stalled") if beyond < 0 else ("above", "jumped, or caught up")
    lowest, highest = (joules / seconds for joules in between)
    return [
        f"a mean of {mean:.4g} W is {side} the power readings in the window ({lowest:.4g} to {highest:.4g} W): the "
        f"power changed between readings, or the counter {why}"
    ]
