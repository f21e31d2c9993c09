"""Energy metering of any window of work: NVIDIA GPUs through NVML, CPUs through RAPL, otherwise None with the reason.

Works without torch. Callbacks for other trainers are in :mod:`fastgate.integrations`.
"""

from fastgate.energy.errors import EnergyError, WindowOpenError
from fastgate.energy.measurement import measure_energy
from fastgate.energy.meter import EnergyMeter
from fastgate.energy.results import Energy
from fastgate.energy.windows import Window

__all__ = ["Energy", "EnergyError", "EnergyMeter", "Window", "WindowOpenError", "measure_energy"]
