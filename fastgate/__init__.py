"""Networks that prune themselves while they train: binary gates, then a plain, physically smaller network."""

from fastgate import functional, models, schedules
from fastgate.gates import ChannelGate, LayerGate, named_gates
from fastgate.losses import activation, budget, polarization
from fastgate.models.attachment import attach, register_block
from fastgate.pruning.compaction import compact, compare
from fastgate.pruning.costs import flops, gate_costs, macs
from fastgate.pruning.decisions import Decisions, decide, freeze
from fastgate.pruning.storage import load, save

__version__ = "0.1.0"

__all__ = [
    "ChannelGate",
    "Decisions",
    "LayerGate",
    "activation",
    "attach",
    "budget",
    "compact",
    "compare",
    "decide",
    "flops",
    "freeze",
    "functional",
    "gate_costs",
    "load",
    "macs",
    "models",
    "named_gates",
    "polarization",
    "register_block",
    "save",
    "schedules",
]
