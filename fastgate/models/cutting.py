"""Removes channels from modules, in place, for each kind of module."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastgate.models.cuts import check_cut, is_group_norm, is_norm, runs_as
from fastgate.models.gated import without_gate

# attributes that hold a module's channel count, by kind of module
_OUT_SIZES = ("out_channels", "out_features")
_IN_SIZES = ("in_channels", "in_features")
_EACH_SIZES = ("num_features", "num_channels")


def cut_parts(block: nn.Module, parts: Iterable[tuple[str, str]], kept: Tensor) -> None:
    """Keep only these channels of every part of a block.

    Args:
        block: the block, to which the names are relative.
        parts: (name, role) pairs, see :class:`fastgate.models.gated.Cut`.
        kept: indices of the channels to keep, in order.
    """
    for name, role in parts:
        cut_module(block.get_submodule(name), role, kept)


def cut_module(module: nn.Module, role: str, kept: Tensor) -> None:
    """Keep only these channels of a module: of its output ("out"), its input ("in") or both ("each")."""
    if role == "in":
        _take(module, "weight", kept, 1)
        _set_size(module, _IN_SIZES, len(kept))
        return
    if isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * len(kept) // module.num_channels
    if role == "each" and isinstance(module, nn.modules.conv._ConvNd):
        module.groups = module.groups * len(kept) // module.in_channels
        _set_size(module, _IN_SIZES, len(kept))
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        if tensor in module._parameters or tensor in module._buffers:
            _take(module, tensor, kept, 0)
    _set_size(module, _EACH_SIZES if is_norm(module) or isinstance(module, nn.GroupNorm) else _OUT_SIZES, len(kept))


def _take(module: nn.Module, name: str, kept: Tensor, dim: int) -> None:
    tensor = getattr(module, name)
    if tensor is None:
        return
    taken = take_channels(tensor.detach(), dim, kept.to(tensor.device))
    setattr(module, name, nn.Parameter(taken, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else taken)


def take_channels(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    """The kept slices, in the tensor's memory format, which index_select alone does not preserve."""
    taken = tensor.index_select(dim, kept)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        return taken.contiguous(memory_format=torch.channels_last)
    return taken


def _set_size(module: nn.Module, names: Iterable[str], size: int) -> None:
    for name in names:
        if name in vars(module):  # frozen norms have no such attribute
            setattr(module, name, size)


def share_of_channel(module: nn.Module, role: str, total: int, is_params: bool) -> int:
    """One channel's share of a module's MACs or parameters."""
    weight = getattr(module, "weight", None)
    if role == "in":
        bias = getattr(module, "bias", None)
        total -= bias.numel() if is_params and bias is not None else 0
        return total // weight.shape[1]  # type: ignore[union-attr]
    return total // len(weight) if weight is not None else 0


def check_parts(block: nn.Module, parts: Iterable[tuple[str, str]], shared: set[nn.Module]) -> None:
    """Raise ValueError unless every part can still be cut: it has not changed and shares no tensors."""
    for name, _ in parts:
        module = block.get_submodule(name)
        with without_gate(module):
            if module in shared:
                raise ValueError(
                    f"cannot cut the channels of {type(module).__name__} {name!r}: the module or one of its tensors is "
                    "also used elsewhere in the network; use gating='layer'"
                )
            if (is_group_norm(module) or runs_as(module, nn.Linear)) and {*module._parameters} == {"weight", "bias"}:
                continue  # its tensors are neither shared nor computed
            check_cut(name, module)


def empty_parts(block: nn.Module, parts: Iterable[tuple[str, str]]) -> None:
    """Zero the weights of the parts that read the cut channels, for a cut that would leave no channel."""
    for name, role in parts:
        if role == "in":
            module = block.get_submodule(name)
            weight = module.get_parameter("weight")
            module.weight = nn.Parameter(torch.zeros_like(weight), weight.requires_grad)
