"""Windows of work: readings at their boundaries, and the energy between two readings."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from fastgate.energy.errors import EnergyError, WindowClosedError, WindowOpenError
from fastgate.energy.locks import ForkLock
from fastgate.energy.plausibility import Span, spent_between
from fastgate.energy.results import Energy
from fastgate.energy.sources import Clock, Reading, Source


@dataclass(frozen=True)
class Boundary:
    """Readings of every source, taken between two times."""

    before: float
    after: float
    readings: dict[str, Reading | EnergyError]


def read_boundary(sources: Sequence[Source], clock: Clock) -> Boundary:
    """Read every source once, and the clock before and after; a failing source does not affect the others."""
    before = clock.now()
    readings: dict[str, Reading | EnergyError] = {}
    for source in sources:
        try:
            readings[source.key] = source.read()
        except EnergyError as error:
            readings[source.key] = error
    return Boundary(before, clock.now(), readings)


class Metered(Protocol):
    """The interface of a meter that windows use."""

    sources: list[Source]
    clock: Clock
    unavailable: dict[str, EnergyError]
    notes: list[str]
    closed: bool

    def check_open(self) -> None:
        """Raise if the meter was closed."""

    def synchronize(self) -> None:
        """Wait for the metered work."""

    def observe_context(self) -> list[str]:
        """Current disturbances on the metered boards."""


class Window:
    """One named window; use it as a context manager, or with :meth:`begin` and :meth:`end`.

    Attributes:
        items: number of items processed in the window; may be set before it ends.
        laps: its laps and, after its end, the remainder after the last one; together, the whole window.
    """

    def __init__(self, meter: Metered, name: str, items: int | None) -> None:
        check_items(items)
        self.name = name
        self.items = items
        self.laps: list[Energy] = []
        self._meter = meter
        self._lock = ForkLock()  # one boundary ends a lap and begins the next, even if several threads take laps
        self._begin: Boundary | None = None
        self._latest: Boundary | None = None
        self._result: Energy | None = None

    @property
    def result(self) -> Energy:
        """Energy of the window.

        Raises:
            WindowOpenError: the window has not ended.
        """
        if self._result is None:
            raise WindowOpenError(
                f"window {self.name!r} has not ended: its energy is available after the `with` block or end()"
            )
        return self._result

    def begin(self) -> "Window":
        """Wait for earlier work, then take the first reading.

        Raises:
            WindowOpenError: the window is already open; it cannot be nested in itself.
            WindowClosedError: the meter was closed.
        """
        self._meter.check_open()
        self._check_not_open()
        self._meter.synchronize()
        with self._lock:
            self._check_not_open()
            self._begin = self._latest = self._read()
            self.laps, self._result = [], None
        return self

    def _check_not_open(self) -> None:
        if self._begin is not None and self._result is None:
            raise WindowOpenError(
                f"window {self.name!r} is already open: end it before beginning it again, or create another one inside "
                "it with meter.window()"
            )

    def lap(self, items: int | None = None, name: str | None = None) -> Energy:
        """Energy since the previous lap, or since the window began.

        One reading ends this lap and begins the next, so laps add up to the window exactly. Every lap synchronizes with
        the device: take one every few steps, not every step. The joules of a lap shorter than a tick of the counter are
        None; they are included in the next one.

        Raises:
            WindowOpenError: the window has not begun.
            WindowClosedError: it has ended, or the meter was closed.
        """
        check_items(items)
        self._check_running()
        self._meter.synchronize()
        with self._lock:
            self._check_running()
            return self._lap(items, name)

    def _check_running(self) -> None:
        self._begun()
        if self._result is not None:
            raise WindowClosedError(f"window {self.name!r} has ended: take laps before its end, or begin it again")
        self._meter.check_open()

    def end(self) -> Energy:
        """Wait for the window's work and take the last reading, as on leaving the `with` block.

        If the meter was closed in the meantime, the energy is unknown.
        """
        if self._result is None:
            context: list[str] = []
            try:
                if not self._meter.closed:
                    context = self._meter.observe_context()  # before waiting: an idle board is not throttled
                    self._meter.synchronize()
            finally:
                with self._lock:
                    if self._result is None:
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
            # a failed kernel raises in the block and again on synchronization: the user should see the first error
            if error is None:
                raise

    def until_latest(self) -> Energy:
        """Energy from the beginning to the latest lap."""
        return self._between(*self._begun(), self.name, self.items, ())

    def _begun(self) -> tuple[Boundary, Boundary]:
        if self._begin is None or self._latest is None:
            raise WindowOpenError(f"window {self.name!r} has not begun: enter it with `with`, or call begin()")
        return self._begin, self._latest

    def _read(self) -> Boundary:
        if self._meter.closed:
            gone = WindowClosedError("the meter was closed inside the window")
            now = self._meter.clock.now()
            return Boundary(now, now, {source.key: gone for source in self._meter.sources})
        return read_boundary(self._meter.sources, self._meter.clock)

    def _lap(self, items: int | None, name: str | None) -> Energy:
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
        meter, span = self._meter, Span(begin.before, begin.after, end.before, end.after)
        per_device: dict[str, float | None] = dict.fromkeys(meter.unavailable)
        warnings = [*meter.notes, *(f"{device}: {reason}" for device, reason in meter.unavailable.items()), *context]
        total: int | None = None if meter.unavailable or not meter.sources else 0
        bound: float | None = total
        for source in meter.sources:
            spent = spent_between(source, begin.readings[source.key], end.readings[source.key], span)
            warnings += [f"{source.key}: {warning}" for warning in spent.warnings]
            per_device[source.key] = spent.microjoules / 1e6 if spent.microjoules else None
            total = None if total is None or spent.microjoules is None else total + spent.microjoules
            bound = None if bound is None or spent.bound is None else bound + spent.bound
        return Energy(
            name=name,
            seconds=span.seconds,
            items=items,
            per_device=per_device,
            sources={source.key: source.kind for source in meter.sources},
            microjoules=total,
            error_bound_joules=None if total is None else bound,
            warnings=tuple(warnings),
        )


def check_items(items: object) -> None:
    """Check a number of items.

    Raises:
        TypeError, ValueError: not an integer, or negative.
    """
    if items is None:
        return
    if not isinstance(items, int) or isinstance(items, bool):
        raise TypeError(f"items: expected an integer or None, got {items!r}")
    if items < 0:
        raise ValueError(f"items: expected at least 0, got {items}")
