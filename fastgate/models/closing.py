"""Finds how to close a residual block that keeps its own forward, as a whole or sum by sum; verified on a copy."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.gates import LayerGate
from fastgate.models.gated import Closed, put_gate, zero_first
from fastgate.models.hooks import copy_network
from fastgate.models.probing import Probe, same_random_numbers
from fastgate.models.recording import Recording, Step, Value
from fastgate.models.residual import ACTIVATIONS, SHAPING, Residual, Sum, is_nothing, record_probe
from fastgate.values import tensors_in


def channels_of(module: nn.Module, shape: Sequence[int], default: int | None = None) -> int:
    """The channel dimension of a module's input of this shape, 1 or -1, inferred from the sizes of its parts."""
    usual = default if default is not None else -1 if len(shape) == 3 else 1
    for part in module.modules():
        if isinstance(part, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm):
            return 1
        size = getattr(part, "in_features", None) if isinstance(part, nn.Linear) else None
        if isinstance(part, nn.LayerNorm):
            size = part.normalized_shape[-1]
        if isinstance(part, nn.MultiheadAttention):
            size = part.embed_dim
        if isinstance(part, nn.GroupNorm):
            size = part.num_channels
        if size is not None and len(shape) > 2:
            if usual == -1:
                return -1 if shape[-1] == size else 1 if shape[1] == size else usual
            return 1 if shape[1] == size else -1 if shape[-1] == size else usual
    return usual


def is_shaping(step: Step) -> bool:
    """Whether a step only reshapes features."""
    return step.name is None and step.label in SHAPING


def name_of(block: nn.Module, step: Step, new: dict[str, nn.Module]) -> str | None:
    """Name of the child that a step calls, or of a new one equivalent to its function; None if there is none."""
    if step.name is not None:
        single = len(step.inputs) == len(step.outputs) == 1
        return step.name if "." not in step.name and single and len(step.args) == 1 and not step.kwargs else None
    function = step.label
    settings = [value for value in (*step.args[1:], *step.kwargs.values()) if value not in (True, False, "none")]
    if function not in ACTIVATIONS or settings or len(step.args) > 2:
        return None
    name = function.rstrip("_")
    while hasattr(block, name) and name not in new:
        name += "_"
    new.setdefault(name, ACTIVATIONS[function]())
    return name


def runs_gated(
    block: nn.Module,
    probe: Probe,
    runs: Sequence[Residual],
    closed: Mapping[str, Closed],
    widths: Mapping[str, int],
    new: Mapping[str, nn.Module],
) -> bool:
    """Whether a gated copy computes the same as the block with open gates, and its shortcuts with closed ones."""
    gated = copy_network(block)
    for name, module in new.items():
        gated.add_module(name, module)
    like = next(block.parameters(), torch.zeros(0))
    decided: list[Tensor] = []
    for name, how in closed.items():
        with same_random_numbers(like.device):  # leaves the user's random number generators unchanged
            gate = LayerGate(widths[name]).to(like)
        gate.register_forward_hook(lambda *_: decided[0])
        put_gate(gated.get_submodule(name), gate, how)
    samples = runs[0].origin.shape[0]
    try:
        for run in runs:
            opened = _first(record_probe(block, probe, run.training).result)
            skipped = _first(record_probe(block, probe, run.training, override=_closing(run.sums)).result)
            # in training, a batch norm after a sum depends on other samples' gates: there all samples decide alike
            each = [torch.ones(samples), torch.zeros(samples)] + [torch.arange(samples) % 2] * (not run.training)
            for decisions in each:
                decided[:] = [decisions.to(like).reshape(-1, 1, 1, 1)]
                got = _first(record_probe(gated, probe, run.training).result)
                if got is None or opened is None or skipped is None:
                    return False
                keep = decided[0].reshape(-1, *[1] * (opened.dim() - 1)) == 1
                if not torch.equal(got, torch.where(keep, opened, skipped)):
                    return False
    except Exception:  # the user's code may raise anything when called like this
        return False
    return True


def close_whole(
    block: nn.Module, probe: Probe, runs: Sequence[Residual], new: dict[str, nn.Module], channels: int
) -> tuple[Closed | None, str]:
    """How to compute the block without the branches of its sums, or the reason why this is not possible."""
    residual = runs[1]
    if not isinstance(residual.recording.result, Tensor):
        return None, "it returns something other than a tensor"
    names = []
    for step in [*(step for each in residual.sums for step in each.way), *residual.tail]:
        if is_shaping(step):
            continue
        name = name_of(block, step, new)
        if name is None:
            return None, f"{step.label!r} on its shortcut is not a child of the block"
        if name in new or not is_nothing(getattr(block, name)):
            names.append(name)
    modules = [new[name] if name in new else getattr(block, name) for name in names]
    if any(part._parameters or part._buffers for module in modules for part in module.modules()):
        return None, f"its shortcut ({', '.join(names)}) has parameters, which would run twice"
    for run in runs:
        training = run is runs[1]
        expected = _first(record_probe(block, probe, training, override=_closing(run.sums)).result)
        args, kwargs = probe.make(block)
        x = tensors_in((args, kwargs))[0]
        with torch.no_grad(), same_random_numbers(x.device):
            for module in modules:
                x = module.train(training)(x)
        if expected is None or x.shape != expected.shape or not torch.equal(x, expected):
            return None, "without its branch, it computes something other than its shortcut"
    return Closed(tuple(names), channels=channels, alone=len(probe.args) == 1 and not probe.kwargs), ""


def close_sums(
    block: nn.Module, probe: Probe, runs: Sequence[Residual], channels: int
) -> tuple[dict[str, tuple[Closed, int]], str]:
    """For each sum, a module whose zero output zeroes the branch, with its input width; or why there is none."""
    closed: dict[str, tuple[Closed, int]] = {}
    for i in range(len(runs[1].sums)):
        found = _zero_of(block, probe, runs, i, channels)
        if found is None or found[0] in closed:
            return {}, f"no single module in the branch of its sum number {i + 1} can be left out"
        name, each, width = found
        closed[name] = each, width
    return closed, ""


def _zero_of(
    block: nn.Module, probe: Probe, runs: Sequence[Residual], i: int, channels: int
) -> tuple[str, Closed, int] | None:
    """The module with most parameters that zeroes the branch of sum i if its output is zero, and how to close it."""
    run = runs[1]
    each = run.sums[i]
    start = each.way[0].inputs[0] if each.way else each.skip
    modules = dict(block.named_modules())
    found: list[tuple[int, str, Closed, int]] = []
    value = each.branch
    while value is not start and value.maker is not None:
        step = value.maker
        derived = [v for v in step.inputs if start in run.recording.ancestors(v)]
        if step.name is not None:
            gone = _gone_without(run.recording, step, start, modules)
            size = sum(parameter.numel() for parameter in modules[step.name].parameters())
            if gone is not None and step.inputs[0].shape[:1] == run.origin.shape[:1]:
                dim = channels_of(modules[step.name], step.inputs[0].shape, default=channels)
                how = Closed(None, step.name, *gone, others=_others(step), channels=dim)
                found.append((size, step.name, how, step.inputs[0].shape[dim]))
        if len(derived) != 1:
            break
        value = derived[0]
    for _, name, closed, width in sorted(found, key=lambda f: -f[0]):
        if all(_is_zero_without(block, probe, run, run.sums[i], name) for run in runs):
            return name, closed, width
    return None


def _others(step: Step) -> int | None:
    return len(step.result) - 1 if isinstance(step.result, tuple) else None


def _gone_without(
    recording: Recording, step: Step, start: Value, modules: Mapping[str, nn.Module]
) -> tuple[tuple[str, ...], bool] | None:
    """The modules that are unused if a step's result is zero, and whether other steps before it remain.

    None if one of them cannot be left out.
    """
    before = recording.ancestors(start)
    values = {v for given in step.inputs for v in recording.ancestors(given)} - before
    makers = {v.maker for v in values if v.maker is not None} | {step}
    needed = {each.name for each in recording.steps if each not in makers}  # an activation may run in several places
    gone = []
    for maker in sorted(makers, key=lambda s: s.number):
        if any(reader not in makers for v in maker.outputs for reader in v.readers) and maker is not step:
            return None
        # its input, or zeros of that shape, can replace its result
        if maker.name is not None:
            if maker is not step and (len(maker.args) != 1 or maker.kwargs or not isinstance(maker.result, Tensor)):
                return None
            if maker.outputs[0].shape != maker.inputs[0].shape:
                return None
            if maker is step or not (is_nothing(modules[maker.name]) or maker.name in needed):
                gone.append(maker.name)
    same_batch = step.outputs[0].shape[:1] == start.shape[:1]
    if not same_batch or len(set(gone)) < len(gone):
        return None
    stays = any(
        not is_shaping(maker) if maker.name is None else maker.name not in gone and not is_nothing(modules[maker.name])
        for maker in makers
    )
    return tuple(gone), stays


def _is_zero_without(block: nn.Module, probe: Probe, run: Residual, each: Sum, name: str) -> bool:
    """Whether zeroing a module's output has the same effect as replacing the sum by its skip."""

    def zero(step: Step, compute: Callable[[], Any]) -> Any:
        result = compute()
        return zero_first(result) if step.name == name else result

    training = run.training
    without = _first(record_probe(block, probe, training, override=zero).result)
    expected = _first(record_probe(block, probe, training, override=_closing([each])).result)
    return without is not None and expected is not None and torch.equal(without, expected)


def _first(result: Any) -> Tensor | None:
    return next(iter(tensors_in(result)), None)


def _closing(sums: Sequence[Sum]) -> Callable[[Step, Callable[[], Any]], Any]:
    """Override for :func:`record_probe` that replaces these sums by their skips."""
    operands = {each.step.number: each.operand for each in sums}

    def override(step: Step, run: Callable[[], Any]) -> Any:
        closed = step.adds and step.number in operands
        return step.inputs[operands[step.number]].tensor if closed else run()

    return override
