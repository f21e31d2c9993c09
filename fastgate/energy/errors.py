"""Why energy cannot be metered: one type per cause, and every message names the remedy."""


class EnergyError(RuntimeError):
    """Energy cannot be metered; the message says why and what to do."""


class LibraryMissing(EnergyError):
    """There is no NVML library, or no usable Python bindings for it."""


class DriverMissing(EnergyError):
    """The NVIDIA kernel driver is not loaded."""


class VersionMismatch(EnergyError):
    """The NVML library and the kernel driver are of different versions."""


class PermissionDenied(EnergyError):
    """The device or file exists, but this process may not read it."""


class DeviceMissing(EnergyError):
    """There is no such device."""


class DeviceLost(EnergyError):
    """The GPU fell off the bus or waits for a reset."""


class NotSupported(EnergyError):
    """The device or the installed driver does not offer this reading."""


class WindowOpenError(EnergyError):
    """A window was asked for its result before it ended, or entered while it is open."""


class WindowClosedError(EnergyError):
    """A window has ended, or its meter was closed."""
