"""Follows a counter from reading to reading and accepts only steps whose implied power is possible."""

import math

# maximum lag of a counter: in seconds if its tick is unknown, otherwise in ticks
_LATE_SECONDS, _LATE_TICKS = 1.0, 5


def could_be(microjoules: int, seconds: float, possible_watts: float, tick: float | None) -> bool:
    """Whether a device drawing at most `possible_watts` can have used this energy between two readings.

    Args:
        microjoules: difference of the counter.
        seconds: from before the first reading to after the second.
        possible_watts: maximum average power.
        tick: seconds between two changes of the counter, None if unknown; its lag is added to the time.
    """
    late = _LATE_SECONDS if tick is None else min(_LATE_SECONDS, _LATE_TICKS * tick)
    return microjoules <= possible_watts * (seconds + late) * 1e6


class Trail:
    """The energy counted since a counter's first reading, as the sum of its plausible steps.

    An implausible step (a reset, a jump, a glitch, a gap long enough for an unseen wrap) breaks the trail: it counts as
    0, and differences across it are not valid energies. The trail continues from there.

    Args:
        possible_watts: upper limit of the device's power.
        wraps_at: microjoules at which the counter wraps to 0; None: never.

    Attributes:
        microjoules: sum of the accepted steps.
        breaks: number of breaks.
        reason, broken_at: reason and time of the last break.
        doubt_microjoules: possible error of the sum: a reset close to the wrap point looks like a wrap, and the energy
            may then have been up to twice the previous rate.
        still_seconds: time up to the latest reading during which the value has not changed.
    """

    def __init__(self, possible_watts: float, wraps_at: int | None = None) -> None:
        self._possible_watts = possible_watts
        self._wraps_at = wraps_at
        self._value: int | None = None
        self._read_at = self._changed_at = 0.0
        self._watts = 0.0
        self._pace = 0.0  # microjoules per second in the latest step
        self._left: tuple[int, float] | None = None  # value and time before the latest backward step
        self.microjoules = self.breaks = self.doubt_microjoules = 0
        self.reason, self.broken_at = "", -math.inf
        self.still_seconds = 0.0

    def follow(
        self, value: int, before: float, after: float, tick: float | None = None, watts: float | None = None
    ) -> int:
        """Add a reading and return the microjoules it adds.

        Args:
            value: microjoules, read between the times `before` and `after`.
            before, after: seconds.
            tick: tick of the counter, see :func:`could_be`.
            watts: power at that time, if another sensor measures it: twice as much is considered possible.
        """
        if self._value is None:
            self._restart(value, before)
            self._read_at, self._watts = before, watts or 0.0
            return 0
        # the energy of a step was used since the previous value first appeared
        step, gap, since = value - self._value, after - self._read_at, after - self._changed_at
        possible = max(self._possible_watts, 2 * self._watts, 2 * (watts or 0.0))
        self._read_at, self._watts = before, watts or 0.0
        refused = self._refuse(step, gap, since, possible, tick)
        if refused is None and step != 0 and self._left is not None:
            (left, then), self._left = self._left, None
            if value >= left and could_be(value - left, after - then, possible, tick):
                refused = "the counter returned to its earlier value: one of its readings was wrong"
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
        """Why a step is not a valid energy; None if it is."""
        if self._wraps_at is None:
            if step < 0:
                return "the counter went backwards (driver reloaded or GPU reset inside the window)"
            used = step
        else:
            used = step % self._wraps_at
            if possible_watts * gap * 1e6 >= self._wraps_at:
                return (
                    f"the counter wraps every {self._wraps_at / 1e6:.6g} J and was not read for {gap:.3g} s, so the "
                    "number of wraps is unknown"
                )
            if step < 0 and not could_be(used, since, possible_watts, tick):
                return (
                    f"the counter went backwards by {-step / 1e6:.6g} J, too far from its maximum to have wrapped (it "
                    "was reset, or the machine was suspended)"
                )
        if not could_be(used, since, possible_watts, tick):
            return (
                f"the counter jumped by {used / 1e6:.6g} J in {since:.3g} s, but at most {possible_watts:.4g} W are "
                "possible"
            )
        return None
