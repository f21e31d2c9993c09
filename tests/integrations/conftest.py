"""The energy callbacks are tested against the fake NVML of tests/energy."""

from tests.energy.conftest import fake, library, machine, old_fake, old_library

__all__ = ["fake", "library", "machine", "old_fake", "old_library"]
