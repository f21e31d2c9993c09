"""Energy of CPU packages through Linux' powercap tree (RAPL: Intel, and AMD since Linux 5.8)."""

import os
import re
import threading
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from fastgate.energy.errors import EnergyError, NotSupported, PermissionDenied
from fastgate.energy.sources import Reading, stale_edges_bound

ROOT = Path("/sys/class/powercap")
# the counter wraps after some 262 kJ, at 1 kW within five minutes: read it more often than that
KEEP_SECONDS = 60.0
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
        self.last = self.read()

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

    def advance(self, now: int) -> int:
        """Microjoules since the last call."""
        step = now - self.last if now >= self.last else now - self.last + self.range
        self.last = now
        return step


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

    def __init__(self, name: str, folders: Sequence[Path]) -> None:
        self.key = f"cpu:{name}"
        self.tick: float | None = None
        self._zones = [_Zone(folder) for folder in folders]
        self._total = 0
        self._pid = os.getpid()
        self._lock = threading.Lock()
        # pairs of zones (the earlier first) that have agreed at every reading
        self._agreeing = set(combinations(range(len(self._zones)), 2))
        self.read()
        self._total = 0

    def read(self) -> Reading:
        """The energy since this object was made, across wraps of the counters."""
        if self._pid != os.getpid():  # a forked child: the lock may be held by a thread that exists no more
            self._pid, self._lock = os.getpid(), threading.Lock()
        with self._lock:
            values = [zone.read() for zone in self._zones]
            if self._agreeing:
                again = [zone.read() for zone in self._zones]
                self._agreeing = {
                    (i, j)
                    for i, j in self._agreeing
                    if self._zones[i].range == self._zones[j].range
                    and _lies_between(values[i], values[j], again[i], self._zones[i].range)
                }
            mirrors = {j for _, j in self._agreeing}
            steps = [zone.advance(value) for zone, value in zip(self._zones, values, strict=True)]
            self._total += sum(step for i, step in enumerate(steps) if i not in mirrors)
            return Reading(self._total)

    def error_bound(self, begin: Reading, end: Reading, seconds: float) -> float | None:
        """See :func:`fastgate.energy.sources.stale_edges_bound`."""
        return stale_edges_bound(self.tick, begin, end, seconds)


def _lies_between(first: int, value: int, again: int, wrap: int) -> bool:
    """Whether `value`, read after `first` and before `again`, can be of the same counter, which starts over at `wrap`.

    All in microjoules.
    """
    slack = _ONE_COUNTER_MICROJOULES
    return (value - first + slack) % wrap <= (again - first) % wrap + 2 * slack


def packages(root: Path | None = None) -> list[RaplPackage]:
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
    return [RaplPackage(name, folders) for name, folders in found.items()]
