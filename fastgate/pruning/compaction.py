"""From a frozen gated network to a plain, physically smaller one that computes the same."""

from collections import OrderedDict
from typing import cast

import torch
from torch import Tensor, nn

from fastgate.gates import Gate, LayerGate, named_gates
from fastgate.models.block import EmptyConv2d, ResidualBlock, gated_blocks
from fastgate.models.cuts import is_norm, shared_modules
from fastgate.models.hooks import copy_network, hooked, warn_of_lost_hooks
from fastgate.pruning.signs import given_nonnegative


def compact(model: nn.Module) -> nn.Module:
    """A new plain network without the closed blocks and channels and without any gate; the input model is untouched.

    In eval mode it computes what the frozen network computes: bit-equal in fp32 for layer gates (the same operations on
    the same tensors), up to the rounding of shorter sums for channel gates.

    * Closed layer gate: the branch goes. What is left of an identity block is `nn.Identity` where its input is known to
      be >= 0, so that its ReLU changes nothing; elsewhere the ReLU stays. A downsampling block keeps its shortcut. All
      other blocks keep their names.
    * Closed channels: rows and columns of the convolutions beside the gate go. Where no channel is left, the
      convolution behind the gate becomes its constant (:class:`~fastgate.models.block.EmptyConv2d`); at position
      "after" the whole branch goes.

    Raises:
        ValueError: a gate that is not frozen, or outside a residual block of this library; closed channels that cannot
            be cut, where the network was changed since `attach` (weight norm, pruning, quantization, shared modules).
    """
    gates = dict(named_gates(model))
    if not gates:
        raise ValueError("model: expected frozen gates, got none; a plain network is compact already")
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
    """Remove frozen gates and what they closed from a network, in place, as :func:`compact` does; live gates stay.

    Parameters that are not cut stay the same objects, and all that are left keep their names.

    Returns:
        The same model, unless it is itself one closed block: then what is left of that.

    Raises:
        ValueError: a gate outside a residual block of this library, or a block that cannot be cut; the network is then
            as it was.
    """
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    blocks = gated_blocks(model)
    _check_cuts(model, blocks)
    nonnegative = given_nonnegative(model) if any(_may_drop_relu(block) for block in blocks.values()) else set()
    for name, block in blocks.items():
        gate = cast(Gate, block.gate)
        if not gate.frozen:
            continue
        block.gate = None
        closed = not bool(gate.open.any())
        if not isinstance(gate, LayerGate) and not bool(gate.open.all()):
            if not closed:
                _keep_channels(block, gate.open.nonzero().flatten())
            elif block.gate_at < len(block.branch):
                _empty_channels(block)
                continue
        if closed:
            rest = _without_branch(block, name.rpartition(".")[0] in nonnegative)
            if block is model:
                return rest
            key = next(key for key, module in parents[block].named_children() if module is block)
            setattr(parents[block], key, rest)
    return model


def _check_cuts(model: nn.Module, blocks: dict[str, ResidualBlock]) -> None:
    """What `attach` made sure of, once more: a network may have been changed since."""
    shared = shared_modules(model)
    for name, block in blocks.items():
        gate = cast(Gate, block.gate)
        if isinstance(gate, LayerGate) or not gate.frozen or bool(gate.open.all()):
            continue
        closed = not bool(gate.open.any())
        if closed and block.gate_at == len(block.branch):
            continue  # the whole branch goes
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
        module = getattr(block, child)
        if is_norm(module):
            _cut_norm(module, kept)
    for _, conv, dim in cut:
        conv.weight = nn.Parameter(_take_weight(conv.weight.detach(), dim, kept), conv.weight.requires_grad)
        if dim == 0:
            conv.out_channels = len(kept)
            if conv.bias is not None:
                conv.bias = nn.Parameter(conv.bias.detach()[kept], conv.bias.requires_grad)
        else:
            conv.in_channels = len(kept)
    if len(cut) == 1 and cut[0][2] == 1:
        block.in_index = kept
    if len(cut) == 1 and cut[0][2] == 0:
        block.out_index = kept


def _take_weight(weight: Tensor, dim: int, kept: Tensor) -> Tensor:
    """The kept slices `[O, I, H, W]`, in the weight's memory format, which index_select would not keep."""
    taken = weight.index_select(dim, kept)
    if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        return taken.contiguous(memory_format=torch.channels_last)
    return taken


def _cut_norm(norm: nn.Module, kept: Tensor) -> None:
    if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):  # a frozen one does not say
        norm.num_features = len(kept)
    for name in ("weight", "bias", "running_mean", "running_var"):
        old = getattr(norm, name)
        if isinstance(old, nn.Parameter):
            setattr(norm, name, nn.Parameter(old.detach()[kept], old.requires_grad))
        elif old is not None:
            setattr(norm, name, old[kept])


def _empty_channels(block: ResidualBlock) -> None:
    """No channel is left at the gate: the convolution behind it adds up nothing, what feeds it goes."""
    gone = block.gone_when_empty()
    child, conv, _ = next(cut for cut in block.cut_convs() if cut[2] == 1)
    convs = [module for module in (*(getattr(block, name) for name in gone), conv) if isinstance(module, nn.Conv2d)]
    geometry = [(c.kernel_size, c.stride, c.padding, c.dilation) for c in convs]
    empty = EmptyConv2d(conv.out_channels, geometry, conv.bias is not None).to(conv.weight)
    if conv.bias is not None:
        empty.bias = cast(nn.Parameter, conv.bias)
    setattr(block, child, empty)
    at = block.branch.index(child)
    # an in-place module at the start of the branch changes what the shortcut passes on
    kept = block.branch[:1] if len(gone) == at and _starts_in_place(block) else block.branch[: at - len(gone)]
    block.branch = kept + block.branch[at:]
    _drop_unused(block)


def _starts_in_place(block: ResidualBlock) -> bool:
    return block.shortcut_name is None and bool(getattr(getattr(block, block.branch[0]), "inplace", False))


def _drop_unused(block: ResidualBlock) -> None:
    used = {*block.branch, block.shortcut_name, block.activation_name}
    for child in [child for child, _ in block.named_children() if child not in used]:
        delattr(block, child)


def _may_drop_relu(block: ResidualBlock) -> bool:
    """Whether the block is closed and its ReLU may be all that is left of it."""
    gate = cast(Gate, block.gate)
    activation = getattr(block, block.activation_name or "", None)
    return type(activation) is nn.ReLU and block.shortcut_name is None and gate.frozen and not bool(gate.open.any())


def _without_branch(block: ResidualBlock, input_nonnegative: bool) -> nn.Module:
    """What the block computes without its branch, activation(shortcut(x)), as the fewest modules that do so."""
    kept: OrderedDict[str, nn.Module] = OrderedDict()
    if block.shortcut_name is not None:
        kept[block.shortcut_name] = getattr(block, block.shortcut_name)
    elif _starts_in_place(block):
        kept[block.branch[0]] = getattr(block, block.branch[0])
    if block.activation_name is not None:
        activation = getattr(block, block.activation_name)
        if kept or not (input_nonnegative and type(activation) is nn.ReLU):
            kept[block.activation_name] = activation
    for module in kept.values():
        if isinstance(module, nn.ReLU | nn.ReLU6 | nn.SiLU | nn.Dropout | nn.Dropout2d):
            module.inplace = False  # its input is no longer a fresh sum but another module's output
    rest = nn.Sequential(kept) if kept else nn.Identity()
    rest.training = block.training
    return rest
