"""Joules of any window of work: NVIDIA boards through NVML, CPUs through RAPL, else None and the reason.

Works without torch. Callbacks for other trainers: `fastgate.energy.lightning`, `fastgate.energy.transformers`.
"""

from fastgate.energy.errors import EnergyError, WindowOpenError
from fastgate.energy.measurement import measure_energy
from fastgate.energy.meter import EnergyMeter
from fastgate.energy.results import Energy
from fastgate.energy.windows import Window

__all__ = ["Energy", "EnergyError", "EnergyMeter", "Window", "WindowOpenError", "measure_energy"]
