"""Compaction: turns a frozen gated network into a plain, physically smaller one with the same outputs."""

from collections import OrderedDict
from contextlib import suppress
from typing import cast

from torch import Tensor, nn

from fastgate.gates import Gate, LayerGate, named_gates
from fastgate.models.block import EmptyConv2d, Gated, ResidualBlock, gated_blocks
from fastgate.models.cuts import is_norm, shared_modules
from fastgate.models.cutting import check_parts, cut_module, cut_parts, empty_parts
from fastgate.models.gated import Closed, Cut, GatedModule, Skip, Zeros, features_name, owner_of, plain_class, take_gate
from fastgate.models.hooks import copy_network, hooked, warn_of_lost_hooks
from fastgate.pruning.signs import given_nonnegative


def compact(model: nn.Module) -> nn.Module:
    """Return a new plain network without closed blocks, closed channels and gates; the input model does not change.

    In eval mode its outputs equal those of the frozen network: bit-equal in fp32 for layer gates (the same operations
    on the same tensors), up to the rounding of shorter sums for channel gates.

    * Closed layer gate: the branch is removed. An identity block becomes `nn.Identity` if its input is known to be
      >= 0, so that its ReLU has no effect; otherwise the ReLU stays. A downsampling block keeps its shortcut. All
      other blocks keep their names.
    * Closed channels: the corresponding rows and columns of the convolutions before and after the gate are removed. If
      no channel is left, the convolution after the gate becomes a constant
      (:class:`~fastgate.models.block.EmptyConv2d`); at position "after" the whole branch is removed.

    Raises:
        ValueError: a gate that is not frozen, or outside a residual block of this library; closed channels that cannot
            be cut because the network was changed after `attach` (weight norm, pruning, quantization, shared modules).
    """
    gates = dict(named_gates(model))
    if not gates:
        raise ValueError("model: expected frozen gates, got none; a plain network is already compact")
    if live := [name for name, gate in gates.items() if not gate.frozen]:
        more = f" and {len(live) - 4} more" if len(live) > 4 else ""
        raise ValueError(
            f"model: expected every gate frozen, got live gates {', '.join(live[:4])}{more}; call "
            "fastgate.freeze(model, fastgate.decide(model, loader)) first"
        )
    copied = copy_network(model)
    hooks = hooked(copied)
    small = cut_frozen(copied)
    warn_of_lost_hooks(hooks, small)
    return small


def cut_frozen(model: nn.Module) -> nn.Module:
    """Remove frozen gates and their closed parts from a network in place, as :func:`compact` does; live gates stay.

    Parameters that are not cut stay the same objects, and all remaining parameters keep their names.

    Returns:
        The same model, unless it is itself a single closed block: then what remains of it.

    Raises:
        ValueError: a gate outside a residual block of this library, or a block that cannot be cut; the network is then
            unchanged.
    """
    blocks = gated_blocks(model)
    _check_cuts(model, blocks)
    frozen = {name: block for name, block in blocks.items() if _gate(block).frozen}
    closed = {name: block for name, block in frozen.items() if not bool(_gate(block).open.any())}
    nonnegative = given_nonnegative(model) if any(_may_drop_relu(block) for block in closed.values()) else set()
    # channels first: names are those of the whole network until blocks are removed
    for name, block in frozen.items():
        gate = _gate(block)
        if isinstance(block, GatedModule):
            if isinstance(block.gated, Cut):
                _cut_parts(model, name, block)
        elif not isinstance(gate, LayerGate) and not bool(gate.open.all()):
            if name not in closed:
                _keep_channels(block, gate.open.nonzero().flatten())
            elif block.gate_at < len(block.branch):
                block.gate = None
                _empty_channels(block)
                del closed[name]
    for name, block in frozen.items():
        if name in closed and not (isinstance(block, GatedModule) and isinstance(block.gated, Cut)):
            rest = (
                _without_module(model, name, block)
                if isinstance(block, GatedModule)
                else _without_branch(block, _block_name(name) in nonnegative)
            )
            if rest is not None and block is model:
                return rest
            if rest is not None:
                _put(model, _block_name(name), rest)
        elif isinstance(block, GatedModule):
            take_gate(block)
        else:
            block.gate = None
    return model


def _gate(block: Gated) -> Gate:
    return cast(Gate, block.own_gate)


def _block_name(gate_name: str) -> str:
    return gate_name.rpartition(".")[0]


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the module of this name if its parent still exists."""
    parent, _, child = name.rpartition(".")
    with suppress(AttributeError):
        setattr(model.get_submodule(parent), child, module)


def _cut_parts(model: nn.Module, name: str, place: GatedModule) -> None:
    cut, gate = cast(Cut, place.gated), _gate(place)
    if bool(gate.open.all()):
        return
    owner = owner_of(model, name, place)
    opened = gate.open.clone()
    if not bool(opened.any()):
        # the modules in between need at least one channel: one stays, with zero weight in the sum that follows
        opened[0] = True
        empty_parts(owner, cut.parts)
    channels = opened.repeat_interleave(cut.group).nonzero().flatten()
    cut_parts(owner, cut.parts, channels)


def _without_module(model: nn.Module, name: str, place: GatedModule) -> nn.Module | None:
    """What remains of a module with a closed layer gate: its shortcut, or zeros; unused modules are removed."""
    closed, features = cast(Closed, place.gated), features_name(place.ungated)
    if closed.skip is not None:
        rest = _as_one([(child, getattr(place, child)) for child in closed.skip], place)
        return rest if closed.alone else Skip(rest, features=features).train(place.training)
    owner = owner_of(model, name, place)
    for part in closed.gone:
        if part != closed.within:
            with suppress(AttributeError):  # its parent may have been removed with another gate
                kind = plain_class(owner.get_submodule(part))
                _put(owner, part, Zeros(features_name(kind)) if closed.zeroed else nn.Identity())
    zeros = Zeros(features, closed.others)
    zeros.training = place.training
    return zeros


def _check_cuts(model: nn.Module, blocks: dict[str, Gated]) -> None:
    """Repeat the checks of `attach`, as the network may have been changed since."""
    shared = shared_modules(model)
    for name, block in blocks.items():
        gate = _gate(block)
        if isinstance(block, GatedModule):
            if isinstance(block.gated, Cut) and gate.frozen and not bool(gate.open.all()):
                owner = owner_of(model, name, block)
                try:
                    check_parts(owner, block.gated.parts, shared)
                except ValueError as error:
                    raise ValueError(f"gate {name!r}: {error}") from error
            continue
        if isinstance(gate, LayerGate) or not gate.frozen or bool(gate.open.all()):
            continue
        closed = not bool(gate.open.any())
        if closed and block.gate_at == len(block.branch):
            continue  # the whole branch is removed
        try:
            block.check_cut(shared)
            if closed:
                block.gone_when_empty()
        except ValueError as error:
            raise ValueError(f"block {name.rpartition('.')[0]!r}: {error}") from error


def _keep_channels(block: ResidualBlock, kept: Tensor) -> None:
    """Cut the convolutions and norms around the gate down to the kept channels."""
    cut = block.cut_convs()
    for child in block.cut_with_gate():
        if is_norm(getattr(block, child)):
            cut_module(getattr(block, child), "each", kept)
    for _, conv, dim in cut:
        cut_module(conv, "out" if dim == 0 else "in", kept)
    if len(cut) == 1 and cut[0][2] == 1:
        block.in_index = kept
    if len(cut) == 1 and cut[0][2] == 0:
        block.out_index = kept


def _empty_channels(block: ResidualBlock) -> None:
    """Handle a gate without open channels: make the convolution after it a constant, remove the modules feeding it."""
    gone = block.gone_when_empty()
    child, conv, _ = next(cut for cut in block.cut_convs() if cut[2] == 1)
    convs = [module for module in (*(getattr(block, name) for name in gone), conv) if isinstance(module, nn.Conv2d)]
    geometry = [(c.kernel_size, c.stride, c.padding, c.dilation) for c in convs]
    empty = EmptyConv2d(conv.out_channels, geometry, conv.bias is not None).to(conv.weight)
    if conv.bias is not None:
        empty.bias = cast(nn.Parameter, conv.bias)
    setattr(block, child, empty)
    at = block.branch.index(child)
    # an in-place module at the start of the branch also changes the shortcut's input
    kept = block.branch[:1] if len(gone) == at and _starts_in_place(block) else block.branch[: at - len(gone)]
    block.branch = kept + block.branch[at:]
    _drop_unused(block)


def _starts_in_place(block: ResidualBlock) -> bool:
    return block.shortcut_name is None and bool(getattr(getattr(block, block.branch[0]), "inplace", False))


def _drop_unused(block: ResidualBlock) -> None:
    used = {*block.branch, block.shortcut_name, block.activation_name}
    for child in [child for child, _ in block.named_children() if child not in used]:
        delattr(block, child)


def _may_drop_relu(block: Gated) -> bool:
    """Whether only the ReLU of a closed block may remain."""
    if not isinstance(block, ResidualBlock):
        return False
    activation = getattr(block, block.activation_name or "", None)
    return type(activation) is nn.ReLU and block.shortcut_name is None


def _without_branch(block: ResidualBlock, input_nonnegative: bool) -> nn.Module:
    """The block without its branch, activation(shortcut(x)), as the fewest modules."""
    kept: list[tuple[str, nn.Module]] = []
    if block.shortcut_name is not None:
        kept.append((block.shortcut_name, getattr(block, block.shortcut_name)))
    elif _starts_in_place(block):
        kept.append((block.branch[0], getattr(block, block.branch[0])))
    if block.activation_name is not None:
        activation = getattr(block, block.activation_name)
        if kept or not (input_nonnegative and type(activation) is nn.ReLU):
            kept.append((block.activation_name, activation))
    return _as_one(kept, block)


def _as_one(kept: list[tuple[str, nn.Module]], block: nn.Module) -> nn.Module:
    """These modules in sequence, to replace the block."""
    for _, module in kept:
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]  # its input is no longer a fresh sum but another module's output
    rest = nn.Sequential(OrderedDict(kept)) if kept else nn.Identity()
    rest.training = block.training
    return rest
