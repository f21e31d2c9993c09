"""Energy of CPU packages through Linux' powercap tree (RAPL: Intel, and AMD since Linux 5.8)."""

import os
import threading
from pathlib import Path

from fastgate.energy.errors import EnergyError, NotSupported, PermissionDenied
from fastgate.energy.sources import Reading, stale_edges_bound

ROOT = Path("/sys/class/powercap")
# the counter wraps after some 262 kJ, at 1 kW within five minutes: read it more often than that
KEEP_SECONDS = 60.0


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


class RaplPackage:
    """One CPU package: cores, caches and memory controller, all processes.

    Raises:
        EnergyError: the counter cannot be read.
    """

    kind = "rapl"

    def __init__(self, name: str, folder: Path) -> None:
        self.key = f"cpu:{name}"
        self.tick: float | None = None
        self._folder = folder
        self._range = self._read_number("max_energy_range_uj")
        self._total = 0
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._last = self._read_number("energy_uj")

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

    def read(self) -> Reading:
        """The energy since this object was made, across wraps of the counter."""
        if self._pid != os.getpid():  # a forked child: the lock may be held by a thread that exists no more
            self._pid, self._lock = os.getpid(), threading.Lock()
        with self._lock:
            now = self._read_number("energy_uj")
            # the counter runs from 0 to the range and starts over
            self._total += now - self._last if now >= self._last else now - self._last + self._range
            self._last = now
            return Reading(self._total)

    def error_bound(self, begin: Reading, end: Reading, seconds: float) -> float | None:
        """See :func:`fastgate.energy.sources.stale_edges_bound`."""
        return stale_edges_bound(self.tick, begin, end, seconds)


def packages(root: Path | None = None) -> list[RaplPackage]:
    """Every CPU package. `psys`, `core` and `uncore` contain or are part of one, so they are never added.

    Raises:
        NotSupported: this machine shows none.
        EnergyError: one cannot be read.
    """
    found = {name: folder for name, folder in zones(root).items() if name.startswith("package-")}
    if not found:
        raise NotSupported(f"no RAPL packages under {root or ROOT} (usual in virtual machines and containers)")
    return [RaplPackage(name, folder) for name, folder in found.items()]
