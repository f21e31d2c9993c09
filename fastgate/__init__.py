"""Networks that prune themselves while they train: binary gates, then a plain, physically smaller network."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors
    from fastgate import energy, functional, losses, models, schedules
    from fastgate.api import train
    from fastgate.energy import EnergyMeter, measure_energy
    from fastgate.gates import ChannelGate, LayerGate, named_gates
    from fastgate.losses import activation, budget, polarization
    from fastgate.models.attachment import attach
    from fastgate.models.layout import register_block
    from fastgate.optim import parameter_groups
    from fastgate.pruning.commitment import commit
    from fastgate.pruning.compaction import compact
    from fastgate.pruning.comparison import compare
    from fastgate.pruning.config import SearchConfig
    from fastgate.pruning.costs import flops, gate_costs, macs
    from fastgate.pruning.decisions import Decisions, decide, freeze
    from fastgate.pruning.export import export_onnx, export_pt2, fuse
    from fastgate.pruning.search import GateSearch
    from fastgate.pruning.storage import load, save
    from fastgate.tuning import tune

__version__ = "0.2.0"

# the module of each public name; names are imported on first use, so that `fastgate.energy` does not need torch
_HOMES = {
    "fastgate": ("energy", "functional", "losses", "models", "schedules"),
    "fastgate.api": ("train",),
    "fastgate.energy": ("EnergyMeter", "measure_energy"),
    "fastgate.gates": ("ChannelGate", "LayerGate", "named_gates"),
    "fastgate.losses": ("activation", "budget", "polarization"),
    "fastgate.models.attachment": ("attach",),
    "fastgate.models.layout": ("register_block",),
    "fastgate.optim": ("parameter_groups",),
    "fastgate.pruning.commitment": ("commit",),
    "fastgate.pruning.compaction": ("compact",),
    "fastgate.pruning.comparison": ("compare",),
    "fastgate.pruning.config": ("SearchConfig",),
    "fastgate.pruning.costs": ("flops", "gate_costs", "macs"),
    "fastgate.pruning.decisions": ("Decisions", "decide", "freeze"),
    "fastgate.pruning.export": ("export_onnx", "export_pt2", "fuse"),
    "fastgate.pruning.search": ("GateSearch",),
    "fastgate.pruning.storage": ("load", "save"),
    "fastgate.tuning": ("tune",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605 (a test compares it with the imports above)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastgate' has no attribute {name!r}")
    home = _HOME[name]
    found = import_module(f"fastgate.{name}") if home == "fastgate" else getattr(import_module(home), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
