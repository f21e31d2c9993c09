"""Finds where a channel gate inside a block can cut, by tracing channels through a recorded run, and verifies it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.gates import ChannelGate
from fastgate.models.cuts import check_cut, is_conv, is_group_norm, is_norm, runs_as
from fastgate.models.cutting import cut_parts
from fastgate.models.gated import Cut, put_gate
from fastgate.models.hooks import copy_network
from fastgate.models.probing import Probe, run_probe, same_random_numbers
from fastgate.models.recording import Recording, Step, Value, replace
from fastgate.models.residual import record_probe

# relative to the largest value: shorter sums round differently; a wrong cut is off by about the largest value
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class FoundCut:
    """A possible place for a channel gate.

    Attributes:
        name: the module in the block whose input is gated.
        cut: the parts that are cut.
        width: number of channels of that input.
    """

    name: str
    cut: Cut
    width: int


class _CannotCutError(ValueError):
    """A cut is not possible; the message says why."""


def find_cuts(block: nn.Module, probe: Probe, shared: set[str], sums: int) -> tuple[list[FoundCut], str]:
    """Find where a block's hidden channels can be gated, the last place in each of its sums, or the reason why not.

    Hidden channels are computed by one convolution or linear layer (all of whose outputs depend on all inputs) and read
    by a later one, with only operations in between that do not mix them: batch norms, elementwise operations, depthwise
    and grouped convolutions, group norms (the last two by whole groups), squeeze-and-excitation.

    Args:
        block: a copy that can be run.
        probe: arguments on which it runs.
        shared: names of modules that are also used elsewhere in the network and must not be cut.
        sums: number of its residual sums.
    """
    try:
        recording = record_probe(block, probe, False, is_leaf=_is_whole)
    except ValueError as error:
        return [], str(error)
    modules = dict(block.named_modules())
    possible: list[FoundCut] = []
    reasons: list[str] = []
    for step in reversed(recording.steps):
        if step.name is None or not _is_dense(modules[step.name]):
            continue
        try:
            cut = _follow(recording, step, modules)
            if repeated := {name for name, _ in cut.cut.parts} & shared:
                raise _CannotCutError(f"{min(repeated)!r} is also used elsewhere in the network")
            _try_out(block, probe, cut)
        except _CannotCutError as error:
            reasons.append(str(error))
            continue
        possible.append(cut)
    sizes = [_size(cut, modules) for cut in possible]
    found: list[FoundCut] = []
    for cut, size in zip(possible, sizes, strict=True):
        parts = {name for name, _ in cut.cut.parts}
        # the hidden channels of a squeeze-and-excitation are not the block's
        if len(found) < max(sums, 1) and 4 * size >= max(sizes) and not any(parts & _names(other) for other in found):
            found.append(cut)
    # the reason for the last place, which is the preferred one, comes first
    reasons.append("it does not have two nn.Conv2d or nn.Linear in sequence")
    return found[::-1], "" if found else reasons[0]


def _names(cut: FoundCut) -> set[str]:
    return {name for name, _ in cut.cut.parts}


def _size(cut: FoundCut, modules: dict[str, nn.Module]) -> int:
    """Number of parameters of the modules that a cut makes smaller."""
    return sum(parameter.numel() for name, _ in cut.cut.parts for parameter in modules[name].parameters())


def _is_whole(module: nn.Module) -> bool:
    return not module._modules or is_norm(module) or is_group_norm(module) or isinstance(module, nn.MultiheadAttention)


def _is_dense(module: nn.Module) -> bool:
    """Whether every output of the layer depends on every input channel."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _follow(recording: Recording, consumer: Step, modules: dict[str, nn.Module]) -> FoundCut:
    """The cut of a layer's input channels: all values that hold them, and all modules that write or read these."""
    start = consumer.inputs[0]
    dim = 1 if isinstance(modules[str(consumer.name)], nn.Conv2d) else -1
    width = start.shape[dim]
    held: list[Value] = [start]
    roles: dict[str, str] = {}
    groups = 1

    def add(value: Value) -> None:
        if value not in held:
            held.append(value)

    def give(step: Step, role: str) -> None:
        name = str(step.name)
        if roles.setdefault(name, role) != role:
            raise _CannotCutError(f"{name!r} both writes and reads the channels")
        try:
            if not (is_group_norm(modules[name]) or runs_as(modules[name], nn.Linear)):
                check_cut(name, modules[name])
        except ValueError as error:
            raise _CannotCutError(str(error)) from error

    for value in held:
        step = value.maker
        if step is None or value in recording.outputs:
            raise _CannotCutError("the channels belong to its input or its result")
        if step.name is not None and _is_dense(modules[step.name]):
            give(step, "out")
        else:
            for other in _carried(step, value, dim, width, modules):
                add(other)
        for reader in value.readers:
            if reader.name is not None and _is_dense(modules[reader.name]):
                if (1 if isinstance(modules[reader.name], nn.Conv2d) else -1) != dim:
                    raise _CannotCutError(f"{reader.name!r} reads the channels along another dimension")
                give(reader, "in")
                continue
            for other in _carried(reader, value, dim, width, modules):
                add(other)
    for step in {step for value in held for step in (value.maker, *value.readers) if step is not None}:
        module = modules[step.name] if step.name is not None else None
        if module is None or _is_dense(module) or not (module._parameters or module._buffers):
            continue
        give(step, "each")
        groups = math.lcm(groups, _group_size(module))
    if width % groups or width == groups:
        raise _CannotCutError(f"its {width} channels cannot be cut in groups of {groups}")
    if "out" not in roles.values():
        raise _CannotCutError("nothing in the block writes the channels")
    parts = tuple((name, roles[name]) for name in sorted(roles))
    readers = [step for step in recording.steps if step.name is not None and roles.get(step.name) == "in"]
    name = _place(recording, held, readers)
    return FoundCut(name, Cut(parts, name, groups, dim), width)


def _group_size(module: nn.Module) -> int:
    """Number of channels that a module processes together."""
    if isinstance(module, nn.GroupNorm):
        return module.num_channels // module.num_groups
    return module.in_channels // module.groups if isinstance(module, nn.Conv2d) else 1


def _carried(step: Step, value: Value, dim: int, width: int, modules: dict[str, nn.Module]) -> list[Value]:
    """The values of a step that hold the same channels, if it processes each channel separately; raises otherwise."""
    held = [v for v in (*step.inputs, *step.outputs) if len(v.shape) == len(value.shape) and v.shape[dim] == width]
    if set(step.outputs) - set(held) or not set(step.inputs) & set(held):
        raise _CannotCutError(f"{step.label!r} between the layers changes the channels")
    module = modules[step.name] if step.name is not None else None
    if module is not None and (module._parameters or module._buffers):
        grouped = isinstance(module, nn.Conv2d) and is_conv(module) and module.in_channels == module.out_channels
        normed = (is_norm(module) or is_group_norm(module)) and dim == 1
        if not (grouped or normed):
            raise _CannotCutError(f"{type(module).__name__} {step.label!r} between the layers cannot be cut")
    elif not _acts_on_each(step, set(held), dim, width, module):
        raise _CannotCutError(f"{step.label!r} between the layers mixes the channels")
    return held


def _acts_on_each(step: Step, held: set[Value], dim: int, width: int, module: nn.Module | None) -> bool:
    """Whether applying the step to a subset of channels gives that subset of its result, tested on random numbers."""
    generator = torch.Generator("cpu").manual_seed(2)
    kept = torch.randperm(width, generator=generator)[: max(width // 2, 1)].sort().values
    given = {v: torch.randn(v.shape, generator=generator).to(v.tensor) for v in step.inputs if v in held}
    run: Callable[..., Any] = module if module is not None else step.function  # type: ignore[assignment]

    def compute(change: Callable[[Tensor], Tensor]) -> Tensor | None:
        def fill(leaf: Any) -> Any:
            if not isinstance(leaf, Value):
                return leaf
            return change(given[leaf]) if leaf in given else leaf.tensor

        with torch.no_grad(), same_random_numbers(step.outputs[0].tensor.device):
            result = run(*replace(step.args, fill), **replace(step.kwargs, fill))
        return result if isinstance(result, Tensor) else None

    try:
        whole = compute(lambda tensor: tensor.clone())
        some = compute(lambda tensor: tensor.index_select(dim, kept.to(tensor.device)))
    except Exception:  # for example, a hard-coded size
        return False
    if whole is None or some is None:
        return False
    return torch.allclose(whole.index_select(dim, kept.to(whole.device)), some, rtol=1e-5, atol=1e-6)


def _place(recording: Recording, held: list[Value], readers: list[Step]) -> str:
    """The module whose input is gated: the last one such that all readers of the channels see them gated."""
    for value in sorted(held, key=lambda v: -(v.maker.number if v.maker is not None else -1)):
        if not all(value in _sources(step.inputs[0], held) for step in readers):
            continue
        for name, first in sorted(recording.entered, key=lambda e: -e[0].count(".")):
            if first is value and all(_is_within(reader, name) for reader in value.readers):
                return name
    raise _CannotCutError("no module takes the channels as input before all modules that read them")


def _sources(value: Value, held: list[Value]) -> set[Value]:
    """The values from whose channels this value's were computed, itself included."""
    found, pending = {value}, [value]
    while pending:
        maker = pending.pop().maker
        new = {v for v in maker.inputs if v in held and v not in found} if maker is not None else set()
        found |= new
        pending += new
    return found


def _is_within(step: Step, name: str) -> bool:
    place = step.name if step.name is not None else step.scope
    return place == name or place.startswith(f"{name}.")


def _try_out(block: nn.Module, probe: Probe, found: FoundCut) -> None:
    """Gate one copy and cut another: their outputs must agree, whichever half of the channels is kept."""
    decisions = found.width // found.cut.group
    first = torch.randperm(decisions, generator=torch.Generator("cpu").manual_seed(3)) < decisions // 2
    gated = copy_network(block)
    like = next(block.parameters())
    with same_random_numbers(like.device):
        gate = ChannelGate(found.width, decisions).to(like)
    put_gate(gated.get_submodule(found.name), gate, found.cut)
    for opened in (first, ~first):
        gate.freeze(opened)
        small = copy_network(block)
        try:
            cut_parts(small, found.cut.parts, opened.repeat_interleave(found.cut.group).nonzero().flatten())
            with torch.no_grad():
                wanted, got = (run_probe(each, probe, False)["its result"] for each in (gated, small))
        except Exception as error:
            raise _CannotCutError(f"without some channels it raises ({error})") from error
        if wanted is None or got is None or wanted.shape != got.shape:
            raise _CannotCutError("without some channels its result has another size")
        if not float((wanted - got).abs().max()) <= _TOLERANCE * float(wanted.abs().max()):
            raise _CannotCutError("without some channels its result differs from that with these channels at zero")
