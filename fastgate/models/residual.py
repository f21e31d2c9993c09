"""Finds the residual sums of a block in recordings of one run in eval and one in training mode."""

import dis
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from fastgate.models.probing import Probe, same_random_numbers
from fastgate.models.recording import Recording, Step, Value, record

# functions of one tensor without options, and the equivalent modules
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    **dict.fromkeys(("relu", "relu_"), nn.ReLU),
    **dict.fromkeys(("sigmoid", "sigmoid_"), nn.Sigmoid),
    **dict.fromkeys(("tanh", "tanh_"), nn.Tanh),
    **{"silu": nn.SiLU, "gelu": nn.GELU, "hardswish": nn.Hardswish, "mish": nn.Mish, "relu6": nn.ReLU6},
}
# functions that only change the shape
SHAPING = {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "contiguous", "permute", "transpose"}


@dataclass(eq=False)
class Sum:
    """One residual sum, `skip + branch`.

    Attributes:
        step: the addition.
        skip, branch: the two summands.
        operand: index of the skip among the step's inputs.
        way: the steps from the block's input, or the previous sum, to the skip.
    """

    step: Step
    skip: Value
    branch: Value
    operand: int
    way: list[Step]


@dataclass(eq=False)
class Residual:
    """The residual sums of a block in the order they run, and the steps from the last one to the result."""

    recording: Recording
    sums: list[Sum]
    tail: list[Step]
    training: bool

    @property
    def origin(self) -> Value:
        """The input at which the skips start."""
        value = self.sums[0].skip
        for step in reversed(self.sums[0].way):
            value = step.inputs[0] if value in step.outputs else value
        return value


def may_add(cls: type[nn.Module]) -> bool:
    """Whether the code of a module's forward, or of methods and functions that it mentions, contains an addition.

    A static check that avoids running modules that cannot be residual blocks.
    """
    classes = [base for base in cls.__mro__ if base not in nn.Module.__mro__]  # a forward may call a base class's
    pending: list[Any] = [vars(base).get("forward") for base in classes]
    seen: set[Any] = set()
    while pending:
        function = inspect.unwrap(pending.pop()) if pending[-1] is not None else pending.pop()
        function = getattr(function, "__func__", function)
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        codes = [code, *(const for const in code.co_consts if isinstance(const, CodeType))]
        seen.update(codes)
        for part in codes:
            if not {"add", "add_"}.isdisjoint(part.co_names):
                return True
            if any(i.opname == "BINARY_OP" and i.argrepr in ("+", "+=") for i in dis.get_instructions(part)):
                return True
            for name in part.co_names:
                own = () if hasattr(nn.Module, name) else (vars(base).get(name) for base in classes)
                for value in (*own, _global(function, name)):
                    if isinstance(value, FunctionType | MethodType):
                        pending.append(value)
    return False


def _global(function: Any, name: str) -> Any:
    """The global of this name in a function's module, unless it is PyTorch's."""
    value = getattr(function, "__globals__", {}).get(name)
    return None if (getattr(value, "__module__", None) or "").partition(".")[0] == "torch" else value


def find_residual(block: nn.Module, probe: Probe, training: bool) -> Residual | None:
    """The residual sums of a block (a copy that can be run); None if its result is not a residual sum."""
    recording = record_probe(block, probe, training)
    if not recording.outputs or not recording.inputs:
        return None
    origin = recording.inputs[0]
    value = recording.outputs[0]
    tail: list[Step] = []
    while value.maker is not None and not value.maker.is_sum:
        if len(value.maker.inputs) != 1 or value is origin:
            return None
        tail.insert(0, value.maker)
        value = value.maker.inputs[0]
    modules = dict(block.named_modules())

    def weight(step: Step) -> int:
        """Weight of a step: its number of modules with parameters, at least 1; 0 for a reshape."""
        if step.name is None:
            return int(step.label not in SHAPING)
        parts = modules[step.name].modules()
        return 0 if is_nothing(modules[step.name]) else max(1, sum(bool(part._parameters) for part in parts))

    sums: list[Sum] = []
    while value is not origin and value.maker is not None and value.maker.is_sum:
        found = _read_sum(recording, value.maker, origin, weight)
        if found is None:
            break
        sums.insert(0, found)
        start = found.way[0].inputs[0] if found.way else found.skip
        value = start
    return Residual(recording, sums, tail, training) if sums and value is origin else None


def record_probe(
    block: nn.Module,
    probe: Probe,
    training: bool,
    is_leaf: Callable[[nn.Module], bool] = lambda _: True,
    override: Callable[[Step, Callable[[], Any]], Any] = lambda _, run: run(),
) -> Recording:
    """Record a run of a block on a probe; see :func:`fastgate.models.recording.record`."""
    block.train(training)
    args, kwargs = probe.make(block)
    with torch.no_grad(), same_random_numbers(probe_device(block)):
        return record(block, args, kwargs, is_leaf=is_leaf, override=override)


def probe_device(block: nn.Module) -> torch.device:
    """Device for a block's probes."""
    return next((tensor.device for tensor in block.parameters()), torch.device("cpu"))


def is_nothing(module: nn.Module) -> bool:
    """Whether a module is the identity."""
    return type(module) is nn.Identity


def _read_sum(recording: Recording, step: Step, origin: Value, weight: Callable[[Step], int]) -> Sum | None:
    """Read a step as a residual sum: one operand is the stream itself, or has less computation on its path."""
    candidates = []
    for operand in (0, 1):
        skip, branch = step.inputs[operand], step.inputs[1 - operand]
        way = way_back(skip, origin)
        if way is None:
            continue
        start = way[0].inputs[0] if way else skip
        if start not in recording.ancestors(branch) or branch is start:
            continue
        before = recording.ancestors(start)
        work = {v.maker for v in recording.ancestors(branch) if v not in before and v.maker is not None}
        on_way, in_branch = sum(map(weight, way)), sum(map(weight, work))
        # the shortcut may contain a norm and a convolution
        if on_way < in_branch and sum(weight(s) > 0 for s in way) <= 2:
            candidates.append((on_way, operand, Sum(step, skip, branch, operand, way)))
    return min(candidates, key=lambda c: c[:2])[2] if candidates else None


def way_back(value: Value, origin: Value) -> list[Step] | None:
    """The single-input steps from the block's input or a sum to this value; None if other steps are on the path."""
    way: list[Step] = []
    while value is not origin and value.maker is not None and not value.maker.is_sum:
        if len(value.maker.inputs) != 1:
            return None
        way.insert(0, value.maker)
        value = value.maker.inputs[0]
    return way if value is origin or value.maker is not None else None
