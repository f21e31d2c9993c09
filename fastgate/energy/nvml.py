"""NVML through nvidia-ml-py: one session per meter, boards by UUID, return codes as typed errors."""

import os
import weakref
from types import ModuleType
from typing import Any

from fastgate.energy.errors import (
    DeviceLost,
    DeviceMissing,
    DriverMissing,
    EnergyError,
    LibraryMissing,
    NotSupported,
    PermissionDenied,
    VersionMismatch,
)

# NVML return code -> error type, and message with remedy
_ERRORS: dict[int, tuple[type[EnergyError], str]] = {
    3: (NotSupported, "this board does not offer the reading"),
    4: (PermissionDenied, "no permission; give this user or container access to the GPU"),
    6: (DeviceMissing, "there is no such device; see `nvidia-smi -L`"),
    9: (DriverMissing, "the NVIDIA kernel driver is not loaded; run `nvidia-smi`, and reboot or `modprobe nvidia`"),
    12: (
        LibraryMissing,
        "libnvidia-ml.so.1 was not found; install the NVIDIA driver, or give the container the driver capability "
        "'utility' (NVIDIA_DRIVER_CAPABILITIES=compute,utility)",
    ),
    13: (NotSupported, "the installed driver is too old to know this call; update the driver"),
    15: (DeviceLost, "the GPU fell off the bus; look at `dmesg`, reset the GPU or reboot"),
    16: (DeviceLost, "the GPU needs a reset; run `nvidia-smi --gpu-reset` or reboot"),
    18: (
        VersionMismatch,
        "the NVML library and the kernel driver have different versions (an update without a reboot?); reboot, or "
        "let the container use the host's library",
    ),
}

# throttle reasons; other reasons for low clocks (idle, user settings) are not throttling
_THROTTLES = {
    4: "the power cap",
    8: "a hardware slowdown",
    32: "temperature",
    64: "temperature (hardware)",
    128: "the power brake",
}

_POWER_AVERAGE, _POWER_INSTANT = 185, 186  # field ids, for the scope of the whole GPU (0)


def load_bindings() -> ModuleType:
    """The module `pynvml` of the package nvidia-ml-py.

    Raises:
        LibraryMissing: it is not installed, or another package uses its name.
    """
    try:
        import pynvml
    except ImportError as error:
        raise LibraryMissing(f"nvidia-ml-py cannot be imported ({error}); run `pip install nvidia-ml-py`") from error
    if not hasattr(pynvml, "_nvmlGetFunctionPointer"):
        raise LibraryMissing(
            f"pynvml at {getattr(pynvml, '__file__', '?')} is not NVIDIA's; run `pip uninstall pynvml nvidia-ml-py3` "
            "and `pip install --force-reinstall nvidia-ml-py`"
        )
    return pynvml


class Session:
    """An initialized NVML session. NVML counts its users, so sessions are independent of one another.

    Raises:
        EnergyError: NVML is not usable (no library, no driver, different versions).
    """

    def __init__(self) -> None:
        self._bindings = load_bindings()
        self._open()

    def _open(self) -> None:
        self.call("nvmlInit")
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, _shut_down, self._bindings, self._pid)

    def renew_after_fork(self) -> None:
        """Reinitialize NVML in a forked child, where the parent's handles must not be used."""
        if self._pid != os.getpid():
            self._finalizer.detach()
            self._open()

    def close(self) -> None:
        """Release NVML; may be called more than once."""
        self._finalizer()

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the bindings.

        Raises:
            EnergyError: of the type that corresponds to NVML's return code.
        """
        try:
            found = getattr(self._bindings, function)
        except AttributeError:
            raise NotSupported(f"{function}: unknown to this nvidia-ml-py; update the package") from None
        try:
            return found(*arguments)
        except self._bindings.NVMLError as error:
            kind, remedy = _ERRORS.get(error.value, (EnergyError, f"NVML says: {error}"))
            raise kind(f"{function}: {remedy}") from error

    def version(self, function: str) -> str | None:
        """A version string, from nvmlSystemGetDriverVersion or nvmlSystemGetNVMLVersion."""
        try:
            return _text(self.call(function))
        except EnergyError:
            return None

    def boards(self) -> tuple[list["Board"], list[str]]:
        """All boards that this process may use, in PCI order, and the reasons why others are left out.

        Like CUDA, the list does not contain boards hidden by a container or cgroup.
        """
        boards, refused = [], []
        for index in range(self.call("nvmlDeviceGetCount")):
            try:
                handle = self.call("nvmlDeviceGetHandleByIndex", index)
                boards.append(Board(self, _text(self.call("nvmlDeviceGetUUID", handle))))
            except (PermissionDenied, DeviceLost) as error:
                refused.append(f"NVML device {index} is not metered: {error}")
        if all(board.pci_bus_id is not None for board in boards):
            boards.sort(key=lambda board: board.pci_bus_id or "")
        elif len(boards) > 1:
            refused.append("this driver does not report PCI ids: GPUs are listed in NVML's order")
        return boards, refused


def _shut_down(bindings: ModuleType, pid: int) -> None:
    if pid == os.getpid():  # a forked child must not end its parent's session
        try:
            bindings.nvmlShutdown()
        except bindings.NVMLError:  # other code shut NVML down once too often: nothing left to do
            return


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


class Board:
    """One GPU board, identified by its UUID.

    Raises:
        EnergyError: there is no such board, or it cannot be used.
    """

    def __init__(self, session: Session, uuid: str) -> None:
        self._session = session
        self.uuid = uuid
        self._find()
        self.name = _text(session.call("nvmlDeviceGetName", self._handle))
        self.pci_bus_id = self._pci_bus_id()

    def _find(self) -> None:
        self._handle = self._session.call("nvmlDeviceGetHandleByUUID", self.uuid)
        self._pid = os.getpid()

    def call(self, function: str, *arguments: Any) -> Any:
        """Call an NVML function on this board."""
        if self._pid != os.getpid():
            self._session.renew_after_fork()
            self._find()
        return self._session.call(function, self._handle, *arguments)

    def _try(self, function: str, *arguments: Any) -> Any:
        """The same, or None if the reading is not available."""
        try:
            return self.call(function, *arguments)
        except EnergyError:
            return None

    def _pci_bus_id(self) -> str | None:
        info = self._try("nvmlDeviceGetPciInfo")
        return None if info is None else _text(info.busId).lower()

    def read_millijoules(self) -> int:
        """The energy counter: millijoules since the driver was loaded."""
        return int(self.call("nvmlDeviceGetTotalEnergyConsumption"))

    def read_milliwatts(self) -> int:
        """Instantaneous power if the board supports it, otherwise the value of `nvmlDeviceGetPowerUsage`."""
        try:
            return self._read_field(_POWER_INSTANT)
        except NotSupported:
            return int(self.call("nvmlDeviceGetPowerUsage"))

    def reads_instant_power(self) -> bool:
        """Whether :meth:`read_milliwatts` is instantaneous power, not an average."""
        return self.power_readings()["instant"] is not None

    def _read_field(self, field: int) -> int:
        value = self.call("nvmlDeviceGetFieldValues", [field])[0]
        # the call as a whole succeeds; each element says whether the board supports the field
        if value.nvmlReturn != 0:
            kind, remedy = _ERRORS.get(value.nvmlReturn, (EnergyError, f"NVML return code {value.nvmlReturn}"))
            raise kind(f"nvmlDeviceGetFieldValues({field}): {remedy}")
        return int(value.value.uiVal)

    def power_readings(self) -> dict[str, float | None]:
        """Watts from each kind of power reading; None for those that the board does not support."""

        def watts(read: Any, *arguments: Any) -> float | None:
            try:
                return float(read(*arguments)) / 1000
            except EnergyError:
                return None

        return {
            "instant": watts(self._read_field, _POWER_INSTANT),
            "average": watts(self._read_field, _POWER_AVERAGE),
            "usage": watts(self.call, "nvmlDeviceGetPowerUsage"),
        }

    def power_limit_watts(self) -> float | None:
        """The enforced power limit; None if unknown."""
        milliwatts = self._try("nvmlDeviceGetEnforcedPowerLimit")
        return None if milliwatts is None else milliwatts / 1000

    def highest_power_limit_watts(self) -> float | None:
        """The highest power limit that may be enforced at any time; None if unknown."""
        constraints = self._try("nvmlDeviceGetPowerManagementLimitConstraints")
        limits = [self.power_limit_watts(), None if constraints is None else constraints[1] / 1000]
        return max((limit for limit in limits if limit is not None), default=None)

    def temperature_celsius(self) -> int | None:
        """The temperature of the GPU; None if unknown."""
        celsius = self._try("nvmlDeviceGetTemperature", 0)
        return None if celsius is None else int(celsius)

    def process_ids(self) -> list[int] | None:
        """Ids of compute processes on this board; None if unknown; in a container they may be the host's ids."""
        processes = self._try("nvmlDeviceGetComputeRunningProcesses")
        return None if processes is None else [process.pid for process in processes]

    def throttle_reasons(self) -> list[str]:
        """Reasons why the clocks are throttled now; empty if they are not, or if unknown."""
        bits = self._try("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
        return [reason for bit, reason in _THROTTLES.items() if bits & bit]

    def is_mig(self) -> bool:
        """Whether the board is split into MIG slices, which have no energy counters of their own."""
        mode = self._try("nvmlDeviceGetMigMode")
        return mode is not None and mode[0] == 1

    def mig_uuids(self) -> list[str]:
        """UUIDs of the board's MIG slices."""
        uuids = []
        for index in range(self._try("nvmlDeviceGetMaxMigDeviceCount") or 0):
            slice_handle = self._try("nvmlDeviceGetMigDeviceHandleByIndex", index)
            if slice_handle is not None:
                uuids.append(_text(self._session.call("nvmlDeviceGetUUID", slice_handle)))
        return uuids
