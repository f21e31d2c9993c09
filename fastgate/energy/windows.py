"""A window of work: readings at its boundaries, and what lies between two of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from fastgate.energy.errors import EnergyError, WindowOpenError
from fastgate.energy.results import Energy
from fastgate.energy.sources import Clock, Reading, Source

# below this many ticks of a counter a window is mostly noise: 2.8 % (95th percentile) at 20 ticks, 11 % at 5
_ENOUGH_TICKS = 20


@dataclass(frozen=True)
class Boundary:
    """One moment, and what every source said then."""

    moment: float
    readings: dict[str, Reading | EnergyError]


def read_boundary(sources: Sequence[Source], clock: Clock) -> Boundary:
    """Read the clock, then every source once; a source that fails does not keep the others from being read."""
    moment = clock.now()
    readings: dict[str, Reading | EnergyError] = {}
    for source in sources:
        try:
            readings[source.key] = source.read()
        except EnergyError as error:
            readings[source.key] = error
    return Boundary(moment, readings)


class Metered(Protocol):
    """What a window needs of its meter."""

    sources: list[Source]
    clock: Clock
    unavailable: dict[str, EnergyError]
    notes: list[str]

    def synchronize(self) -> None:
        """Wait for the metered work."""

    def observe_context(self) -> list[str]:
        """What disturbs the metered boards right now."""


class Window:
    """One named window; use as a context manager, or :meth:`begin` and :meth:`end`.

    Attributes:
        items: what is worked on in the window; may be set before it ends.
        laps: the laps taken in it and, once it has ended, the rest after the last one: together the whole window.
    """

    def __init__(self, meter: Metered, name: str, items: int | None) -> None:
        check_items(items)
        self.name = name
        self.items = items
        self.laps: list[Energy] = []
        self._meter = meter
        self._begin: Boundary | None = None
        self._latest: Boundary | None = None
        self._result: Energy | None = None

    @property
    def result(self) -> Energy:
        """What the window used.

        Raises:
            WindowOpenError: it has not ended.
        """
        if self._result is None:
            raise WindowOpenError(
                f"window {self.name!r} has not ended: its energy is known after the `with` block, or after end()"
            )
        return self._result

    def begin(self) -> "Window":
        """Wait for earlier work, then take the first reading."""
        self._meter.synchronize()
        self.laps, self._result = [], None
        self._begin = self._latest = self._read()
        return self

    def lap(self, items: int | None = None, name: str | None = None) -> Energy:
        """What was used since the previous lap, or since the window began.

        One reading ends this lap and begins the next, so laps add up to the window exactly. Every lap waits for the
        work before it: take one every so many steps, not every step. The joules of a lap shorter than a tick of the
        counter are None; they appear in the next one.
        """
        self._meter.synchronize()
        return self._lap(items, name)

    def end(self) -> Energy:
        """Wait for the window's work, take the last reading; the same as leaving the `with` block."""
        if self._result is None:
            context = self._meter.observe_context()  # before waiting: an idle board is not throttled
            try:
                self._meter.synchronize()
            finally:
                self._close(context)
        return self.result

    def __enter__(self) -> "Window":
        return self.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.end()
        except Exception:
            # a failed kernel speaks up in the block and again when waited for: the first is what the user should see
            if error is None:
                raise

    def until_latest(self) -> Energy:
        """What was used from the beginning to the latest lap."""
        return self._between(*self._begun(), self.name, self.items, ())

    def _begun(self) -> tuple[Boundary, Boundary]:
        if self._begin is None or self._latest is None:
            raise WindowOpenError(f"window {self.name!r} has not begun: enter it with `with`, or call begin()")
        return self._begin, self._latest

    def _read(self) -> Boundary:
        return read_boundary(self._meter.sources, self._meter.clock)

    def _lap(self, items: int | None, name: str | None) -> Energy:
        check_items(items)
        _, previous = self._begun()
        self._latest = self._read()
        lap = self._between(previous, self._latest, name or f"{self.name} lap {len(self.laps) + 1}", items, ())
        self.laps.append(lap)
        return lap

    def _close(self, context: Sequence[str]) -> None:
        begin, _ = self._begun()
        if self.laps:
            self._lap(None, None)
        else:
            self._latest = self._read()
        check_items(self.items)
        self._result = self._between(begin, self._begun()[1], self.name, self.items, context)

    def _between(self, begin: Boundary, end: Boundary, name: str, items: int | None, context: Sequence[str]) -> Energy:
        meter, seconds = self._meter, end.moment - begin.moment
        per_device: dict[str, float | None] = dict.fromkeys(meter.unavailable)
        warnings = [*meter.notes, *(f"{device}: {reason}" for device, reason in meter.unavailable.items()), *context]
        total: int | None = None if meter.unavailable or not meter.sources else 0
        bound: float | None = total
        for source in meter.sources:
            spent = _spent(source, begin.readings[source.key], end.readings[source.key], seconds)
            warnings += [f"{source.key}: {warning}" for warning in spent.warnings]
            per_device[source.key] = spent.microjoules / 1e6 if spent.microjoules else None
            total = None if total is None or spent.microjoules is None else total + spent.microjoules
            bound = None if bound is None or spent.bound is None else bound + spent.bound
        return Energy(
            name=name,
            seconds=seconds,
            items=items,
            per_device=per_device,
            sources={source.key: source.kind for source in meter.sources},
            microjoules=total,
            error_bound_joules=None if total is None else bound,
            warnings=tuple(warnings),
        )


@dataclass(frozen=True)
class _Spent:
    microjoules: int | None
    bound: float | None = None
    warnings: tuple[str, ...] = ()


def _spent(source: Source, begin: Reading | EnergyError, end: Reading | EnergyError, seconds: float) -> _Spent:
    """What one source saw between two readings; unknown, with the reason, where they do not make a difference."""
    for reading in (begin, end):
        if isinstance(reading, EnergyError):
            return _Spent(None, None, (str(reading),))
    if isinstance(begin, EnergyError) or isinstance(end, EnergyError):
        return _Spent(None)
    spent = end.microjoules - begin.microjoules
    if begin.origin != end.origin:
        return _Spent(None, None, ("the process was forked inside the window, and power was not sampled all along",))
    if spent < 0:
        return _Spent(None, None, ("the counter went backwards (driver reloaded or GPU reset inside the window)",))
    if spent == 0:
        tick = "a tick" if source.tick is None else f"a tick ({source.tick * 1e3:.3g} ms)"
        return _Spent(0, None, (f"nothing was counted in {seconds:.3g} s: shorter than {tick} of the counter",))
    warnings = []
    if source.tick is None:
        warnings.append("how often the counter is renewed was not seen, so the error bound is unknown")
    elif seconds < _ENOUGH_TICKS * source.tick:
        warnings.append(
            f"the window of {seconds:.3g} s is shorter than {_ENOUGH_TICKS} ticks of {source.tick * 1e3:.3g} ms; "
            "make it longer, or repeat the work in it"
        )
    blind = end.blind_seconds - begin.blind_seconds
    if blind > 0:
        warnings.append(f"power was not sampled for {blind:.3g} s (a suspended or starved process)")
    return _Spent(spent, source.error_bound(begin, end, seconds), tuple(warnings))


def check_items(items: object) -> None:
    """Refuse what is not a number of items.

    Raises:
        TypeError, ValueError: not an integer, or a negative one.
    """
    if items is None:
        return
    if not isinstance(items, int) or isinstance(items, bool):
        raise TypeError(f"items: expected an integer or None, got {items!r}")
    if items < 0:
        raise ValueError(f"items: expected at least 0, got {items}")
