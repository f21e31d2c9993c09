"""The old name of the energy callback of :mod:`fastgate.integrations.transformers`."""

from fastgate.integrations.transformers import EnergyCallback

__all__ = ["EnergyCallback"]
