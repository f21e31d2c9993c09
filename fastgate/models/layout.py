"""Determines what a residual block computes, by running it or from its registration, and verifies the result."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from fastgate.models.block import ResidualBlock
from fastgate.models.closing import channels_of, close_sums, close_whole, is_shaping, name_of, runs_gated
from fastgate.models.gated import Closed
from fastgate.models.hooks import copy_network
from fastgate.models.probing import (
    Probe,
    capture_probes,
    first_difference,
    guess_probe,
    mixes_samples,
    probe_copy,
    run_probe,
)
from fastgate.models.residual import (
    Residual,
    find_residual,
    is_nothing,
    may_add,
    way_back,
)

# attributes that every module has
_EVERY_MODULE = frozenset(vars(nn.Module()))
NOT_BATCH_FIRST = "the first dimension of its input is not the batch; put the batch first (batch_first=True)"
# forwards of containers, whose parts are examined one by one
_FORWARDS = {container.forward for container in (nn.Sequential, nn.ModuleList, nn.ModuleDict)}


@dataclass(frozen=True)
class BlockLayout:
    """The roles of a residual block's children; children that are None or missing are ignored.

    Attributes:
        branch, shortcut, activation: see :func:`register_block`.
        new: new children, by name, that replace functions in the block's forward.
    """

    branch: tuple[str, ...]
    shortcut: str | None
    activation: str | None
    new: Mapping[str, nn.Module] = field(default_factory=dict)


@dataclass(frozen=True)
class FoundBlock:
    """A residual block and how a layer gate may close it: as a chain, as a whole, or sum by sum.

    Attributes:
        module: the block.
        probe: arguments on which it runs.
        layout: roles of its children if it is `activation(shortcut(x) + branch(x))`, with chains of children applied to
            images; None otherwise.
        closed: module name in the block -> its behaviour with a closed gate: for the whole block under "", or for one
            module in the branch of each sum. Empty if it cannot be closed.
        widths: number of input channels of those modules.
        new: children to register for `closed`.
        reason: why no layer gate can close it.
        width: channels of its input.
        sums: number of residual sums; 0 for a block without a shortcut whose class is a residual one.
        mixes_samples: whether a sample's result in eval mode depends on the rest of its batch.
    """

    module: nn.Module
    probe: Probe
    layout: BlockLayout | None
    closed: Mapping[str, Closed]
    widths: Mapping[str, int]
    new: Mapping[str, nn.Module]
    reason: str
    width: int
    mixes_samples: bool
    sums: int


# layouts registered by users, by class
_registered: dict[type[nn.Module], BlockLayout] = {}


def register_block(
    cls: type[nn.Module], *, branch: Sequence[str], shortcut: str | None = None, activation: str | None = None
) -> None:
    """Declare a residual block class for :func:`attach`: activation(shortcut(x) + branch(x)).

    Args:
        cls: the block's class.
        branch: names of the child modules of the branch, in the order they run; a name may occur twice.
        shortcut: name of the child on the shortcut; None, or a child that is None, means the identity.
        activation: name of the child applied to the sum; None for no activation.

    Example: `register_block(MyBlock, branch=("conv1", "bn1", "relu", "conv2", "bn2"), activation="relu")`
    """
    if not branch:
        raise ValueError(f"branch: expected the names of child modules of {cls.__name__}, got none")
    _registered[cls] = BlockLayout(tuple(branch), shortcut, activation)


def registered_layout(block: nn.Module) -> BlockLayout | None:
    """The layout registered for the block's class; None if there is none."""
    return _registered.get(type(block))


def to_residual_block(block: nn.Module, layout: BlockLayout) -> ResidualBlock:
    """Build a `ResidualBlock` with the same children under the same names, so that state_dict keys do not change."""
    # not named_children(): it leaves out a module that is registered under a second name
    children = {name: child for name, child in block._modules.items() if child is not None} | dict(layout.new)
    named = [*layout.branch, *(name for name in (layout.shortcut, layout.activation) if name is not None)]
    remedy = "correct its register_block()"
    if missing := [name for name in named if name not in layout.new and not hasattr(block, name)]:
        raise ValueError(f"{type(block).__name__}: no child named {', '.join(missing)}; {remedy}")
    unused = [name for name in children if name not in named and not isinstance(children[name], nn.Identity)]
    if unused := unused + list(block._parameters) + list(block._buffers):
        raise ValueError(f"{type(block).__name__}: its layout leaves out {', '.join(unused)}; {remedy}")
    if taken := [name for name in children if name in _RESERVED]:
        raise ValueError(f"{type(block).__name__}: a child cannot be named {taken[0]!r} in a gated block; rename it")
    branch = [name for name in layout.branch if name in children]
    result = ResidualBlock(
        children,
        branch,
        layout.shortcut if layout.shortcut in children else None,
        layout.activation if layout.activation in children else None,
    )
    result.training = block.training
    # attributes (a stride, a flag) that the network's own forward or a hook may read
    for name, value in vars(block).items():
        if name not in _RESERVED:
            setattr(result, name, value)
    return result


# names used by ResidualBlock itself
_RESERVED = frozenset({*dir(ResidualBlock), *vars(ResidualBlock({}, (), None, None)), "gate", "in_index", "out_index"})


def find_blocks(
    model: nn.Module, known: Mapping[str, nn.Module], inputs: Any = None, *, plain: bool = False
) -> dict[str, FoundBlock]:
    """Find every residual block of a network, by name, in the order of `named_modules`; nothing is changed.

    A residual block is a module whose result is a sum of its input (or a simple function of it) and a more complex
    function of its input, or a sequence of several such sums. Of nested blocks the outer one counts, unless it contains
    more than one: then it is a stage, or the network.

    Args:
        model: the network.
        known: blocks known already, by name; neither they nor the modules that contain them are examined.
        inputs: inputs of the network, see :func:`fastgate.models.probing.capture_probes`.
        plain: include blocks of the same classes that have no shortcut.
    """
    candidates = {
        name: module
        for name, module in model.named_modules()
        if module._modules
        and type(module).forward not in _FORWARDS
        and may_add(type(module))
        and not any(name == other or _is_inside(name, other) or _is_inside(other, name) for other in known)
    }
    captured: list[dict[str, Probe]] = []

    def capture(name: str) -> Probe | None:
        if not captured:  # at most once
            captured.append(capture_probes(model, candidates, inputs))
        return captured[0].get(name)

    found: dict[str, FoundBlock] = {}
    read = _Reader()
    for name in sorted(candidates, key=lambda name: -len(name.split(".")) if name else 0):
        inside = [other for other in found if _is_inside(other, name)]
        if len(inside) > 1:
            continue
        block = read(candidates[name], partial(capture, name))
        if block is not None:
            found = {other: b for other, b in found.items() if other not in inside} | {name: block}
    if plain:
        kinds = {type(block.module) for block in found.values()}
        for name, module in candidates.items():
            near = any(name == other or _is_inside(name, other) or _is_inside(other, name) for other in found)
            probe = read.probe(module, partial(capture, name)) if type(module) in kinds and not near else None
            if probe is not None:
                found[name] = FoundBlock(module, probe, None, {}, {}, {}, "it has no shortcut", 0, False, 0)
    return {name: found[name] for name in candidates if name in found}


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and (outer == "" or name.startswith(f"{outer}."))


class _Reader:
    """Reads blocks; of blocks that differ only in tensor values, only the first is run."""

    def __init__(self) -> None:
        self._guesses: dict[Any, Probe | None] = {}
        self._found: dict[Any, FoundBlock | None] = {}

    def __call__(self, block: nn.Module, capture: Callable[[], Probe | None]) -> FoundBlock | None:
        """Determine what a block computes; None if it has no residual sum or cannot be run.

        Args:
            block: the block; it does not change.
            capture: returns its arguments in its network, if known.
        """
        probe = self.probe(block, capture)
        if probe is None:
            return None
        key = kind_of(block), str(probe.sizes), probe.follows_batch
        if key not in self._found:
            self._found[key] = read_block(block, probe)
        found = self._found[key]
        if found is None or found.module is block:
            return found
        layout = found.layout and dataclasses.replace(found.layout, new=copy.deepcopy(found.layout.new))
        return dataclasses.replace(found, module=block, layout=layout, new=copy.deepcopy(found.new))

    def probe(self, block: nn.Module, capture: Callable[[], Probe | None]) -> Probe | None:
        """Arguments on which the block can be run."""
        kind = kind_of(block)
        if kind not in self._guesses:
            self._guesses[kind] = guess_probe(probe_copy(block))
        return self._guesses[kind] or capture()


def kind_of(block: nn.Module) -> Any:
    """Key that distinguishes blocks without running them: classes, attributes, names and sizes of their parts."""
    parts = []
    for name, module in block.named_modules(remove_duplicate=False):
        held = {**module._parameters, **module._buffers}
        sizes = tuple((key, None if t is None else (t.shape, t.dtype, t.device)) for key, t in held.items())
        values = tuple(
            (key, repr(value) if isinstance(value, str | int | float | tuple | list | None) else id(value))
            for key, value in vars(module).items()
            if key not in _EVERY_MODULE
        )
        parts.append((name, type(module), sizes, values))
    return tuple(parts)


def read_block(block: nn.Module, probe: Probe) -> FoundBlock | None:
    """Determine what a block computes on these arguments; None if it has no residual sum or cannot be run alone."""
    copied = probe_copy(block)
    try:
        evaluated, trained = (find_residual(copied, probe, training) for training in (False, True))
    except Exception:  # it cannot be run alone, or not in training mode
        return None
    if evaluated is None or trained is None or _signature(evaluated) != _signature(trained):
        return None
    runs = [evaluated, trained]
    shape = trained.origin.shape
    if not probe.follows_batch:
        return FoundBlock(block, probe, None, {}, {}, {}, NOT_BATCH_FIRST, 0, False, len(trained.sums))
    channels = channels_of(copied, shape)
    layout = _as_chain(block, trained) if channels == 1 and len(shape) == 4 else None
    mixes = False
    if layout is not None:
        try:
            mixes = check_layout("", block, layout, probe)
        except ValueError:
            layout = None
    new: dict[str, nn.Module] = {}
    whole, reason = None, ""
    if layout is None:
        whole, reason = close_whole(copied, probe, runs, new, channels)
    closed = {} if whole is None else {"": whole}
    widths = {"": shape[channels]}
    if closed and not runs_gated(copied, probe, runs, closed, widths, new):
        closed, reason = {}, "closed as a whole, it computes something other than its shortcut"
    if layout is None and (not closed or len(trained.sums) > 1):
        by_sums, why_not = close_sums(copied, probe, runs, channels)
        reason = f"{reason}; {why_not}"
        some = {name: each for name, (each, _) in by_sums.items()}
        of_sums = {name: width for name, (_, width) in by_sums.items()}
        if some and runs_gated(copied, probe, runs, some, of_sums, {}):
            closed, new = some, {}
            widths |= of_sums
    return FoundBlock(block, probe, layout, closed, widths, new, reason, shape[channels], mixes, len(trained.sums))


def _signature(residual: Residual) -> list[Any]:
    """The properties that two runs of a block must have in common."""
    steps = [*residual.tail, *(step for each in residual.sums for step in each.way)]
    return [[s.label for s in steps if not is_shaping(s)], len(residual.sums)]


def _as_chain(block: nn.Module, residual: Residual) -> BlockLayout | None:
    """The block as chains of its children; None if it is not of that form."""
    if len(residual.sums) != 1:
        return None
    [only] = residual.sums
    branch = way_back(only.branch, residual.origin)
    if branch is None or {*only.way} & {*branch}:
        return None
    if len(residual.recording.steps) != 1 + len(branch) + len(only.way) + len(residual.tail):
        return None
    new: dict[str, nn.Module] = {}
    names = [name_of(block, step, new) for step in branch]
    shortcut, tail = ([name_of(block, s, new) for s in steps] for steps in (only.way, residual.tail))
    shortcut, tail = ([n for n in some if not _is_left_out(block, n)] for some in (shortcut, tail))
    if None in names or None in shortcut or None in tail or len(shortcut) > 1 or len(tail) > 1:
        return None
    return BlockLayout(
        tuple(name for name in names if name), shortcut[0] if shortcut else None, tail[0] if tail else None, new
    )


def _is_left_out(block: nn.Module, name: str | None) -> bool:
    return name is not None and is_nothing(getattr(block, name, block))


def check_layout(name: str, block: nn.Module, layout: BlockLayout, probe: Probe | None = None) -> bool:
    """Compare a layout with the block's own forward, in eval and in training mode, including gradients.

    Both run on copies with random weights (initial zeros could hide a part of a new block) and on the same random
    numbers; the block, its hooks and all random number generators are left unchanged.

    Returns:
        Whether a sample's result in eval mode depends on the other samples of its batch.

    Raises:
        ValueError: they differ, or one of them raises.
    """
    own = probe_copy(block)
    ours = to_residual_block(copy_network(own), layout)
    what = f"block {name!r}: {type(block).__name__}"
    remedy = "declare what it computes with fastgate.register_block(), with every operation as a child module"
    device = next((p.device.type for p in own.parameters()), "cpu")
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        convs = ours.branch_convs()
        probe = probe or guess_probe(own, strict=False, channels=convs[0][2].in_channels if convs else None)
        if probe is None:
            raise ValueError(
                f"{what} cannot be compared with its layout: its own forward raises on random images of every size "
                f"tried; {remedy}"
            )
        for training in (False, True):
            mode = "training" if training else "eval"
            expected = run_probe(own, probe, training)
            try:
                got = run_probe(ours, probe, training)
            except Exception as error:
                raise ValueError(f"{what} runs, but its layout raises in {mode} mode ({error}); {remedy}") from error
            if difference := first_difference(expected, got):
                raise ValueError(
                    f"{what} computes something other than its layout: in {mode} mode {difference}; {remedy}"
                )
        return mixes_samples(own, probe)
