"""What a network costs: MACs and FLOPs by fvcore's count, and what each gate switches of MACs, parameters or time.

One multiply-add is one MAC (and one of fvcore's FLOPs). Gate heads are not counted: they are gone from the network
that is shipped, and the paper leaves them out too.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastgate.gates import LayerGate, named_gates
from fastgate.models.block import ResidualBlock, gated_blocks
from fastgate.modes import eval_mode
from fastgate.pruning.latency import block_latencies, open_latency

COSTS = ("macs", "params", "latency")
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


def gate_costs(model: nn.Module, input_size: Sequence[int], cost: str = "macs") -> dict[str, Tensor]:
    """What each gate (channel) switches: gate name -> int64 `[gates]`, for one image of `input_size` (C, H, W).

    A closed layer gate removes its block's branch. A closed channel removes, at "middle", a row of the convolution
    before the gate and a column of the one behind it; at "before" a column of the first convolution; at "after" a row
    of the last one. The compact network has `macs(model)` minus the costs of everything closed, with one exception:
    where *all* channels of a gate are closed, convolutions that now feed nothing go as well, which is more than the
    channels switch one by one (at "after" the whole branch; at "middle" of a bottleneck its first convolution).

    Args:
        model: a gated network, on the device where its latency counts.
        input_size: (C, H, W) of one image.
        cost: `"macs"`; `"params"` (parameters, without those of gate heads); or `"latency"`: nanoseconds that one image
            takes less on this device, measured per block with its branch and without it (channel gates: with half of
            its channels, shared out evenly).

    Raises:
        ValueError: another cost.
    """
    _check_cost(cost)
    blocks = gated_blocks(model)
    if cost == "latency":
        return {
            name: torch.full((_gates(block),), nanoseconds)
            for (name, block), nanoseconds in zip(blocks.items(), block_latencies(model, input_size), strict=True)
        }
    count = _count_macs(model, input_size) if cost == "macs" else _count_parameters(model)
    return {name: _cost_of(block, count, name.rpartition(".")[0], cost) for name, block in blocks.items()}


def total_cost(model: nn.Module, input_size: Sequence[int], cost: str = "macs") -> int:
    """What the network costs with every gate open and without gate heads, in the units of :func:`gate_costs`."""
    _check_cost(cost)
    if cost == "macs":
        return macs(model, input_size)
    if cost == "params":
        in_gates = {parameter for _, gate in named_gates(model) for parameter in gate.parameters()}
        return sum(parameter.numel() for parameter in model.parameters() if parameter not in in_gates)
    return open_latency(model, input_size)


def _check_cost(cost: str) -> None:
    if cost not in COSTS:
        raise ValueError(f"cost: expected one of {', '.join(COSTS)}, got {cost!r}")


def _cost_of(block: ResidualBlock, count: Callable[[str], int], prefix: str, cost: str) -> Tensor:
    """MACs or parameters that a block's gate (channel) switches; `count` tells those of a module by name."""

    def of(child: str) -> int:
        return count(f"{prefix}.{child}" if prefix else child)

    if isinstance(block.gate, LayerGate):
        return torch.tensor([sum(of(child) for child in set(block.branch))])
    per_channel = 0
    for child, conv, dim in block.cut_convs():
        bias = conv.bias.numel() if cost == "params" and conv.bias is not None else 0
        per_channel += (of(child) - bias) // conv.weight.shape[dim]
        per_channel += bias // conv.out_channels if dim == 0 else 0
    if cost == "params":
        per_channel += sum(of(child) // _gates(block) for child in block.cut_with_gate())
    return torch.full((_gates(block),), per_channel)


def _count_macs(model: nn.Module, input_size: Sequence[int]) -> Callable[[str], int]:
    counts = _count(model, input_size)
    return lambda name: int(sum(counts[name][operator] for operator in _MAC_OPERATORS))


def _count_parameters(model: nn.Module) -> Callable[[str], int]:
    return lambda name: sum(parameter.numel() for parameter in model.get_submodule(name).parameters())


def _gates(block: ResidualBlock) -> int:
    return block.gate.gates  # type: ignore[union-attr]
