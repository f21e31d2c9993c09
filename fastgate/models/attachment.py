"""Gates on the residual blocks of any network: ours, torchvision's, timm's, or a registered class of your own."""

from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils.hooks import RemovableHandle

from fastgate.gates import ChannelGate, Gate, LayerGate, named_gates
from fastgate.models.block import POSITIONS, ResidualBlock
from fastgate.models.cuts import runs_as, shared_modules
from fastgate.models.hooks import move_hooks
from fastgate.models.layout import BlockLayout, check_layout, find_layout, known_classes, to_residual_block
from fastgate.modes import eval_mode

GATINGS = ("layer", "channel")
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class _Cut:
    """Where a channel gate acts: before branch module `gate_at`, on the input (or output) of `conv`."""

    conv: nn.Conv2d
    gate_at: int
    on_output: bool

    @property
    def channels(self) -> int:
        return self.conv.out_channels if self.on_output else self.conv.in_channels


def _find_cut(name: str, block: ResidualBlock, position: str, shared: set[nn.Module]) -> _Cut:
    convs = block.branch_convs()
    if len({conv for _, _, conv in convs}) < len(convs):
        raise ValueError(f"block {name!r}: a convolution that runs twice cannot be cut; use gating='layer'")
    (first_at, _, first), (last_at, _, last) = convs[0], convs[-1]
    if position == "after":
        cut = _Cut(last, len(block.branch), True)
    elif position == "before":
        cut = _Cut(first, first_at, False)
    elif len(convs) > 1:
        cut = _Cut(last, last_at, False)
    else:
        raise ValueError(f"block {name!r}: position 'middle' needs two convolutions in the branch, got 1")
    # the place is tried out on the block now, so that no network trains with gates that compact() would refuse
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


def _refuse_lazy(what: str, network: nn.Module) -> None:
    for child, module in network.named_modules():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise ValueError(
                f"{what}: expected the sizes of its modules to be known, got an uninitialized "
                f"{type(module).__name__} {child!r}; run one batch through the network first"
            )


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
    the same names (state_dict keys stay) and a child `gate`; it keeps the block's hooks and plain attributes.
    Downsampling blocks are gated too; shortcuts always run. What a class is known to compute is compared with the
    forward of every block first, on a copy.

    Args:
        model: a network of this library, of torchvision or timm (ResNet blocks), or with registered blocks.
        gating: `"layer"`: one gate per block; `"channel"`: one per channel at `position`.
        position: of channel gates. `"middle"`: on the input of the branch's last convolution, which shrinks it and the
            convolution before; `"before"`: on the input of the first; `"after"`: on the branch's result.
        spatial_size: (H, W) of the image: channel gates then flatten their maps as the paper does; None pools them.
        gate_options: passed to :class:`~fastgate.LayerGate` or :class:`~fastgate.ChannelGate`.

    Raises:
        ValueError: unknown gating or position, no known residual block, a network that has gates already, a block that
            computes something else than its layout says, a block whose convolutions cannot be cut there.
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
    if spatial_size is not None:
        _refuse_lazy("model", model)  # the whole of it runs, to see the size of each map
    blocks: dict[str, ResidualBlock] = {}
    originals: dict[str, tuple[nn.Module, BlockLayout]] = {}
    seen: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        layout = find_layout(module)
        if layout is not None or isinstance(module, ResidualBlock):
            if module in seen:
                raise ValueError(
                    f"block {name!r}: it is the same module as {seen[module]!r}; a gate decides for one place, so give "
                    "each place a block of its own"
                )
            seen[module] = name
            _refuse_lazy(f"block {name!r}", module)
        if isinstance(module, ResidualBlock):
            if not runs_as(module, ResidualBlock):
                raise ValueError(
                    f"block {name!r}: expected the forward of fastgate's ResidualBlock, got another one in "
                    f"{type(module).__name__}; declare what it computes with fastgate.register_block()"
                )
            blocks[name] = module
        elif layout is not None:
            blocks[name], originals[name] = to_residual_block(module, layout), (module, layout)
    if not blocks:
        raise ValueError(
            f"model: found no residual block in {type(model).__name__}; known are fastgate's own and "
            f"{known_classes()}; declare others with fastgate.register_block()"
        )
    if compacted := [name for name, b in blocks.items() if b.in_index is not None or b.out_index is not None]:
        raise ValueError(
            f"block {compacted[0]!r}: expected a block with all its channels, got one that compact() has cut; attach "
            "gates to the network before it is compacted"
        )
    if empty := [name for name, block in blocks.items() if not block.branch_convs()]:
        raise ValueError(
            f"block {empty[0]!r}: expected a convolution in its branch, got none; attach gates before modules are "
            "fused or wrapped, and name every convolution in its register_block()"
        )
    for name, (original, layout) in originals.items():
        if check_layout(name, original, layout):
            blocks[name].mixes_samples = True
    cuts: dict[str, _Cut] = {}
    if gating == "layer":
        gates: dict[str, Gate] = {
            name: LayerGate(block.branch_convs()[0][2].in_channels, **gate_options) for name, block in blocks.items()
        }
    else:
        shared = shared_modules(model)
        cuts = {name: _find_cut(name, block, position, shared) for name, block in blocks.items()}
        sizes = {} if spatial_size is None else _map_sizes(model, cuts, spatial_size)
        gates = {
            name: ChannelGate(cut.channels, spatial_size=sizes.get(name), **gate_options) for name, cut in cuts.items()
        }
    # nothing raises from here on: a model that was refused above is as it was
    for name, block in blocks.items():
        if name in originals:
            move_hooks(originals[name][0], block)
        block.gate = gates[name].to(block.branch_convs()[0][2].weight).train(block.training)
        block.gate_at = cuts[name].gate_at if name in cuts else 0
        if name == "":
            return cast(Network, block)
        if model.get_submodule(name) is not block:
            model.set_submodule(name, block)
    return model
