"""Measured time of forward passes, interleaved over networks so that machine drift affects all equally."""

import statistics
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import nn

from fastgate.gates import Gate, LayerGate, named_gates
from fastgate.models.block import Gated, ResidualBlock, gated_blocks
from fastgate.models.gated import owner_of
from fastgate.models.hooks import copy_network
from fastgate.modes import eval_mode
from fastgate.pruning.compaction import cut_frozen
from fastgate.pruning.probe import check_reached, example_of, open_for_probing
from fastgate.values import Forward, call, tensors_in, to_device_of

# rounds for differences between blocks: 100 rounds of a ResNet-20 block take 0.1 s
_BLOCK_ROUNDS = 100


def measure_latency(
    models: Mapping[str, nn.Module], inputs: Any, forward: Forward | None = None, *, rounds: int = 30, warmup: int = 3
) -> dict[str, float]:
    """Median seconds of one forward pass of each model, see :func:`latency_quartiles`."""
    quartiles = latency_quartiles(models, inputs, forward, rounds=rounds, warmup=warmup)
    return {name: median for name, (_, median, _) in quartiles.items()}


def latency_quartiles(
    models: Mapping[str, nn.Module], inputs: Any, forward: Forward | None = None, *, rounds: int = 30, warmup: int = 3
) -> dict[str, tuple[float, float, float]]:
    """Lower quartile, median and upper quartile of the seconds of one forward pass of each model on `inputs`.

    Models run in eval mode; modes are restored. Every round times each model once, in turn. On a GPU, a pass ends when
    the device has finished it.

    Args:
        models: name -> network.
        inputs: inputs of every model, on its device; passed as by :func:`fastgate.values.call`.
        forward: `(model, inputs) -> outputs`, for networks with another calling convention.
        rounds: timed passes per model.
        warmup: untimed passes before these.

    Raises:
        ValueError: no rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    times: dict[str, list[float]] = {name: [] for name in models}
    devices = {tensor.device for tensor in tensors_in(inputs) if tensor.is_cuda}
    with torch.inference_mode(), eval_mode(*models.values()):
        for turn in range(warmup + rounds):
            for name, model in models.items():
                _synchronize(devices)
                start = time.perf_counter()
                call(model, inputs, forward)
                _synchronize(devices)
                if turn >= warmup:
                    times[name].append(time.perf_counter() - start)
    return {name: _quartiles(values) for name, values in times.items()}


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return (values[0],) * 3
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def block_latencies(model: nn.Module, inputs: Any, forward: Forward | None = None) -> list[int]:
    """Nanoseconds saved per closed gate (channel) for these inputs (or one image), by block in forward order.

    Measured on the model's device: the compacted block with everything open, and without its branch (for channel gates,
    with half of its channels). Blocks with the same modules and sizes share a measurement. The result is at least 1, so
    that a smaller network never counts as slower.

    Raises:
        ValueError: a gated block that these inputs do not reach.
    """
    blocks = gated_blocks(model)
    owners = {name: _owner(model, name, block) for name, block in blocks.items()}
    entering: dict[nn.Module, tuple[Any, Any]] = {}

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # copied: a block may begin with an in-place module
        entering.setdefault(block, to_device_of(block, (args, kwargs), copied=True))

    with ExitStack() as hooks:
        for owner in set(owners.values()):
            hooks.callback(owner.register_forward_pre_hook(note, with_kwargs=True).remove)
        with open_for_probing(model):
            call(model, example_of(model, inputs), forward)
    check_reached(owners, entering)
    known: dict[str, int] = {}
    found = []
    for name, block in blocks.items():
        owner = owners[name]
        args, kwargs = entering[owner]
        gates = cast(Gate, block.own_gate).gates
        within = "gate" if isinstance(block, ResidualBlock) else f"{block.gated.within}.{block.gated.child}".strip(".")
        kind = f"{within} of {owner} {[list(tensor.shape) for tensor in tensors_in((args, kwargs))]}"
        if kind not in known:
            gone = 1 if isinstance(block.own_gate, LayerGate) else max(gates // 2, 1)
            versions = {"open": _cut_copy(owner, {}), "cut": _cut_copy(owner, {within: gone})}
            seconds = measure_latency(versions, (args, kwargs), _call_as_seen, rounds=_BLOCK_ROUNDS)
            known[kind] = max(round((seconds["open"] - seconds["cut"]) / gone * 1e9), 1)
        found.append(known[kind])
    return found


def _call_as_seen(module: nn.Module, inputs: tuple[Any, Any]) -> Any:
    return module(*inputs[0], **inputs[1])


def _owner(model: nn.Module, name: str, block: Gated) -> nn.Module:
    return block if isinstance(block, ResidualBlock) else owner_of(model, name, block)


def open_latency(model: nn.Module, inputs: Any, forward: Forward | None = None) -> int:
    """Nanoseconds of a forward pass of the network without gates for these inputs (or one image)."""
    plain = _cut_copy(model, {})
    return round(measure_latency({"open": plain}, example_of(plain, inputs), forward)["open"] * 1e9)


def _cut_copy(model: nn.Module, closed: Mapping[str, int]) -> nn.Module:
    """A pruned copy without gates; `closed`: gate name -> number of leading channels cut (1: a layer gate's branch)."""
    copied = copy_network(model)
    for name, gate in named_gates(copied):
        gate.freeze(torch.arange(gate.gates) >= closed.get(name, 0))
    return cut_frozen(copied)


def _synchronize(devices: Iterable[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)
