"""Attaches gates to the residual blocks of any network."""

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils.hooks import RemovableHandle

from fastgate.gates import ChannelGate, Gate, LayerGate, named_gates
from fastgate.models.block import POSITIONS, ResidualBlock
from fastgate.models.channels import FoundCut, find_cuts
from fastgate.models.cuts import runs_as, shared_modules
from fastgate.models.gated import Closed, Cut, put_gate
from fastgate.models.hooks import move_hooks
from fastgate.models.layout import (
    NOT_BATCH_FIRST,
    FoundBlock,
    check_layout,
    find_blocks,
    kind_of,
    registered_layout,
    to_residual_block,
)
from fastgate.models.probing import guess_probe, probe_copy
from fastgate.modes import eval_mode

GATINGS = ("layer", "channel", "both")
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class _ConvCut:
    """Where a channel gate acts: before branch module `gate_at`, on the input (or output) of `conv`."""

    conv: nn.Conv2d
    gate_at: int
    on_output: bool

    @property
    def channels(self) -> int:
        return self.conv.out_channels if self.on_output else self.conv.in_channels


def _find_cut(name: str, block: ResidualBlock, position: str, shared: set[nn.Module]) -> _ConvCut:
    convs = block.branch_convs()
    if not convs:
        raise ValueError(f"block {name!r}: a channel gate needs a convolution in the branch, got none")
    if len({conv for _, _, conv in convs}) < len(convs):
        raise ValueError(f"block {name!r}: a convolution that runs twice cannot be cut; use gating='layer'")
    (first_at, _, first), (last_at, _, last) = convs[0], convs[-1]
    if position == "after":
        cut = _ConvCut(last, len(block.branch), True)
    elif position == "before":
        cut = _ConvCut(first, first_at, False)
    elif len(convs) > 1:
        cut = _ConvCut(last, last_at, False)
    else:
        raise ValueError(f"block {name!r}: position 'middle' needs two convolutions in the branch, got 1")
    # checked on the block now, so that no network trains with gates that compact() would reject
    previous, block.gate_at = block.gate_at, cut.gate_at
    try:
        block.check_cut(shared)
        if position != "after":
            block.gone_when_empty()
    except ValueError as error:
        raise ValueError(f"block {name!r}: {error}") from error
    finally:
        block.gate_at = previous
    return cut


def _map_sizes(model: nn.Module, cuts: dict[str, _ConvCut], image: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Height and width of the feature maps at each cut for images of this size, from one forward."""
    sizes: dict[str, tuple[int, int]] = {}

    def hook_for(name: str, cut: _ConvCut) -> RemovableHandle:
        def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            height, width = (output if cut.on_output else inputs[0]).shape[2:]
            sizes[name] = (height, width)

        return cut.conv.register_forward_hook(record)

    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    handles = [hook_for(name, cut) for name, cut in cuts.items()]
    try:
        with torch.no_grad(), eval_mode(model):
            model(stem.weight.new_zeros(1, stem.in_channels, *image))
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def _refuse_lazy(what: str, network: nn.Module) -> None:
    for child, module in network.named_modules():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise ValueError(
                f"{what}: expected the sizes of its modules to be known, got an uninitialized "
                f"{type(module).__name__} {child!r}; run one batch through the network first"
            )


@dataclass(frozen=True)
class _Place:
    """A planned gate.

    Attributes:
        name: name of the module that gets the gate.
        target: that module, or the residual block that replaces it.
        gate: the gate.
        how: for a module that keeps its forward, the effect of the gate.
        gate_at: for a residual block, the position of a channel gate.
    """

    name: str
    target: nn.Module
    gate: Gate
    how: Closed | Cut | None = None
    gate_at: int = 0


def attach(
    model: Network,
    gating: str = "layer",
    position: str = "middle",
    *,
    spatial_size: tuple[int, int] | None = None,
    inputs: Any = None,
    **gate_options: Any,
) -> Network:
    """Add a gate to every residual block of the model, in place, and return the model.

    Residual blocks are found by running copies of candidate modules on random inputs: a residual block returns the sum
    of its input and a function of its input. Names, state_dict keys and hooks are kept; only children named `gate` are
    added.

    * A block of the form `activation(shortcut(x) + branch(x))`, both chains of its children applied to images, becomes
      a :class:`~fastgate.models.block.ResidualBlock`, which computes less where a gate is closed.
    * Any other block keeps its own forward, and returns its shortcut where its layer gate is closed. A block with
      several sums (attention and MLP) gets a gate for each, on a module of that sum's branch.
    * Everything found is verified before anything changes: with open and closed gates, in eval and in training mode;
      for chains, gradients too.

    Shortcuts always run. Blocks without a shortcut get no layer gate. A warning names blocks that cannot be gated.

    Args:
        model: any network. Blocks declared with :func:`register_block` are used as declared.
        gating: `"layer"`: one gate per block (or sum); `"channel"`: one per channel at `position`; `"both"`: layer
            gates and, inside the branches, channel gates at `"middle"`.
        position: position of channel gates. `"middle"`: on the input of the branch's last convolution, which shrinks it
            and the convolution before; `"before"`: on the input of the first; `"after"`: on the branch's result.
        spatial_size: (H, W) of the image, with which channel gates flatten feature maps as the paper does; None pools.
        inputs: example inputs, for a network whose blocks need more than images of a common size: a tensor; a mapping
            of keyword arguments; a tuple of positional ones; anything else is the only argument.
        gate_options: passed to :class:`~fastgate.LayerGate` or :class:`~fastgate.ChannelGate`.

    Raises:
        ValueError: unknown gating or position, no residual block that can be gated, a network that has gates already, a
            registered block that computes something else than declared, convolutions that cannot be cut there, inputs
            on which the network raises.
        TypeError: an unknown gate option.
    """
    _check_options(model, gating, position, spatial_size, gate_options)
    known = _known_blocks(model)
    found = find_blocks(model, known, inputs, plain=gating != "layer")
    _refuse_repeated(model, {*known.values(), *(block.module for block in found.values())})
    if not known and not found:
        raise ValueError(
            f"model: found no residual block in {type(model).__name__}: none of its modules returns the sum of its "
            "input and a function of its input (or none could be run: pass inputs=, example inputs of the network); "
            "declare residual blocks with fastgate.register_block()"
        )
    for name, module in {**known, **{name: block.module for name, block in found.items()}}.items():
        _refuse_lazy(f"block {name!r}", module)
    blocks = _residual_blocks(known, found)
    places = []
    if gating != "channel":
        places += _place_layer_gates(blocks, found, gate_options)
    if gating == "both":
        places += _place_channel_gates(model, {}, {**_as_found(known), **found}, position, None, gate_options)
    if gating == "channel":
        places += _place_channel_gates(model, blocks, found, position, spatial_size, gate_options)
    _refuse_repeated(model, {model.get_submodule(place.name) for place in places})
    counts = Counter(place.name for place in places if place.how is not None)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(
            f"module {twice[0]!r}: expected one gate, got a layer gate and a channel gate; use gating='layer' or "
            "'channel'"
        )
    # nothing raises from here on, so a model rejected above has not changed
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    for place in sorted(places, key=lambda place: order[place.name]):
        original = model.get_submodule(place.name)
        like = next((p for p in (*original.parameters(), *model.parameters()) if p.is_floating_point()), None)
        gate = (place.gate if like is None else place.gate.to(like)).train(original.training)
        if place.how is not None:
            put_gate(original, gate, place.how)
            for name, module in (found[place.name].new if place.name in found else {}).items():
                original.add_module(name, module)
            continue
        block = cast(ResidualBlock, place.target)
        if block is not original:
            move_hooks(original, block)
        block.gate = gate
        block.gate_at = place.gate_at
        if place.name == "":
            return cast(Network, block)
        if block is not original:
            model.set_submodule(place.name, block)
    return model


def _check_options(
    model: nn.Module,
    gating: str,
    position: str,
    spatial_size: tuple[int, int] | None,
    gate_options: dict[str, Any],
) -> None:
    if gating not in GATINGS:
        raise ValueError(f"gating: expected one of {', '.join(GATINGS)}, got {gating!r}")
    if position not in POSITIONS:
        raise ValueError(f"position: expected one of {', '.join(POSITIONS)}, got {position!r}")
    if gating != "channel" and spatial_size is not None:
        raise ValueError(f"spatial_size: a layer gate always pools its input; leave it None with gating={gating!r}")
    if gating == "both" and position != "middle":
        raise ValueError(f"position: expected 'middle' with gating='both', got {position!r}")
    if existing := [name for name, _ in named_gates(model)]:
        raise ValueError(
            f"model: expected no gates, got {len(existing)} ({existing[0]}, ...); attach to a plain network"
        )
    if "out_channels" in gate_options:
        raise TypeError("attach() got an unexpected gate option 'out_channels': it follows from the gated features")
    if spatial_size is not None:
        _refuse_lazy("model", model)  # the whole network runs, to determine the size of each feature map


def _known_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Blocks known without a search: ours, and those of registered classes."""
    known = {}
    for name, module in model.named_modules():
        if registered_layout(module) is not None:
            known[name] = module
        elif isinstance(module, ResidualBlock):
            if not runs_as(module, ResidualBlock):
                raise ValueError(
                    f"block {name!r}: expected the forward of fastgate's ResidualBlock, got another one in "
                    f"{type(module).__name__}; declare what it computes with fastgate.register_block()"
                )
            known[name] = module
    return known


def _refuse_repeated(model: nn.Module, blocks: set[nn.Module]) -> None:
    seen: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module not in blocks:
            continue
        if module in seen:
            raise ValueError(
                f"block {name!r}: it is the same module as {seen[module]!r}; a gate decides for one place, so use a "
                "separate block in each place"
            )
        seen[module] = name


def _residual_blocks(known: dict[str, nn.Module], found: dict[str, FoundBlock]) -> dict[str, ResidualBlock]:
    """The blocks that are chains, by name; new blocks share the children of the network's own."""
    blocks: dict[str, ResidualBlock] = {}
    for name, module in known.items():
        layout = registered_layout(module)
        if layout is not None:
            blocks[name] = to_residual_block(module, layout)
        elif isinstance(module, ResidualBlock):
            blocks[name] = module
    if compacted := [name for name, b in blocks.items() if b.in_index is not None or b.out_index is not None]:
        raise ValueError(
            f"block {compacted[0]!r}: expected a block with all its channels, got one cut by compact(); attach gates "
            "before compacting the network"
        )
    if empty := [name for name, block in blocks.items() if not block.branch_convs()]:
        raise ValueError(
            f"block {empty[0]!r}: expected a convolution in its branch, got none; attach gates before fusing or "
            "wrapping modules, and name every convolution in its register_block()"
        )
    for name, module in known.items():
        layout = registered_layout(module)
        if layout is not None and check_layout(name, module, layout):
            blocks[name].mixes_samples = True
    for name, block in found.items():
        if block.layout is not None:
            blocks[name] = to_residual_block(block.module, block.layout)
            blocks[name].mixes_samples = block.mixes_samples
    return blocks


def _as_found(known: dict[str, nn.Module]) -> dict[str, FoundBlock]:
    """Known blocks, with probe images on which their channels can be traced."""
    probes = {name: guess_probe(probe_copy(module), strict=False) for name, module in known.items()}
    return {
        name: FoundBlock(known[name], probe, None, {}, {}, {}, "", 0, False, 1)
        for name, probe in probes.items()
        if probe is not None
    }


def _place_layer_gates(
    blocks: dict[str, ResidualBlock], found: dict[str, FoundBlock], options: dict[str, Any]
) -> list[_Place]:
    places = []
    refused = {}
    for name, block in blocks.items():
        width = found[name].width if name in found else block.branch_convs()[0][2].in_channels
        places.append(_Place(name, block, LayerGate(width, **options)))
    for name, other in found.items():
        if name in blocks:
            continue
        if not other.closed and other.sums:
            refused[name] = other.reason
        for part, closed in other.closed.items():
            path = ".".join(p for p in (name, part) if p)
            module = other.module.get_submodule(part)
            places.append(_Place(path, module, LayerGate(other.widths[part], **options), closed))
    if refused and not places:
        name, reason = next(iter(refused.items()))
        raise ValueError(f"block {name!r}: cannot be gated: {reason}; declare it with fastgate.register_block()")
    _warn_refused(refused)
    return places


def _warn_refused(refused: dict[str, str]) -> None:
    if refused:
        named = "; ".join(f"{name!r}: {reason}" for name, reason in list(refused.items())[:3])
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        warnings.warn(f"{len(refused)} residual blocks get no gate: {named}{more}", UserWarning, stacklevel=4)


def _place_channel_gates(
    model: nn.Module,
    blocks: dict[str, ResidualBlock],
    found: dict[str, FoundBlock],
    position: str,
    spatial_size: tuple[int, int] | None,
    options: dict[str, Any],
) -> list[_Place]:
    shared = shared_modules(model)
    convs: dict[str, _ConvCut] = {}
    inner: dict[str, list[FoundCut]] = {}
    refused: dict[str, str] = {}
    seen: dict[Any, tuple[list[FoundCut], str]] = {}  # identical blocks are tried once
    for name in {**blocks, **found}:
        try:
            if name not in blocks:
                raise ValueError(f"block {name!r}: position {position!r} needs a block that is a chain of convolutions")
            convs[name] = _find_cut(name, blocks[name], position, shared)
        except ValueError as error:
            if name not in found:
                raise
            inner[name], reason = _find_inner_cuts(found[name], shared, seen) if position == "middle" else ([], "")
            # for a chain of convolutions, the reason is already known
            if not inner[name] and name in blocks and sum(c.groups == 1 for *_, c in blocks[name].branch_convs()) > 1:
                raise
            if not inner[name]:
                refused[name] = reason or str(error).partition(": ")[2]
    cut = [each for cuts in inner.values() for each in cuts]
    if convs or cut:
        _warn_refused(refused)
    if not convs and not cut:
        name, reason = next(iter(refused.items()))
        raise ValueError(f"block {name!r}: its channels cannot be gated: {reason}; use gating='layer'")
    if cut and spatial_size is not None:
        raise ValueError(
            f"spatial_size: expected None for a network with gates inside its blocks' own modules, got {spatial_size}; "
            "these gates pool their input"
        )
    sizes = {} if spatial_size is None else _map_sizes(model, convs, spatial_size)
    places = [
        _Place(
            name, blocks[name], ChannelGate(cut.channels, spatial_size=sizes.get(name), **options), gate_at=cut.gate_at
        )
        for name, cut in convs.items()
    ]
    for name, cuts in inner.items():
        for each in cuts:
            gate = ChannelGate(each.width, each.width // each.cut.group, **options)
            path = ".".join(part for part in (name, each.name) if part)
            places.append(_Place(path, found[name].module.get_submodule(each.name), gate, each.cut))
    return places


def _find_inner_cuts(
    block: FoundBlock, shared: set[nn.Module], seen: dict[Any, tuple[list[FoundCut], str]]
) -> tuple[list[FoundCut], str]:
    if not block.probe.follows_batch:
        return [], NOT_BATCH_FIRST
    names = {name for name, module in block.module.named_modules() if module in shared}
    key = kind_of(block.module), str(block.probe.sizes), frozenset(names)
    if key not in seen:
        seen[key] = find_cuts(probe_copy(block.module), block.probe, names, block.sums)
    return seen[key]
