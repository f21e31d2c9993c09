"""Sources of energy readings on NVIDIA GPUs: the counter, or integrated power if there is no counter."""

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from fastgate.energy.errors import EnergyError, NotSupported
from fastgate.energy.locks import ForkLock
from fastgate.energy.nvml import Board
from fastgate.energy.trail import Trail

# sampling interval of the power of a board without a counter; boards update the reading every 20 to 100 ms
_SAMPLE_SECONDS = 0.05
# sampling interval of counters and of the power they are checked against: the slowest boards update both every 100 ms
_WATCH_SECONDS = 0.1
# maximum age of a power reading: the slowest update in published measurements of data-center GPUs
_SENSOR_LAG_SECONDS = 0.1
# a sampler pauses for at least this many times the duration of its readings
_RESTS = 9
# averaging time of power readings on boards without instantaneous power
_AVERAGE_SECONDS = 1.0
# between samples further apart than this, the power is unknown, which is reported in the window
_BLIND_SECONDS = 5 * _SAMPLE_SECONDS
# no board draws more (an NVIDIA GB300: 1.4 kW); a higher value is not a valid reading
_NO_BOARD_WATTS = 10_000.0
# a board exceeds its power limit for milliseconds only, and never by more than this factor on average
_OVER_LIMIT = 2.0


class Clock:
    """A time source with a matching sleep, so that both can be replaced together."""

    def now(self) -> float:
        """Seconds since an arbitrary origin."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        """Wait for this many seconds."""
        time.sleep(seconds)


@dataclass(frozen=True)
class Reading:
    """One reading of a source; the energy of a window is the difference of two readings.

    Attributes:
        microjoules: cumulative energy, of plausible steps only.
        before, after: seconds; the times before and after the source was read.
        watts: power at about this time; None if unknown.
        breaks: number of implausible steps so far; readings on both sides of a break cannot be subtracted.
        reason: reason of the latest break.
        still_seconds: time since the source last changed.
        doubt_joules: cumulative: possible error of the energy.
        blind_seconds: cumulative: time in which the source was not sampled although it should have been.
        lowest_joules, highest_joules: cumulative: energy implied by the lowest and the highest power around each step
            between two readings, if another sensor measures power.
        unrest_joules: cumulative: energy that changes in that power may hide, since its sensor lags.
    """

    microjoules: int
    before: float
    after: float
    watts: float | None = None
    breaks: int = 0
    reason: str = ""
    still_seconds: float = 0.0
    doubt_joules: float = 0.0
    blind_seconds: float = 0.0
    lowest_joules: float = 0.0
    highest_joules: float = 0.0
    unrest_joules: float = 0.0


class Source(Protocol):
    """One metered device."""

    key: str
    kind: str
    tick: float | None  # seconds between two changes of the reading; None if not observed
    limit_watts: float | None  # limit of the average power; None if unknown
    possible_watts: float  # upper limit of the power
    reads_power: bool  # whether a separate sensor measures its power
    sample_seconds: float  # sampling interval, also between the boundaries of windows

    def read(self) -> Reading:
        """Cumulative energy; raises EnergyError if it cannot be read."""

    def error_bound(self, begin: Reading, end: Reading, watts: float) -> float | None:
        """Maximum error, in joules, of the difference of two readings; None if unknown.

        Args:
            begin, end: the readings.
            watts: the highest power to assume.
        """


def stale_edges_bound(tick: float | None, begin: Reading, end: Reading, watts: float) -> float | None:
    """Error bound of a counter that updates once per tick: at either end, it may lack one tick's energy.

    If the counter has not changed for longer than a tick, it may lack the energy of that whole time.
    """
    if tick is None:
        return None
    still = max(begin.still_seconds, end.still_seconds)
    return watts * (tick if still < 1.5 * tick else still + tick) + end.doubt_joules - begin.doubt_joules


class NvmlCounter:
    """The energy counter of a board, checked against its power readings.

    It is read at every window boundary and by a :class:`Sampler`: two readings alone could not distinguish a change in
    power from a counter fault.
    """

    kind = "nvml-counter"
    reads_power = True
    sample_seconds = _WATCH_SECONDS

    def __init__(self, board: Board, clock: Clock) -> None:
        self.board = board
        self.key = board.uuid
        self.tick: float | None = None
        self.limit_watts, self.possible_watts = _power_limits(board)
        self._clock = clock
        self._lock = ForkLock()
        self._trail = Trail(self.possible_watts)
        self._lowest = self._highest = self._doubt = self._unrest = 0.0
        self._last: tuple[float | None, float, float] | None = None  # watts, and the times before and after reading
        self._lag = _SENSOR_LAG_SECONDS if board.reads_instant_power() else _AVERAGE_SECONDS
        self._recent: deque[tuple[float, float]] = deque()  # (time, watts) within the sensor's lag

    def read(self) -> Reading:
        """Read the energy and the power."""
        with self._lock:
            before = self._clock.now()
            microjoules = self.board.read_millijoules() * 1000
            after = self._clock.now()
            try:
                watts: float | None = self.board.read_milliwatts() / 1000
            except EnergyError:
                watts = None
            if watts is not None and not 0 < watts < _NO_BOARD_WATTS:
                watts = None  # a glitch without meaning
            trail = self._trail
            trail.follow(microjoules, before, after, self.tick, watts)
            self._watch(watts, before, after)
            return Reading(
                trail.microjoules,
                before,
                after,
                watts,
                trail.breaks,
                trail.reason,
                still_seconds=trail.still_seconds,
                doubt_joules=self._doubt,
                lowest_joules=self._lowest,
                highest_joules=self._highest,
                unrest_joules=self._unrest,
            )

    def _watch(self, watts: float | None, before: float, after: float) -> None:
        """Add the energy range that the power implies since the last reading."""
        if self._last is not None:
            then, asked, told = self._last
            # between the midpoints of both readings, like the energy of a window
            seconds = (before + after - asked - told) / 2
            if watts is None or then is None:
                self._highest += self.possible_watts * seconds
            else:
                around = [watts, then, *(each for _, each in self._recent)]
                self._lowest += min(around) * seconds
                self._highest += max(around) * seconds
                self._unrest += self._lag * abs(watts - then)
                if seconds > 2 * _WATCH_SECONDS:  # long enough to hide a counter fault
                    self._doubt += abs(watts - then) * seconds
        self._last = watts, before, after
        if watts is not None:
            self._recent.append((after, watts))
        while self._recent and self._recent[0][0] < after - self._lag:
            self._recent.popleft()

    def error_bound(self, begin: Reading, end: Reading, watts: float) -> float | None:
        """See :func:`stale_edges_bound`."""
        return stale_edges_bound(self.tick, begin, end, watts)


class PowerIntegral:
    """Power of a board without a counter, integrated with the trapezoidal rule.

    Samples are taken at every reading and by a :class:`Sampler`; after a fork, the child starts over.
    """

    kind = "nvml-power-integral"
    reads_power = False
    sample_seconds = _SAMPLE_SECONDS

    def __init__(self, board: Board, clock: Clock) -> None:
        self.board = board
        self.key = board.uuid
        self.tick: float | None = _SAMPLE_SECONDS
        self.limit_watts, self.possible_watts = _power_limits(board)
        self._clock = clock
        self._pid = os.getpid()
        self._lock = ForkLock()
        self._joules = self._doubt = self._blind = 0.0
        self._breaks = 0
        self._last: tuple[float, float, float] | None = None  # watts, time, and the time before that sample was read

    def read(self) -> Reading:
        """Take a sample and return the energy up to it."""
        with self._lock:
            if self._pid != os.getpid():
                self._pid, self._last, self._breaks = os.getpid(), None, self._breaks + 1
            before = self._clock.now()
            watts = self.board.read_milliwatts() / 1000
            after = self._clock.now()
            if watts > self.possible_watts:
                raise EnergyError(
                    f"a power reading of {watts:.6g} W is a glitch: only {self.possible_watts:.4g} W are possible"
                )
            now = (before + after) / 2
            if self._last is not None:
                self._add(watts, now, after)
            self._last = watts, now, before
            return Reading(
                round(self._joules * 1e6),
                before,
                after,
                watts,
                self._breaks,
                "the process was forked inside the window, so power was not sampled throughout",
                doubt_joules=self._doubt,
                blind_seconds=self._blind,
            )

    def _add(self, watts: float, now: float, after: float) -> None:
        """Add the energy since the last sample."""
        last, then, asked = self._last or (watts, now, now)
        mean, gap = (watts + last) / 2, after - asked
        self._joules += (now - then) * mean
        self._doubt += _SENSOR_LAG_SECONDS * abs(watts - last)
        if gap <= 2 * _SAMPLE_SECONDS:
            self._doubt += gap / 2 * abs(watts - last)
        else:  # a burst or a pause may have gone unnoticed
            self._doubt += gap * max(mean, (self.limit_watts or self.possible_watts) - mean)
        self._blind += gap if gap > _BLIND_SECONDS else 0.0

    def error_bound(self, begin: Reading, end: Reading, watts: float) -> float | None:
        """Error bound: half a power step between samples, or whatever the board can draw in a long gap.

        In addition, the whole step during the sensor's lag; the step at the end of the window is no longer observed.
        """
        return end.doubt_joules - begin.doubt_joules + _SENSOR_LAG_SECONDS * watts


def _power_limits(board: Board) -> tuple[float | None, float]:
    """A board's power limit (None if it reports no plausible one), and the power it never exceeds."""
    limit = board.highest_power_limit_watts()
    if limit is None or not 0 < limit < _NO_BOARD_WATTS:
        return None, _NO_BOARD_WATTS
    return limit, _OVER_LIMIT * limit


class Sampler:
    """A daemon thread that reads sources at a fixed interval until stopped."""

    def __init__(self, sources: Sequence[Source], seconds: float) -> None:
        self._sources = sources
        self._seconds = seconds
        self._pid = 0

    def ensure_running(self) -> None:
        """Start the thread; in a forked child, start it again."""
        if self._pid == os.getpid():
            return
        self._pid = os.getpid()
        self._stopped = threading.Event()
        threading.Thread(target=self._run, args=(self._stopped,), name="fastgate-energy", daemon=True).start()

    def _run(self, stopped: threading.Event) -> None:
        pause = self._seconds
        while not stopped.wait(pause):
            began = time.perf_counter()
            for source in self._sources:
                with suppress(EnergyError):  # a lost device: the reading at the end of the window says so
                    source.read()
            # window boundaries wait for a reading in progress: with long pauses they rarely have to
            pause = max(self._seconds, _RESTS * (time.perf_counter() - began))

    def stop(self) -> None:
        """Stop the thread."""
        if self._pid == os.getpid():
            self._stopped.set()


def nvml_source(board: Board, clock: Clock) -> NvmlCounter | PowerIntegral:
    """The energy counter if the board supports it, otherwise its integrated power.

    Raises:
        EnergyError: it supports neither, or cannot be read.
    """
    try:
        board.read_millijoules()
    except NotSupported:
        board.read_milliwatts()
        return PowerIntegral(board, clock)
    return NvmlCounter(board, clock)


def observe_ticks(sources: list[Source], clock: Clock, *, changes: int = 4, seconds: float = 0.5) -> None:
    """Observe counters until each has changed a few times, and store the median time between changes as its tick.

    The tick of a counter that changes less than twice in `seconds` remains unknown.
    """
    deadline = clock.now() + seconds
    last: dict[str, int] = {}
    moments: dict[str, list[float]] = {source.key: [] for source in sources}
    waiting = list(sources)
    while waiting and clock.now() < deadline:
        for source in list(waiting):
            try:
                value = source.read().microjoules
            except EnergyError:
                waiting.remove(source)
                continue
            if last.setdefault(source.key, value) != value:
                last[source.key] = value
                moments[source.key].append(clock.now())
                if len(moments[source.key]) == changes:
                    waiting.remove(source)
        clock.sleep(0.0005)
    for source in sources:
        times = moments[source.key]
        gaps = sorted(later - earlier for earlier, later in pairwise(times))
        if gaps:
            source.tick = gaps[len(gaps) // 2]
