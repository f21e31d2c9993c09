"""Sources of energy readings on NVIDIA boards: the counter, or power added up where there is no counter."""

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from fastgate.energy.errors import EnergyError, NotSupported
from fastgate.energy.nvml import Board

# a device is asked for its power this often; boards renew the reading every 20 to 100 ms
_SAMPLE_SECONDS = 0.05
# a power reading may be this old: the slowest renewal in published measurements of data-center boards
_SENSOR_LAG_SECONDS = 0.1
# between samples further apart than this the power is a guess
_BLIND_SECONDS = 1.0


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
    """What a source said at one moment; a window is the difference of two readings."""

    microjoules: int
    watts: float | None = None  # power about now
    origin: int = 0  # readings with different origins do not belong together
    doubt_joules: float = 0.0  # growing, as the energy does
    blind_seconds: float = 0.0  # growing: time in which the power was not looked at


class Source(Protocol):
    """One metered device."""

    key: str
    kind: str
    tick: float | None  # seconds between two changes of the reading, None where not observed

    def read(self) -> Reading:
        """The energy so far; raises EnergyError where it cannot be read."""

    def error_bound(self, begin: Reading, end: Reading, seconds: float) -> float | None:
        """Joules by which the difference of two readings may be off, None where unknown."""


def stale_edges_bound(tick: float | None, begin: Reading, end: Reading, seconds: float) -> float | None:
    """The bound for a counter that is renewed once per tick: at either edge it may lack one tick's energy.

    The power during that tick is taken as the highest known: the window's mean, or the power read at an edge.
    """
    if tick is None:
        return None
    mean = (end.microjoules - begin.microjoules) / 1e6 / seconds if seconds > 0 else 0.0
    return tick * max(mean, begin.watts or 0.0, end.watts or 0.0)


class NvmlCounter:
    """The energy counter of a board."""

    kind = "nvml-counter"

    def __init__(self, board: Board) -> None:
        self.board = board
        self.key = board.uuid
        self.tick: float | None = None

    def read(self) -> Reading:
        """One call for the energy, one for the power (which only serves the error bound)."""
        microjoules = self.board.read_millijoules() * 1000
        try:
            watts = self.board.read_milliwatts() / 1000
        except EnergyError:
            watts = None
        return Reading(microjoules, watts)

    def error_bound(self, begin: Reading, end: Reading, seconds: float) -> float | None:
        """See :func:`stale_edges_bound`."""
        return stale_edges_bound(self.tick, begin, end, seconds)


class PowerIntegral:
    """Power of a board without a counter, added up by the trapezoid rule between samples.

    Samples come from every reading and from a :class:`Sampler`; after a fork the child starts from a new origin.
    """

    kind = "nvml-power-integral"
    sample_seconds = _SAMPLE_SECONDS

    def __init__(self, board: Board, clock: Clock) -> None:
        self.board = board
        self.key = board.uuid
        self.tick: float | None = _SAMPLE_SECONDS
        self._clock = clock
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._origin = os.getpid()
        self._joules = self._doubt = self._blind = 0.0
        self._last: tuple[float, float] | None = None

    def read(self) -> Reading:
        """Take a sample now; the energy up to it."""
        if self._origin != os.getpid():  # a forked child: the lock may be held by a thread that exists no more
            self._start()
        with self._lock:
            watts, now = self.board.read_milliwatts() / 1000, self._clock.now()
            if self._last is not None:
                before, then = self._last
                gap = now - then
                self._joules += gap * (watts + before) / 2
                self._doubt += (gap / 2 + _SENSOR_LAG_SECONDS) * abs(watts - before)
                self._blind += gap if gap > _BLIND_SECONDS else 0.0
            self._last = watts, now
            return Reading(round(self._joules * 1e6), watts, self._origin, self._doubt, self._blind)

    def error_bound(self, begin: Reading, end: Reading, seconds: float) -> float | None:
        """Half a step of power for the time between its two samples, and the whole step for the lag of the sensor."""
        return end.doubt_joules - begin.doubt_joules


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
        while not stopped.wait(self._seconds):
            for source in self._sources:
                with suppress(EnergyError):  # a lost device: the reading at the end of the window says so
                    source.read()

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
    return NvmlCounter(board)


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
