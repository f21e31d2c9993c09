"""Errors of energy metering: one type per cause; every message names a remedy."""


class EnergyError(RuntimeError):
    """Energy cannot be metered; the message says why and what to do."""


class LibraryMissing(EnergyError):
    """The NVML library or usable Python bindings for it are missing."""


class DriverMissing(EnergyError):
    """The NVIDIA kernel driver is not loaded."""


class VersionMismatch(EnergyError):
    """The NVML library and the kernel driver have different versions."""


class PermissionDenied(EnergyError):
    """The device or file exists, but this process may not read it."""


class DeviceMissing(EnergyError):
    """There is no such device."""


class DeviceLost(EnergyError):
    """The GPU has fallen off the bus or needs a reset."""


class NotSupported(EnergyError):
    """The device or the installed driver does not offer this reading."""


class WindowOpenError(EnergyError):
    """A window's result was read before it ended, or the window was entered while open."""


class WindowClosedError(EnergyError):
    """A window has ended, or its meter was closed."""
