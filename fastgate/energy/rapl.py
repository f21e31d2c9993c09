"""Energy of CPU packages through Linux' powercap tree (RAPL: Intel, and AMD since Linux 5.8)."""

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
# Counters start over after 65 or 262 kJ, at 1 kW in 65 s at the soonest. They are read far more often than that, since
# nothing but the power that a step implies tells a wrap from a reset: in a second, one as high is a rare chance.
_KEEP_SECONDS = 1.0
# a window says so where they were not read for longer
_BLIND_SECONDS = 3.0
# two views of one counter may be a renewal apart (1 ms at 500 W); two counters are so close in 1 of 10^5 cases at most
_ONE_COUNTER_MICROJOULES = 500_000


def zones(root: Path | None = None) -> dict[str, Path]:
    """Name -> folder of every zone that measures something of its own.

    Zones are told apart by their `name`, for intel-rapl:1 need not be a package. `intel-rapl-mmio` shows the same
    package a second time.
    """
    found: dict[str, Path] = {}
    for folder in sorted((root or ROOT).glob("*")):
        name = folder / "name"
        if name.is_file() and not folder.name.startswith("intel-rapl-mmio"):
            found.setdefault(name.read_text().strip(), folder)
    return found


class _Zone:
    """One counter file: from 0 up to its range, then from 0 again."""

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
                f"{path} may be read by root only (since CVE-2020-8694); run as root, or allow it with "
                f"`sudo chmod a+r {path}`"
            ) from error
        except (OSError, ValueError) as error:
            raise EnergyError(f"{path}: expected a number of microjoules, got {error}") from error


class RaplPackage:
    """One CPU package: cores, caches and memory controller, all processes.

    Linux shows a package of several dies as one zone per die. Where the register behind them is the package's (AMD
    Threadripper and EPYC), every zone mirrors the same counter, and adding them up would multiply the energy.
    What is one counter is seen at every reading: all zones are read twice in turn, so that the reading of one falls
    between two of the other; a counter that only grows lies between them, if it is the same. Counters of their own
    have unrelated values, and should two agree when the meter is made (both were reset a moment ago), they part as
    they advance. Zones that ever disagree are counters of their own from then on, and are added up.

    Raises:
        EnergyError: a counter cannot be read.
    """

    kind = "rapl"
    limit_watts: float | None = None  # what powercap says of limits is what firmware set, up to "unlimited"
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
        self._agreeing = self._pairs()  # those that have agreed at every reading
        self.read()

    def _pairs(self) -> set[tuple[int, int]]:
        """All pairs of zones, the one that is read earlier first."""
        return set(combinations(range(len(self._zones)), 2))

    def read(self) -> Reading:
        """The energy since this object was made, across wraps of the counters."""
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
            if breaks > self._breaks:  # a glitch tells nothing of what is one counter: look anew
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
        """Whether the value of zone j can be of the counter that zone i has read before and, in `again`, after it."""
        wrap, slack = self._zones[i].range, _ONE_COUNTER_MICROJOULES
        if self._zones[j].range != wrap:
            return False
        return (values[j] - values[i] + slack) % wrap <= (again[i] - values[i]) % wrap + 2 * slack

    def error_bound(self, begin: Reading, end: Reading, watts: float) -> float | None:
        """See :func:`fastgate.energy.sources.stale_edges_bound`."""
        return stale_edges_bound(self.tick, begin, end, watts)


def packages(root: Path | None = None, clock: Clock | None = None) -> list[RaplPackage]:
    """Every CPU package. `psys`, `core` and `uncore` contain or are part of one, so they are never added.

    Raises:
        NotSupported: this machine shows none.
        EnergyError: one cannot be read.
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
