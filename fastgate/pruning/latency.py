"""Measured time of a forward pass, several networks interleaved so that they share the machine's ups and downs."""

import copy
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastgate.gates import LayerGate, named_gates
from fastgate.models.block import ResidualBlock, gated_blocks
from fastgate.modes import eval_mode
from fastgate.pruning.compaction import cut_frozen

# rounds for differences between blocks: 100 of a block of ResNet-20 take 0.1 s
_BLOCK_ROUNDS = 100


def measure_latency(
    models: Mapping[str, nn.Module], inputs: Tensor, *, rounds: int = 30, warmup: int = 3
) -> dict[str, float]:
    """Median seconds of one forward pass of each model on `inputs`, in eval mode; modes are restored.

    Every round times each model once, in turn. On a GPU a pass ends when the device has finished it.

    Raises:
        ValueError: no rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode(), eval_mode(*models.values()):
        for turn in range(warmup + rounds):
            for name, model in models.items():
                _synchronize(inputs)
                start = time.perf_counter()
                model(inputs)
                _synchronize(inputs)
                if turn >= warmup:
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def block_latencies(model: nn.Module, input_size: Sequence[int]) -> list[int]:
    """Nanoseconds that one image takes less per closed gate (channel), for every gated block in forward order.

    Measured on the model's device: the block as it is left with everything open, and with its branch gone (channel
    gates: with half of the channels gone). Blocks of the same modules on the same sizes share one measurement. At
    least 1, so that a smaller network never counts as slower.
    """
    blocks = gated_blocks(model)
    inputs: dict[ResidualBlock, Tensor] = {}
    hooks = [
        block.register_forward_pre_hook(lambda block, args: inputs.setdefault(block, args[0]))
        for block in blocks.values()
    ]
    try:
        with torch.no_grad(), eval_mode(model):
            model(_one_image(model, input_size))
    finally:
        for hook in hooks:
            hook.remove()
    known: dict[str, int] = {}
    for block in blocks.values():
        kind = f"{block} {list(inputs[block].shape)}"
        if kind not in known:
            gates = block.gate.gates  # type: ignore[union-attr]
            gone = 1 if isinstance(block.gate, LayerGate) else max(gates // 2, 1)
            versions = {"open": _cut_copy(block, 0), "cut": _cut_copy(block, gone)}
            seconds = measure_latency(versions, inputs[block], rounds=_BLOCK_ROUNDS)
            known[kind] = max(round((seconds["open"] - seconds["cut"]) / gone * 1e9), 1)
    return [known[f"{block} {list(inputs[block].shape)}"] for block in blocks.values()]


def open_latency(model: nn.Module, input_size: Sequence[int]) -> int:
    """Nanoseconds that one image takes through the network without gates."""
    plain = _cut_copy(model, 0)
    return round(measure_latency({"open": plain}, _one_image(model, input_size))["open"] * 1e9)


def _cut_copy(model: nn.Module, closed: int) -> nn.Module:
    """A copy without gates, and without the first `closed` channels of each (1: without the branch of a layer gate)."""
    copied = copy.deepcopy(model)
    for _, gate in named_gates(copied):
        gate.freeze(torch.arange(gate.gates) >= closed)
    return cut_frozen(copied)


def _one_image(model: nn.Module, input_size: Sequence[int]) -> Tensor:
    return next(model.parameters()).new_zeros(1, *input_size[-3:])


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
