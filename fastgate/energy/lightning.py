"""The old name of the energy callback of :mod:`fastgate.integrations.lightning`."""

from fastgate.integrations.lightning import EnergyCallback

__all__ = ["EnergyCallback"]
