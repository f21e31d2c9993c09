"""Costs of a network in MACs and FLOPs, and the cost of each gate in MACs, parameters or time.

One multiply-add is one MAC (and one of fvcore's FLOPs). Gate heads are not counted: they are not part of the final
network, and the paper leaves them out too.

Every function takes `inputs`: a size (C, H, W), meaning one image of zeros; or example inputs, whose exact cost is
counted: a tensor, a mapping of keyword arguments, a tuple of positional arguments, or anything else, such as a list of
images, as the only argument. `forward(model, inputs)` calls networks with another calling convention.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastgate.gates import LayerGate, named_gates
from fastgate.losses import under_layers
from fastgate.models.block import Gated, ResidualBlock, gated_blocks
from fastgate.models.cutting import share_of_channel
from fastgate.models.gated import Closed, GatedModule, owner_of
from fastgate.pruning.counting import count_macs
from fastgate.pruning.latency import block_latencies, open_latency
from fastgate.pruning.probe import check_reached, example_of, open_for_probing
from fastgate.values import Forward, call, tensors_in, with_tensors

COSTS = ("macs", "params", "latency")


class Costs(dict[str, Tensor]):
    """Cost of each gate (channel) of a network, `[gates]` by name, and of the whole network.

    Attributes:
        total: cost of the network with every gate open, in the same units.
        switchable: sum of the gates' costs, exact whatever device or dtype they have.
        within: for each channel gate inside a gated layer (`gating="both"`), that layer's gate, which closes its
            channels too: their cost counts with the product of both decisions.
    """

    total: int
    switchable: int
    within: Mapping[str, str]

    def __init__(self, costs: Mapping[str, Tensor], total: int, within: Mapping[str, str] | None = None) -> None:
        super().__init__(costs)
        self.total = total
        self.within = dict(within or {})
        self.switchable = sum(int(cost.sum()) for cost in costs.values())

    def copy(self) -> "Costs":
        """A shallow copy."""
        return copy.copy(self)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Costs":
        """Copy the costs to a device, so that losses need not do so in every step; the sums stay exact."""
        moved = self.copy()
        moved.update({name: cost.to(device, dtype) for name, cost in self.items()})
        return moved

    def of(self, decisions: Mapping[str, Tensor]) -> float:
        """Cost of the network under these decisions, or mean decisions, `[gates]` by name."""
        opened = under_layers(decisions, self.within)
        return self.total - sum(float((cost * (1 - opened[name].double())).sum()) for name, cost in self.items())


def macs(model: nn.Module, inputs: Any, *, forward: Forward | None = None) -> int:
    """Count the multiply-adds of a network in eval mode, with every gate open and without gate heads.

    Convolutions and matrix products count: linear layers, `matmul` and `einsum`, attention, recurrent layers. A warning
    names operations that cannot be counted, such as quantized layers or operators of other libraries. Masked attention
    and products with sparse operands count in full.

    Args:
        model: any network.
        inputs: (C, H, W) of one image, or example inputs: see :mod:`fastgate.pruning.costs`.
        forward: `(model, inputs) -> outputs`, for networks with another calling convention.

    Raises:
        ValueError: integers that are not an image size.
    """
    return count_macs(model, example_of(model, inputs), forward).total


def flops(model: nn.Module, inputs: Any, *, forward: Forward | None = None) -> int:
    """Count FLOPs with fvcore in eval mode, with every gate open and without gate heads, as the paper's tables do.

    One multiply-add is one FLOP; batch norm in eval mode is two per element. ResNet-110 at (3, 32, 32): 255.27 M.
    The arguments are those of :func:`macs`. fvcore traces the network: it silently leaves out operations it does not
    know, such as attention, and `forward` has to compute with the tensors in `inputs`. The extra `flops` installs it.
    """
    with warnings.catch_warnings():
        # importing fvcore uses torch.jit.script, which is deprecated in recent versions of PyTorch
        warnings.simplefilter("ignore", category=FutureWarning)
        warnings.simplefilter("ignore", category=DeprecationWarning)
        try:
            from fvcore.nn import FlopCountAnalysis
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("fvcore is not installed; run `pip install 'fastgate[flops]'`") from error

    example = example_of(model, inputs)
    with open_for_probing(model):
        traced = _Traced(model, example, forward).eval()
        analysis = FlopCountAnalysis(traced, tuple(tensors_in(example)))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        counts = analysis.by_module()
    return int(counts[""] - sum(counts[f"model.{name}"] for name, _ in named_gates(model)))


class _Traced(nn.Module):
    """A network in the form the tracer needs: input tensors as arguments, output tensors as a tuple."""

    def __init__(self, model: nn.Module, example: Any, forward: Forward | None) -> None:
        super().__init__()
        self.model, self.example, self.call = model, example, forward

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_in(call(self.model, with_tensors(self.example, tensors), self.call)))


def gate_costs(model: nn.Module, inputs: Any, cost: str = "macs", *, forward: Forward | None = None) -> Costs:
    """Cost that closing each gate (channel) saves: gate name -> int64 `[gates]`, for one image or for example inputs.

    The attribute `total` is the cost of the whole network with every gate open.

    A closed layer gate removes the branch of its block (or of its sum). Costs controlled by channel gates inside that
    branch (`gating="both"`) count for the channel gates only, so that costs add up if the channels of a closed layer
    count as closed too: see :meth:`Costs.of`. A closed channel removes, at "middle", a row of the convolution before
    the gate and a column of the one after it; at "before", a column of the first convolution; at "after", a row of the
    last one. The compact network has `macs(model)` minus the costs of everything closed, with one exception. If *all*
    channels of a gate are closed, convolutions that no longer feed anything are removed as well, which saves more than
    the sum of the channels (at "after" the whole branch; at "middle" of a bottleneck its first convolution); if the
    gate is inside a block's own modules, one channel remains, which saves less.

    Args:
        model: a gated network, for `"latency"` on the device to measure.
        inputs: (C, H, W) of one image, or example inputs: see :mod:`fastgate.pruning.costs`.
        cost: `"macs"`; `"params"` (parameters, without gate heads); or `"latency"`: nanoseconds saved for these inputs
            on this device, measured per block with and without its branch (for channel gates, with half of its
            channels, divided evenly among them).
        forward: `(model, inputs) -> outputs`, for networks with another calling convention.

    Raises:
        ValueError: an unknown cost, a gate outside a residual block of this library or in a block that these inputs do
            not reach, or integers that are not an image size.
    """
    _check_cost(cost)
    blocks = gated_blocks(model)
    costs = _costs_alone(model, blocks, inputs, cost, forward)
    around: dict[str, str] = {}
    for name, block in blocks.items():
        if isinstance(block.own_gate, LayerGate):
            within = set(_closed_modules(model, name, block))
            for other, inner in blocks.items():
                if inner is not block and inner in within:
                    costs[name] = (costs[name] - costs[other].sum()).clamp(min=1 if cost == "latency" else 0)
                    around[other] = name
    return Costs(costs, total_cost(model, inputs, cost, forward=forward), around)


def _closed_modules(model: nn.Module, gate: str, block: Gated) -> Iterator[nn.Module]:
    """All modules that are unused when a layer gate is closed."""
    if isinstance(block, ResidualBlock):
        gone = [getattr(block, name) for name in block.branch]
    else:
        gone = [owner_of(model, gate, block).get_submodule(part) for part in cast(Closed, block.gated).gone]
    for module in gone:
        yield from module.modules()


def _costs_alone(
    model: nn.Module, blocks: Mapping[str, Gated], inputs: Any, cost: str, forward: Forward | None
) -> dict[str, Tensor]:
    """Cost of each gate with all others open."""
    if cost == "latency":
        latencies = block_latencies(model, inputs, forward)
        return {
            name: torch.full((_gates(block),), nanoseconds)
            for (name, block), nanoseconds in zip(blocks.items(), latencies, strict=True)
        }
    if cost == "params":
        return {
            name: _cost_of(model, name, block, lambda _, child: _parameters(child), cost)
            for name, block in blocks.items()
        }
    calls = count_macs(model, example_of(model, inputs), forward).calls
    check_reached(blocks, {module for _, module in calls})

    def count(caller: nn.Module | None, module: nn.Module) -> int:
        if caller is not None:
            return calls[caller, module]
        return sum(macs for (_, called), macs in calls.items() if called is module)

    return {name: _cost_of(model, name, block, count, cost) for name, block in blocks.items()}


def total_cost(model: nn.Module, inputs: Any, cost: str = "macs", *, forward: Forward | None = None) -> int:
    """Cost of the network with every gate open and without gate heads, in the units of :func:`gate_costs`."""
    _check_cost(cost)
    if cost == "macs":
        return macs(model, inputs, forward=forward)
    if cost == "params":
        return _parameters(model)
    return open_latency(model, inputs, forward)


def _check_cost(cost: str) -> None:
    if cost not in COSTS:
        raise ValueError(f"cost: expected one of {', '.join(COSTS)}, got {cost!r}")


def _cost_of(
    model: nn.Module, gate: str, block: Gated, count: Callable[[nn.Module | None, nn.Module], int], cost: str
) -> Tensor:
    """MACs or parameters controlled by a gate (channel); `count(caller, module)`: a module's (caller None: any)."""
    if isinstance(block, GatedModule):
        return _cost_of_module(model, gate, block, lambda module: count(None, module), cost)

    def of(name: str) -> int:
        return count(block, getattr(block, name))

    if isinstance(block.gate, LayerGate):
        # `count` covers all runs of a module, even if it runs twice under one name or two
        return torch.tensor([sum(count(block, child) for child in {getattr(block, name) for name in block.branch})])
    per_channel = 0
    for name, conv, dim in block.cut_convs():
        bias = conv.bias.numel() if cost == "params" and conv.bias is not None else 0
        per_channel += (of(name) - bias) // conv.weight.shape[dim]
        per_channel += bias // conv.out_channels if dim == 0 else 0
    if cost == "params":
        per_channel += sum(of(name) // _gates(block) for name in block.cut_with_gate())
    return torch.full((_gates(block),), per_channel)


def _cost_of_module(
    model: nn.Module, gate: str, place: GatedModule, count: Callable[[nn.Module], int], cost: str
) -> Tensor:
    owner = owner_of(model, gate, place)
    if isinstance(place.gated, Closed):
        skipped = [getattr(place, child) for child in place.gated.skip or ()]
        gone = sum(count(owner.get_submodule(part)) for part in place.gated.gone)
        return torch.tensor([gone - sum(map(count, skipped))])
    each = 0
    for part, role in place.gated.parts:
        module = owner.get_submodule(part)
        each += place.gated.group * share_of_channel(module, role, count(module), cost == "params")
    return torch.full((_gates(place),), each)


def _parameters(module: nn.Module) -> int:
    """Number of parameters of a module, without those of gate heads."""
    in_gates = {parameter for _, gate in named_gates(module) for parameter in gate.parameters()}
    return sum(parameter.numel() for parameter in module.parameters() if parameter not in in_gates)


def _gates(block: Gated) -> int:
    return block.own_gate.gates  # type: ignore[union-attr]
