"""Sources of energy readings on NVIDIA boards: the counter, or power added up where there is no counter."""

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

# a board without a counter is asked for its power this often; boards renew the reading every 20 to 100 ms
_SAMPLE_SECONDS = 0.05
# a counter is looked at this often, and the power that it is checked by: the slowest boards renew both every 100 ms
_WATCH_SECONDS = 0.1
# a power reading may be this old: the slowest renewal in published measurements of data-center boards
_SENSOR_LAG_SECONDS = 0.1
# a sampler rests so many times as long as its readings took
_RESTS = 9
# where a board has no reading of instant power, it is the mean of so long a time
_AVERAGE_SECONDS = 1.0
# between samples further apart than this the power is anybody's guess, and a window says so
_BLIND_SECONDS = 5 * _SAMPLE_SECONDS
# no board draws more (an NVIDIA GB300: 1.4 kW); what says so is no reading
_NO_BOARD_WATTS = 10_000.0
# more than its power limit a board draws for milliseconds only; more than twice as much on average it cannot
_OVER_LIMIT = 2.0


class Clock:
    """Seconds since some moment, and waiting: the pair, so that both may run on another time."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


@dataclass(frozen=True)
class Reading:
    """What a source said once, between two moments; a window is the difference of two readings.

    Attributes:
        microjoules: used up to now, of what can be believed.
        before, after: seconds; the source was asked then, and had answered.
        watts: power about now, None where not known.
        breaks: how much could not be believed so far: across a break there is no difference.
        reason: of the latest break.
        still_seconds: for how long the source has said the same.
        doubt_joules: growing, as the energy does: by how much it may be off.
        blind_seconds: growing: time in which a source that is to be looked at all the time was not.
        lowest_joules, highest_joules: growing: what the least and the greatest power around each step between two
            readings would have made, where another sensor tells it.
        unrest_joules: growing: what a change of that power may hide, as its sensor is late.
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
    tick: float | None  # seconds between two changes of the reading, None where not observed
    limit_watts: float | None  # the device keeps below on average, None where unknown
    possible_watts: float  # it never draws more
    reads_power: bool  # whether its power is known by another sensor than the one its energy comes from
    sample_seconds: float  # it is to be read this often also between the boundaries of windows

    def read(self) -> Reading:
        """The energy so far; raises EnergyError where it cannot be read."""

    def error_bound(self, begin: Reading, end: Reading, watts: float) -> float | None:
        """Joules by which the difference of two readings may be off, None where unknown.

        Args:
            begin, end: the readings.
            watts: the highest power to be reckoned with.
        """


def stale_edges_bound(tick: float | None, begin: Reading, end: Reading, watts: float) -> float | None:
    """The bound for a counter that is renewed once per tick: at either edge it may lack one tick's energy.

    Where the counter has stood still for longer than a tick, it may lack what was used in all that time.
    """
    if tick is None:
        return None
    still = max(begin.still_seconds, end.still_seconds)
    return watts * (tick if still < 1.5 * tick else still + tick) + end.doubt_joules - begin.doubt_joules


class NvmlCounter:
    """The energy counter of a board; its power readings say what it can have counted.

    Readings come from every boundary of a window and from a :class:`Sampler`: of two readings alone nobody could tell
    whether the power changed in between or the counter was at fault.
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
        self._last: tuple[float | None, float, float] | None = None  # watts, when asked for, and when told
        self._lag = _SENSOR_LAG_SECONDS if board.reads_instant_power() else _AVERAGE_SECONDS
        self._recent: deque[tuple[float, float]] = deque()  # moment and watts, of the time that the sensor lags

    def read(self) -> Reading:
        """One call for the energy, one for the power."""
        with self._lock:
            before = self._clock.now()
            microjoules = self.board.read_millijoules() * 1000
            after = self._clock.now()
            try:
                watts: float | None = self.board.read_milliwatts() / 1000
            except EnergyError:
                watts = None
            if watts is not None and not 0 < watts < _NO_BOARD_WATTS:
                watts = None  # a glitch, from which nothing is to be concluded
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
        """Add what the power can have made since the last reading."""
        if self._last is not None:
            then, asked, told = self._last
            # between the middles of both readings, like the energy of a window
            seconds = (before + after - asked - told) / 2
            if watts is None or then is None:
                self._highest += self.possible_watts * seconds
            else:
                around = [watts, then, *(each for _, each in self._recent)]
                self._lowest += min(around) * seconds
                self._highest += max(around) * seconds
                self._unrest += self._lag * abs(watts - then)
                if seconds > 2 * _WATCH_SECONDS:  # so long that a fault of the counter can hide in it
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
    """Power of a board without a counter, added up by the trapezoid rule between samples.

    Samples come from every reading and from a :class:`Sampler`; after a fork the child starts anew.
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
        self._last: tuple[float, float, float] | None = None  # watts, moment, and when that sample was asked for

    def read(self) -> Reading:
        """Take a sample now; the energy up to it."""
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
                "the process was forked inside the window, and power was not sampled all along",
                doubt_joules=self._doubt,
                blind_seconds=self._blind,
            )

    def _add(self, watts: float, now: float, after: float) -> None:
        """Add the time since the last sample."""
        last, then, asked = self._last or (watts, now, now)
        mean, gap = (watts + last) / 2, after - asked
        self._joules += (now - then) * mean
        self._doubt += _SENSOR_LAG_SECONDS * abs(watts - last)
        if gap <= 2 * _SAMPLE_SECONDS:
            self._doubt += gap / 2 * abs(watts - last)
        else:  # a burst, or a pause, may have come and gone
            self._doubt += gap * max(mean, (self.limit_watts or self.possible_watts) - mean)
        self._blind += gap if gap > _BLIND_SECONDS else 0.0

    def error_bound(self, begin: Reading, end: Reading, watts: float) -> float | None:
        """For the time between two samples half a step of power, or where it is long whatever the board can draw.

        For the lag of the sensor the whole step; at the end of the window the step is not seen any more.
        """
        return end.doubt_joules - begin.doubt_joules + _SENSOR_LAG_SECONDS * watts


def _power_limits(board: Board) -> tuple[float | None, float]:
    """A board's power limit, None where it does not tell a believable one, and what it never draws."""
    limit = board.highest_power_limit_watts()
    if limit is None or not 0 < limit < _NO_BOARD_WATTS:
        return None, _NO_BOARD_WATTS
    return limit, _OVER_LIMIT * limit


class Sampler:
    """A daemon thread that reads sources every so often, until stopped."""

    def __init__(self, sources: Sequence[Source], seconds: float) -> None:
        self._sources = sources
        self._seconds = seconds
        self._pid = 0

    def ensure_running(self) -> None:
        """Start the thread, in a forked child again."""
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
            # boundaries of windows wait for a reading that is under way: where that takes long they find none mostly
            pause = max(self._seconds, _RESTS * (time.perf_counter() - began))

    def stop(self) -> None:
        """End the thread."""
        if self._pid == os.getpid():
            self._stopped.set()


def nvml_source(board: Board, clock: Clock) -> NvmlCounter | PowerIntegral:
    """The counter where the board answers the call for it, else its power.

    Raises:
        EnergyError: it offers neither, or cannot be read.
    """
    try:
        board.read_millijoules()
    except NotSupported:
        board.read_milliwatts()
        return PowerIntegral(board, clock)
    return NvmlCounter(board, clock)


def observe_ticks(sources: list[Source], clock: Clock, *, changes: int = 4, seconds: float = 0.5) -> None:
    """Watch counters until each has changed a few times, and note the median time between changes as its tick.

    A counter that changes less than twice in `seconds` keeps an unknown tick.
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
