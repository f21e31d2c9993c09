"""`EnergyMeter`: meters the energy of windows of work."""

import os
import weakref
from collections.abc import Callable, Iterable

from fastgate.energy import cuda, rapl
from fastgate.energy.devices import Device, find_board, parse_devices
from fastgate.energy.errors import DeviceMissing, EnergyError, LibraryMissing, NotSupported, WindowClosedError
from fastgate.energy.nvml import Board, Session
from fastgate.energy.results import Energy
from fastgate.energy.sources import Clock, PowerIntegral, Sampler, Source, nvml_source, observe_ticks
from fastgate.energy.windows import Window, read_boundary

_CPU = ("auto", "off", "require")


class EnergyMeter:
    """Meters the energy of windows of work on NVIDIA GPUs and CPU packages.

    ::

        meter = EnergyMeter()
        with meter.window("epoch 3", items=50_000) as w:
            ...
        w.result.joules, w.result.joules_per_item, w.result.warnings

    Windows may nest and overlap, in any thread, and are independent. The GPU is synchronized when a window begins and
    ends, never inside it. If energy cannot be metered, results are None and their warnings give the reason.

    Creating a meter reads the counters for up to half a second, to determine how often they update.

    Args:
        devices: torch device, CUDA index, UUID (or a prefix of it), or a list of these; "cpu" selects no GPU. Default:
            all GPUs visible to this process. GPUs are found by UUID or PCI id, never by NVML's own order.
        cpu: "auto" meters the CPU packages if no GPU is metered (so that a sum has one source, whether or not RAPL is
            readable); "require" always meters them, or raises; "off" never does.
        require: raise if a device cannot be metered, instead of returning None in results.
        allow_shared: meter the whole GPU if only a MIG slice of it belongs to this process.
        synchronize: function that waits for the metered work; default: torch's synchronization of the metered GPUs,
            once torch has initialized CUDA.
        clock: an alternative time source.

    Raises:
        ValueError, TypeError: an invalid or nonexistent device, or an unknown `cpu`.
        EnergyError: with `require` (or cpu="require"), a device cannot be metered, and why.
    """

    def __init__(
        self,
        devices: Device | Iterable[Device] = None,
        cpu: str = "auto",
        *,
        require: bool = False,
        allow_shared: bool = False,
        synchronize: Callable[[], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        if cpu not in _CPU:
            raise ValueError(f"cpu: expected one of {', '.join(_CPU)}, got {cpu!r}")
        asked = parse_devices(devices)
        self.clock = clock or Clock()
        self.sources: list[Source] = []
        self.unavailable: dict[str, EnergyError] = {}  # device -> why it is not metered
        self.notes: list[str] = []  # included in the warnings of every result
        self._boards: list[Board] = []
        self._samplers: list[Sampler] = []
        self._session: Session | None = None
        self.closed = False
        self._synchronize = synchronize
        self._finalizer = weakref.finalize(self, _stop, self._samplers)
        try:
            self._find_sources(asked, cpu, require=require, allow_shared=allow_shared)
        except BaseException:
            self.close()
            raise
        for seconds in sorted({source.sample_seconds for source in self.sources}):
            alike: list[Source] = [source for source in self.sources if source.sample_seconds == seconds]
            self._samplers.append(Sampler(alike, seconds))
        observe_ticks([s for s in self.sources if not isinstance(s, PowerIntegral)], self.clock)
        self._life = self.begin("since the meter was made")

    def _find_sources(self, asked: list[str] | None, cpu: str, *, require: bool, allow_shared: bool) -> None:
        if asked is None or asked:
            self._add_boards(asked, allow_shared=allow_shared)
        no_board_matters = not asked and not self._boards and self.unavailable.keys() <= {"gpu"}
        if cpu == "require" or (cpu == "auto" and no_board_matters):
            self._add_packages(require=cpu == "require")
        if require and self.unavailable:
            raise next(iter(self.unavailable.values()))
        if not self.sources and not self.unavailable:
            self.notes.append("nothing is metered: no GPU was requested, and cpu is 'off'")

    def _add_boards(self, asked: list[str] | None, *, allow_shared: bool) -> None:
        try:
            self._session = Session()
        except EnergyError as error:
            self.unavailable |= dict.fromkeys(asked or ["gpu"], error)
            return
        if asked is None:
            try:
                boards, refused = self._session.boards()
                boards = cuda.visible_boards(boards)
            except EnergyError as error:
                self.unavailable["gpu"] = error
                return
            self.notes += refused
            if not boards:
                variable = os.environ.get("CUDA_VISIBLE_DEVICES")
                hidden = "" if variable is None else f" with CUDA_VISIBLE_DEVICES={variable!r}"
                self.unavailable["gpu"] = DeviceMissing(f"this process sees no GPU{hidden}")
            for board in boards:
                self._add_board(board, allow_shared=allow_shared)
            return
        for device in asked:
            try:
                self._add_board(find_board(self._session, device), allow_shared=allow_shared)
            except EnergyError as error:
                self.unavailable[device] = error

    def _add_board(self, board: Board, *, allow_shared: bool) -> None:
        if board.uuid in {other.uuid for other in self._boards} or board.uuid in self.unavailable:
            return
        if board.is_mig():
            if not allow_shared:
                self.unavailable[board.uuid] = NotSupported(
                    "the GPU is split into MIG slices, and only the whole GPU has a counter; pass allow_shared=True to "
                    "meter all of it, other slices included"
                )
                return
            self.notes.append(f"{board.uuid}: the whole GPU is metered, all MIG slices included")
        try:
            self.sources.append(nvml_source(board, self.clock))
            self._boards.append(board)
        except EnergyError as error:
            self.unavailable[board.uuid] = error

    def _add_packages(self, *, require: bool) -> None:
        try:
            self.sources.extend(rapl.packages(clock=self.clock))
        except EnergyError as error:
            if require:
                raise
            self.unavailable["cpu"] = error
            return
        # when the CPU is metered, a missing driver is expected; one that does not respond is worth a note
        missing = self.unavailable.pop("gpu", None)
        if missing is not None and not isinstance(missing, LibraryMissing | DeviceMissing):
            self.notes.append(f"no GPU is metered: {missing}")

    def window(self, name: str, items: int | None = None) -> Window:
        """Create a window of work, for a `with` block.

        Args:
            name: any string; names need not be unique.
            items: number of items processed in it, for `joules_per_item`.

        Raises:
            WindowClosedError: the meter was closed.
        """
        self.check_open()
        return Window(self, name, items)

    def begin(self, name: str, items: int | None = None) -> Window:
        """Begin a window without a `with` block; call `end()` on the returned window to end it."""
        return self.window(name, items).begin()

    def lap(self, items: int | None = None, name: str | None = None) -> Energy:
        """Energy since the previous lap, or since the meter was created; see :meth:`Window.lap`."""
        lap = self._life.lap(items, name)
        self._life.laps.clear()
        return lap

    @property
    def total(self) -> Energy:
        """Energy from the creation of the meter to the latest :meth:`lap`: the exact sum of the laps."""
        return self._life.until_latest()

    def synchronize(self) -> None:
        """Wait for the work on the metered boards; in a forked child, restart sampling."""
        for sampler in self._samplers:
            sampler.ensure_running()
        if self._synchronize is not None:
            self._synchronize()
        else:
            cuda.synchronize(self._boards)

    def observe_context(self) -> list[str]:
        """Current disturbances on the metered boards: throttled clocks, other processes."""
        warnings = []
        for board in self._boards:
            reasons = board.throttle_reasons()
            if reasons:
                warnings.append(f"{board.uuid}: clocks are throttled by {', '.join(reasons)}")
            others = _other_processes(board)
            if others:
                warnings.append(f"{board.uuid}: the joules include those of {others} other process(es) on the GPU")
        return warnings

    def is_readable(self) -> bool:
        """Whether anything can be metered right now."""
        readings = read_boundary(self.sources, self.clock).readings.values()
        return any(not isinstance(reading, EnergyError) for reading in readings)

    def check_open(self) -> None:
        """Raise if the meter was closed.

        Raises:
            WindowClosedError: the meter was closed.
        """
        if self.closed:
            raise WindowClosedError("this meter was closed: create another EnergyMeter")

    def close(self) -> None:
        """Stop sampling and release NVML; otherwise this happens when the meter is garbage-collected.

        Open windows end with unknown energy, and no new ones can begin.
        """
        self.closed = True
        self._finalizer()
        if self._session is not None:
            self._session.close()

    def __repr__(self) -> str:
        names = {board.uuid: f" ({board.name})" for board in self._boards}
        metered = [f"{source.key}{names.get(source.key, '')} by {source.kind}" for source in self.sources]
        missed = [f"{device} not metered: {reason}" for device, reason in self.unavailable.items()]
        said = "; ".join([*(metered or ["nothing metered"]), *missed, *self.notes])
        return f"<EnergyMeter{', closed' if self.closed else ''}: {said}>"


def _other_processes(board: Board) -> int:
    pids = board.process_ids()
    if pids is None:
        return 0
    # in a container NVML may report the host's process ids: then one of them is ours if we have initialized CUDA
    ours = os.getpid() in pids or cuda.running_torch() is not None
    return max(len(pids) - ours, 0)


def _stop(samplers: list[Sampler]) -> None:
    for sampler in samplers:
        sampler.stop()
