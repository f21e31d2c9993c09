"""What a network costs: MACs and FLOPs by fvcore's count, and the MACs that each gate switches.

One multiply-add is one MAC (and one of fvcore's FLOPs). Gate heads are not counted: they are gone from the network
that is shipped, and the paper leaves them out too.
"""

import warnings
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgate.gates import LayerGate, named_gates
from fastgate.models.block import ResidualBlock
from fastgate.modes import eval_mode

_MAC_OPERATORS = ("conv", "linear", "addmm", "bmm", "matmul")


def _count(model: nn.Module, input_size: Sequence[int]) -> dict[str, Counter[str]]:
    """fvcore's count for one sample in eval mode: module name -> operator -> FLOPs; "" is the whole model."""
    with warnings.catch_warnings():
        # fvcore's import uses torch.jit.script, which recent versions of PyTorch call deprecated
        warnings.simplefilter("ignore", category=FutureWarning)
        warnings.simplefilter("ignore", category=DeprecationWarning)
        from fvcore.nn import FlopCountAnalysis

    if len(input_size) not in (3, 4) or any(int(n) < 1 for n in input_size):
        raise ValueError(f"input_size: expected (C, H, W) of one image, got {tuple(input_size)}")
    image = tuple(int(n) for n in input_size[-3:])
    parameter = next(model.parameters(), torch.zeros(()))
    # the count must not disturb a training step: the gates' last decisions stay where they are
    last = {gate: (gate.logits, gate.decisions) for _, gate in named_gates(model)}
    try:
        with torch.no_grad(), eval_mode(model):
            analysis = FlopCountAnalysis(model, parameter.new_zeros(1, *image))
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
            return {name: Counter(count) for name, count in analysis.by_module_and_operator().items()}
    finally:
        for gate, (logits, decisions) in last.items():
            gate.logits, gate.decisions = logits, decisions


def _without_gates(model: nn.Module, counts: dict[str, Counter[str]]) -> Counter[str]:
    total = Counter(counts[""])
    for name, _ in named_gates(model):
        total.subtract(counts[name])
    return total


def macs(model: nn.Module, input_size: Sequence[int]) -> int:
    """Multiply-adds of convolutions and linear layers for one image of `input_size` (C, H, W), gate heads left out.

    Counted by fvcore in eval mode; a gated network counts as if every gate were open.
    """
    total = _without_gates(model, _count(model, input_size))
    return int(sum(total[name] for name in _MAC_OPERATORS))


def flops(model: nn.Module, input_size: Sequence[int]) -> int:
    """fvcore's full count for one image of `input_size` (C, H, W), gate heads left out: the paper's column.

    One multiply-add is one FLOP, batch norm in eval mode is two per element. ResNet-110 at (3, 32, 32): 255.27 M.
    """
    return int(sum(_without_gates(model, _count(model, input_size)).values()))


def gated_blocks(model: nn.Module) -> dict[str, ResidualBlock]:
    """Every gate's block, by the gate's name.

    Raises:
        ValueError: a gate outside a residual block of this library, whose computation is unknown here.
    """
    blocks = {}
    for name, _ in named_gates(model):
        parent = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(parent, ResidualBlock) or not name.endswith("gate"):
            raise ValueError(
                f"gate {name!r}: expected it in a residual block placed by fastgate.attach(), got it in "
                f"{type(parent).__name__}; declare that class with fastgate.register_block() and attach the gates"
            )
        blocks[name] = parent
    return blocks


def gate_costs(model: nn.Module, input_size: Sequence[int]) -> dict[str, Tensor]:
    """MACs that each gate (channel) switches: gate name -> int64 `[gates]`, for one image of `input_size` (C, H, W).

    A closed layer gate removes its block's branch. A closed channel removes, at "middle", a row of the convolution
    before the gate and a column of the one behind it; at "before" a column of the first convolution; at "after" a row
    of the last one. The compact network has `macs(model)` minus the costs of everything closed, with one exception:
    where *all* channels of a gate are closed, convolutions that now feed nothing go as well, which is more than the
    channels switch one by one (at "after" the whole branch; at "middle" of a bottleneck its first convolution).
    """
    counts = _count(model, input_size)

    def count(prefix: str, child: str) -> int:
        name = f"{prefix}.{child}" if prefix else child
        return int(sum(counts[name][operator] for operator in _MAC_OPERATORS))

    costs = {}
    for name, block in gated_blocks(model).items():
        prefix = name.rpartition(".")[0]
        if isinstance(block.gate, LayerGate):
            costs[name] = torch.tensor([sum(count(prefix, child) for child in set(block.branch))])
        else:
            per_channel = sum(count(prefix, child) // conv.weight.shape[dim] for child, conv, dim in block.cut_convs())
            costs[name] = torch.full((block.gate.gates,), per_channel)  # type: ignore[union-attr]
    return costs
