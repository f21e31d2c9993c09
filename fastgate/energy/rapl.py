"""Energy of CPU packages through Linux's powercap interface (RAPL: Intel, and AMD since Linux 5.8)."""

import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from fastgate.energy.errors import EnergyError, NotSupported, PermissionDenied
from fastgate.energy.locks import ForkLock
from fastgate.energy.sources import Clock, Reading, stale_edges_bound
from fastgate.energy.trail import Trail

ROOT = Path("/sys/class/powercap")
# no CPU package draws more (an AMD MI300A: 0.76 kW)
_NO_PACKAGE_WATTS = 1000.0
# Counters wrap after 65 or 262 kJ, at 1 kW after 65 s at the earliest. They are read far more often, since only the
# power implied by a step distinguishes a wrap from a reset, and within a second a reset rarely looks like a wrap.
_KEEP_SECONDS = 1.0
# longer gaps between readings are reported in the window
_BLIND_SECONDS = 3.0
# two views of one counter may be an update apart (1 ms at 500 W); two counters are that close in at most 1 of 10^5
_ONE_COUNTER_MICROJOULES = 500_000


def zones(root: Path | None = None) -> dict[str, Path]:
    """Name -> folder of every distinct zone.

    Zones are identified by their `name`, as intel-rapl:1 need not be a package. `intel-rapl-mmio` shows the same
    package a second time.
    """
    found: dict[str, Path] = {}
    for folder in sorted((root or ROOT).glob("*")):
        name = folder / "name"
        if name.is_file() and not folder.name.startswith("intel-rapl-mmio"):
            found.setdefault(name.read_text().strip(), folder)
    return found


class _Zone:
    """One counter file, which counts from 0 up to its range and then wraps to 0."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.range = self._read_number("max_energy_range_uj")
        if self.range <= 0:
            raise EnergyError(f"{folder}/max_energy_range_uj: expected a number above 0, got {self.range}")
        self.trail = Trail(_NO_PACKAGE_WATTS, self.range)

    def read(self) -> int:
        return self._read_number("energy_uj")

    def _read_number(self, file: str) -> int:
        path = self._folder / file
        try:
            return int(path.read_text())
        except PermissionError as error:
            raise PermissionDenied(
                f"{path} can be read only by root (since CVE-2020-8694); run as root, or allow reading with "
                f"`sudo chmod a+r {path}`"
            ) from error
        except (OSError, ValueError) as error:
            raise EnergyError(f"{path}: expected a number of microjoules, got {error}") from error


class RaplPackage:
    """One CPU package: cores, caches and memory controller, for all processes.

    Linux shows a package with several dies as one zone per die. If they share the package's register (AMD Threadripper
    and EPYC), every zone mirrors the same counter, and adding them up would multiply the energy. Mirrors are detected
    at every reading: all zones are read twice in turn, so that each reading of one zone falls between two of another;
    since a counter only grows, a mirror's value lies between those two. Separate counters have unrelated values; even
    if two agree when the meter is created (both just reset), they diverge as they advance. Zones that ever disagree
    count as separate from then on, and are added up.

    Raises:
        EnergyError: a counter cannot be read.
    """

    kind = "rapl"
    limit_watts: float | None = None  # powercap's limits are whatever the firmware set, up to "unlimited"
    possible_watts: float = _NO_PACKAGE_WATTS
    sample_seconds = _KEEP_SECONDS
    reads_power = False

    def __init__(self, name: str, folders: Sequence[Path], clock: Clock) -> None:
        self.key = f"cpu:{name}"
        self.tick: float | None = None
        self._zones = [_Zone(folder) for folder in folders]
        self._clock = clock
        self._lock = ForkLock()
        self._microjoules = self._breaks = 0
        self._read_at, self._blind = clock.now(), 0.0
        self._agreeing = self._pairs()  # pairs that have agreed at every reading
        self.read()

    def _pairs(self) -> set[tuple[int, int]]:
        """All pairs of zones, the one read earlier first."""
        return set(combinations(range(len(self._zones)), 2))

    def read(self) -> Reading:
        """Energy since this object was created, across wraps of the counters."""
        with self._lock:
            before = self._clock.now()
            values = [zone.read() for zone in self._zones]
            after = self._clock.now()
            gap, self._read_at = after - self._read_at, before
            self._blind += gap if gap > _BLIND_SECONDS else 0.0
            again = [zone.read() for zone in self._zones] if self._agreeing else values
            trails = [zone.trail for zone in self._zones]
            steps = [trail.follow(value, before, after, self.tick) for trail, value in zip(trails, values, strict=True)]
            breaks = sum(trail.breaks for trail in trails)
            if breaks > self._breaks:  # a glitch says nothing about mirrors: start over
                self._breaks, self._agreeing = breaks, self._pairs()
            else:
                self._agreeing = {(i, j) for i, j in self._agreeing if self._agree(i, j, values, again)}
            mirrors = {j for _, j in self._agreeing}
            self._microjoules += sum(step for i, step in enumerate(steps) if i not in mirrors)
            return Reading(
                self._microjoules,
                before,
                after,
                breaks=breaks,
                reason=max(trails, key=lambda trail: trail.broken_at).reason,
                still_seconds=max(trail.still_seconds for trail in trails),
                doubt_joules=sum(trail.doubt_microjoules for trail in trails) / 1e6,
                blind_seconds=self._blind,
            )

    def _agree(self, i: int, j: int, values: Sequence[int], again: Sequence[int]) -> bool:
        """Whether zone j can mirror zone i, which was read before and, in `again`, after it."""
        wrap, slack = self._zones[i].range, _ONE_COUNTER_MICROJOULES
        if self._zones[j].range != wrap:
            return False
        return (values[j] - values[i] + slack) % wrap <= (again[i] - values[i]) % wrap + 2 * slack

    def error_bound(self, begin: Reading, end: Reading, watts: float) -> float | None:
        """See :func:`fastgate.energy.sources.stale_edges_bound`."""
        return stale_edges_bound(self.tick, begin, end, watts)


def packages(root: Path | None = None, clock: Clock | None = None) -> list[RaplPackage]:
    """All CPU packages. `psys`, `core` and `uncore` contain a package or are part of one, so they are never added.

    Raises:
        NotSupported: this machine has none.
        EnergyError: a counter cannot be read.
    """
    found: dict[str, list[Path]] = {}
    for zone, folder in zones(root).items():
        name = re.match(r"package-[0-9]+", zone)  # package-0, or package-0-die-1
        if name is not None:
            found.setdefault(name[0], []).append(folder)
    if not found:
        raise NotSupported(f"no RAPL packages under {root or ROOT} (usual in virtual machines and containers)")
    clock = clock or Clock()
    return [RaplPackage(name, folders, clock) for name, folders in found.items()]
