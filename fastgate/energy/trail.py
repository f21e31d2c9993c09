"""A counter followed from reading to reading, each believed as far as the power that it implies is possible."""

import math

# a counter whose renewal was not observed may lag so far behind; one that is renewed every so often, some of its ticks
_LATE_SECONDS, _LATE_TICKS = 1.0, 5


def could_be(microjoules: int, seconds: float, possible_watts: float, tick: float | None) -> bool:
    """Whether a device that draws `possible_watts` at most can have used so much between two readings of its counter.

    Args:
        microjoules: what the counter says.
        seconds: from before the first reading to after the second.
        possible_watts: on average.
        tick: seconds between two changes of the counter, None where unknown; what it lagged behind comes in addition.
    """
    late = _LATE_SECONDS if tick is None else min(_LATE_SECONDS, _LATE_TICKS * tick)
    return microjoules <= possible_watts * (seconds + late) * 1e6


class Trail:
    """The energy that a counter has counted since its first reading, in steps that are possible.

    What is no possible step (a reset, a jump, a glitch, time enough to wrap unseen) breaks the trail: it counts as 0,
    and no difference across it is an energy. The trail goes on from there.

    Args:
        possible_watts: the device never draws more.
        wraps_at: microjoules at which the counter starts over from 0; None: never.

    Attributes:
        microjoules: the sum of the believed steps.
        breaks: how often the trail broke.
        reason, broken_at: why and when it last did.
        doubt_microjoules: by how much the sum may be off: a reset close to where a counter wraps looks like a wrap, and
            then as much may have been used as at twice the pace before.
        still_seconds: for how long, up to the latest reading, all readings have shown the same value.
    """

    def __init__(self, possible_watts: float, wraps_at: int | None = None) -> None:
        self._possible_watts = possible_watts
        self._wraps_at = wraps_at
        self._value: int | None = None
        self._read_at = self._changed_at = 0.0
        self._watts = 0.0
        self._pace = 0.0  # microjoules a second, of the latest step
        self._left: tuple[int, float] | None = None  # value and moment before the latest step backwards
        self.microjoules = self.breaks = self.doubt_microjoules = 0
        self.reason, self.broken_at = "", -math.inf
        self.still_seconds = 0.0

    def follow(
        self, value: int, before: float, after: float, tick: float | None = None, watts: float | None = None
    ) -> int:
        """Take a reading; the microjoules it adds.

        Args:
            value: microjoules, read between the moments `before` and `after`.
            before, after: seconds.
            tick: of the counter, see :func:`could_be`.
            watts: the power at that time, where another sensor tells it: twice as much is possible.
        """
        if self._value is None:
            self._restart(value, before)
            self._read_at, self._watts = before, watts or 0.0
            return 0
        # what a step adds was used since the value before it was shown for the first time
        step, gap, since = value - self._value, after - self._read_at, after - self._changed_at
        possible = max(self._possible_watts, 2 * self._watts, 2 * (watts or 0.0))
        self._read_at, self._watts = before, watts or 0.0
        refused = self._refuse(step, gap, since, possible, tick)
        if refused is None and step != 0 and self._left is not None:
            (left, then), self._left = self._left, None
            if value >= left and could_be(value - left, after - then, possible, tick):
                refused = "the counter was back where it had been: one reading of it was wrong"
        if refused is not None:
            self._left = (self._value, self._changed_at) if step < 0 else None
            self.breaks += 1
            self.reason, self.broken_at = refused, after
            self._restart(value, before)
            return 0
        if step == 0:
            self.still_seconds = since
            return 0
        if step < 0 and self._wraps_at is not None:
            step += self._wraps_at
            self.doubt_microjoules += max(step, round(2 * self._pace * since))
        self._pace = step / since if since > 0 else 0.0
        self._restart(value, before)
        self.microjoules += step
        return step

    def _restart(self, value: int, moment: float) -> None:
        self._value, self._changed_at, self.still_seconds = value, moment, 0.0

    def _refuse(self, step: int, gap: float, since: float, possible_watts: float, tick: float | None) -> str | None:
        """Why a step is no energy; None where it is."""
        if self._wraps_at is None:
            if step < 0:
                return "the counter went backwards (driver reloaded or GPU reset inside the window)"
            used = step
        else:
            used = step % self._wraps_at
            if possible_watts * gap * 1e6 >= self._wraps_at:
                return (
                    f"the counter starts over every {self._wraps_at / 1e6:.6g} J and was not read for {gap:.3g} s, so "
                    "it is not known how often it did"
                )
            if step < 0 and not could_be(used, since, possible_watts, tick):
                return (
                    f"the counter went backwards by {-step / 1e6:.6g} J, too far from its end to have started over "
                    "(it was reset, or the machine was suspended)"
                )
        if not could_be(used, since, possible_watts, tick):
            return (
                f"the counter jumped by {used / 1e6:.6g} J in {since:.3g} s, and no more than {possible_watts:.4g} W "
                "are possible"
            )
        return None
