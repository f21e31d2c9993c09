"""Gates on the residual blocks of any network: ours, torchvision's, timm's, or a registered class of your own."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastgate.gates import ChannelGate, Gate, LayerGate, named_gates
from fastgate.models.block import POSITIONS, ResidualBlock
from fastgate.modes import eval_mode

GATINGS = ("layer", "channel")
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class BlockLayout:
    """Which children of a residual block do what; children that are None or missing are left out."""

    branch: tuple[str, ...]
    shortcut: str | None
    activation: str | None


# by qualified class name, so that nothing is imported to know them
_LAYOUTS = {
    "torchvision.models.resnet.BasicBlock": BlockLayout(("conv1", "bn1", "relu", "conv2", "bn2"), "downsample", "relu"),
    "torchvision.models.resnet.Bottleneck": BlockLayout(
        ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3"), "downsample", "relu"
    ),
    "timm.models.resnet.BasicBlock": BlockLayout(
        ("conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2", "se", "drop_path"), "downsample", "act2"
    ),
    "timm.models.resnet.Bottleneck": BlockLayout(
        ("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3", "bn3", "se", "drop_path"),
        "downsample",
        "act3",
    ),
}


# networks whose blocks follow the stem's activation (by these names) and each other, with pooling at most in between
_RELU_NETWORKS = {"torchvision.models.resnet.ResNet": "relu", "timm.models.resnet.ResNet": "act1"}


def _all_relu(model: nn.Module, blocks: Iterable[ResidualBlock]) -> bool:
    """Whether the stem and every block of a network of `_RELU_NETWORKS` end in a ReLU, so that all inputs are >= 0."""
    ends = [getattr(model, _RELU_NETWORKS[_class_name(type(model))], None)]
    ends += [getattr(block, block.activation_name or "", None) for block in blocks]
    return all(type(end) is nn.ReLU for end in ends)


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def register_block(
    cls: type[nn.Module], *, branch: Sequence[str], shortcut: str | None = None, activation: str | None = None
) -> None:
    """Tell :func:`attach` how a residual block class computes: activation(shortcut(x) + branch(x)).

    Args:
        cls: the block's class.
        branch: names of the child modules of the branch, in the order they run; a name may occur twice.
        shortcut: name of the child on the shortcut; None, or a child that is None, is the identity.
        activation: name of the child applied to the sum; None for none.

    Example: `register_block(MyBlock, branch=("conv1", "bn1", "relu", "conv2", "bn2"), activation="relu")`
    """
    if not branch:
        raise ValueError(f"branch: expected the names of child modules of {cls.__name__}, got none")
    _LAYOUTS[_class_name(cls)] = BlockLayout(tuple(branch), shortcut, activation)


def _to_residual_block(block: nn.Module, layout: BlockLayout) -> ResidualBlock:
    """The same children under the same names, so that state_dict keys stay as they were."""
    # not named_children(): it leaves out a module that is registered under a second name
    children = {name: child for name, child in block._modules.items() if child is not None}
    named = [*layout.branch, *(name for name in (layout.shortcut, layout.activation) if name is not None)]
    remedy = "correct its register_block()"
    if missing := [name for name in named if not hasattr(block, name)]:
        raise ValueError(f"{type(block).__name__}: no child named {', '.join(missing)}; {remedy}")
    unused = [name for name in children if name not in named and not isinstance(children[name], nn.Identity)]
    if unused := unused + list(block._parameters) + list(block._buffers):
        raise ValueError(f"{type(block).__name__}: its layout leaves out {', '.join(unused)}; {remedy}")
    branch = [name for name in layout.branch if name in children]
    result = ResidualBlock(
        children,
        branch,
        layout.shortcut if layout.shortcut in children else None,
        layout.activation if layout.activation in children else None,
    )
    result.training = block.training
    return result


@dataclass(frozen=True)
class _Cut:
    """Where a channel gate acts: before branch module `gate_at`, on the input (or output) of `conv`."""

    conv: nn.Conv2d
    gate_at: int
    on_output: bool

    @property
    def channels(self) -> int:
        return self.conv.out_channels if self.on_output else self.conv.in_channels


def _find_cut(name: str, block: ResidualBlock, position: str) -> _Cut:
    convs = block.branch_convs()
    if len({child for _, child, _ in convs}) < len(convs):
        raise ValueError(f"block {name!r}: a convolution that runs twice cannot be cut; use gating='layer'")
    (first_at, _, first), (last_at, _, last) = convs[0], convs[-1]
    if position == "after":
        cut, sliced = _Cut(last, len(block.branch), True), [last]
    elif position == "before":
        cut, sliced = _Cut(first, first_at, False), [first]
    elif len(convs) > 1:
        cut, sliced = _Cut(last, last_at, False), [convs[-2][2], last]
    else:
        raise ValueError(f"block {name!r}: position 'middle' needs two convolutions in the branch, got 1")
    if any(conv.groups != 1 for conv in sliced):
        raise ValueError(
            f"block {name!r}: channel gates at position {position!r} would cut a grouped convolution, which is not "
            "supported; use another position or gating='layer'"
        )
    # the place is tried out on the block now, so that no network trains with gates that compact() would refuse
    previous, block.gate_at = block.gate_at, cut.gate_at
    try:
        block.cut_with_gate()
        if position != "after":
            block.gone_when_empty()
    except ValueError as error:
        raise ValueError(f"block {name!r}: {error}") from error
    finally:
        block.gate_at = previous
    return cut


def _map_sizes(model: nn.Module, cuts: dict[str, _Cut], image: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Height and width of the maps that each cut sees for images of this size, by one forward."""
    sizes: dict[str, tuple[int, int]] = {}

    def hook_for(name: str, cut: _Cut) -> RemovableHandle:
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


def attach(
    model: Network,
    gating: str = "layer",
    position: str = "middle",
    *,
    spatial_size: tuple[int, int] | None = None,
    **gate_options: Any,
) -> Network:
    """Put a gate on every residual block of the model, in place, and return the model.

    Each block of a known class becomes a :class:`~fastgate.models.block.ResidualBlock` with the same children under
    the same names (state_dict keys stay) and a child `gate`. Downsampling blocks are gated too; shortcuts always run.

    Args:
        model: a network of this library, of torchvision or timm (ResNet blocks), or with registered blocks.
        gating: `"layer"`: one gate per block; `"channel"`: one per channel at `position`.
        position: of channel gates. `"middle"`: on the input of the branch's last convolution, which shrinks it and the
            convolution before; `"before"`: on the input of the first; `"after"`: on the branch's result.
        spatial_size: (H, W) of the image: channel gates then flatten their maps as the paper does; None pools them.
        gate_options: passed to :class:`~fastgate.LayerGate` or :class:`~fastgate.ChannelGate`.

    Raises:
        ValueError: unknown gating or position, no known residual block, a network that has gates already, a block
            whose convolutions cannot be cut there.
        TypeError: an unknown gate option.
    """
    if gating not in GATINGS:
        raise ValueError(f"gating: expected one of {', '.join(GATINGS)}, got {gating!r}")
    if position not in POSITIONS:
        raise ValueError(f"position: expected one of {', '.join(POSITIONS)}, got {position!r}")
    if gating == "layer" and spatial_size is not None:
        raise ValueError("spatial_size: a layer gate always pools its input; leave it None with gating='layer'")
    if existing := [name for name, _ in named_gates(model)]:
        raise ValueError(
            f"model: expected no gates, got {len(existing)} ({existing[0]}, ...); attach to a plain network"
        )
    if "out_channels" in gate_options:
        raise TypeError("attach() got an unexpected gate option 'out_channels': it is that of the gated features")
    blocks: dict[str, ResidualBlock] = {}
    seen: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        layout = _LAYOUTS.get(_class_name(type(module)))
        if layout is not None or isinstance(module, ResidualBlock):
            if module in seen:
                raise ValueError(
                    f"block {name!r}: it is the same module as {seen[module]!r}; a gate decides for one place, so give "
                    "each place a block of its own"
                )
            seen[module] = name
        if isinstance(module, ResidualBlock):
            blocks[name] = module
        elif layout is not None:
            blocks[name] = _to_residual_block(module, layout)
    if not blocks:
        raise ValueError(
            f"model: found no residual block in {type(model).__name__}; known are fastgate's own and "
            f"{', '.join(_LAYOUTS)}; declare others with fastgate.register_block()"
        )
    if compacted := [name for name, b in blocks.items() if b.in_index is not None or b.out_index is not None]:
        raise ValueError(
            f"block {compacted[0]!r}: expected a block with all its channels, got one that compact() has cut; attach "
            "gates to the network before it is compacted"
        )
    if empty := [name for name, block in blocks.items() if not block.branch_convs()]:
        raise ValueError(f"block {empty[0]!r}: expected a convolution in its branch, got none")
    cuts: dict[str, _Cut] = {}
    if gating == "layer":
        gates: dict[str, Gate] = {
            name: LayerGate(block.branch_convs()[0][2].in_channels, **gate_options) for name, block in blocks.items()
        }
    else:
        cuts = {name: _find_cut(name, block, position) for name, block in blocks.items()}
        sizes = {} if spatial_size is None else _map_sizes(model, cuts, spatial_size)
        gates = {
            name: ChannelGate(cut.channels, spatial_size=sizes.get(name), **gate_options) for name, cut in cuts.items()
        }
    # nothing raises from here on: a model that was refused above is as it was
    in_relu_network = _class_name(type(model)) in _RELU_NETWORKS and _all_relu(model, blocks.values())
    for name, block in blocks.items():
        block.input_nonnegative = block.input_nonnegative or in_relu_network
        block.gate = gates[name].to(block.branch_convs()[0][2].weight).train(block.training)
        block.gate_at = cuts[name].gate_at if name in cuts else 0
        if name == "":
            return cast(Network, block)
        if model.get_submodule(name) is not block:
            model.set_submodule(name, block)
    return model
