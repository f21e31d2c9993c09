"""Checks which modules a channel gate can cut exactly, with the reason for those it cannot."""

from collections import Counter

from torch import Tensor, nn
from torch.nn.utils import parametrize

# modules that act on each channel (and pixel) separately and have no weights to cut
ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus),
    *(nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Hardtanh, nn.Identity, nn.Dropout, nn.Dropout2d),
)
# timm's module of activations, all of them elementwise
_ACTIVATIONS = "timm.layers.activations"

# batch norms of other packages, by qualified class name; some include an elementwise dropout and activation
_NORMS = (
    *("timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct"),
    *("timm.layers.norm_act.FrozenBatchNorm2d", "timm.layers.norm_act.FrozenBatchNormAct2d"),
    "torchvision.ops.misc.FrozenBatchNorm2d",
)
# group norms of other packages, likewise
_GROUP_NORMS = ("timm.layers.norm_act.GroupNormAct", "timm.layers.norm.GroupNorm")
_NORM_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def runs_as(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether the module is of one of these classes and uses that class's own forward."""
    return (
        "forward" not in vars(module)
        and type(module).__call__ is nn.Module.__call__
        and any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)
    )


def is_elementwise(module: nn.Module) -> bool:
    """Whether a module is elementwise, so that it need not change when channels are cut; it must have no children."""
    of_timm = type(module).__module__ == _ACTIVATIONS and not module._parameters and "forward" not in vars(module)
    return (runs_as(module, *ELEMENTWISE) or of_timm) and not module._modules


def is_conv(module: nn.Module) -> bool:
    """Whether a module computes like `nn.Conv2d`, whether its weight is a parameter or computed from others."""
    return (
        runs_as(module, nn.Conv2d)
        and type(module)._conv_forward is nn.Conv2d._conv_forward  # type: ignore[attr-defined]
        and "_conv_forward" not in vars(module)
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm (also synchronized or frozen), which acts on each channel separately."""
    cls = type(module)
    if f"{cls.__module__}.{cls.__qualname__}" in _NORMS:
        return "forward" not in vars(module) and all(is_elementwise(child) for child in module.children())
    return runs_as(module, nn.BatchNorm2d, nn.SyncBatchNorm)


def is_group_norm(module: nn.Module) -> bool:
    """Whether a module is a group norm (also with dropout and activation), exact if whole groups are cut."""
    cls = type(module)
    if f"{cls.__module__}.{cls.__qualname__}" in _GROUP_NORMS:
        return "forward" not in vars(module) and all(is_elementwise(child) for child in module.children())
    return runs_as(module, nn.GroupNorm)


def check_cut(name: str, module: nn.Module) -> None:
    """Raise ValueError unless this convolution, norm or elementwise module can be cut exactly."""
    if is_elementwise(module):
        return
    known = is_conv(module) or is_norm(module)
    tensors = {*module._parameters, *module._buffers}
    whole = not module._modules or is_norm(module)  # a norm's children are known
    if known and whole and {"weight", "bias"} <= tensors <= (_NORM_TENSORS if is_norm(module) else {"weight", "bias"}):
        return
    what = f"{type(module).__name__} {name!r}"
    if any(type(part).__module__.startswith("torch.ao.") for part in module.modules()):
        raise ValueError(
            f"cannot cut the channels of {what}, fused or prepared by torch.ao.quantization; quantize the compact "
            "network instead, or use gating='layer'"
        )
    if not known and isinstance(module, nn.Conv2d):
        raise ValueError(
            f"cannot cut the channels of {what}, which does not compute like nn.Conv2d; replace it by an nn.Conv2d, or "
            "use gating='layer'"
        )
    if not known:
        raise ValueError(
            f"cannot cut the channels of {what} between a convolution and its gate; use another position, or "
            "gating='layer'"
        )
    raise ValueError(
        f"cannot cut the channels of {what}: expected only a weight and a bias, not computed from other tensors; "
        f"{_remedy(module)}or use gating='layer'"
    )


def _remedy(module: nn.Module) -> str:
    """How to turn a weight computed by torch.nn.utils back into a parameter."""
    names = {name for name in module._parameters if module._parameters[name] is not None}
    if parametrize.is_parametrized(module):
        return "call torch.nn.utils.parametrize.remove_parametrizations on it first, "
    if any(name.endswith("_mask") for name in module._buffers):
        return "call torch.nn.utils.prune.remove on it first, "
    if any(name.endswith("_g") for name in names):
        return "call torch.nn.utils.remove_weight_norm on it first, "
    if any(name.endswith("_orig") for name in names):
        return "call torch.nn.utils.remove_spectral_norm on it first, "
    return ""


def check_size(name: str, module: nn.Module) -> None:
    """Raise ValueError unless this module's effect on the size of feature maps is known, so that it can be removed."""
    if is_conv(module) and not isinstance(module.padding, str):
        return
    if not is_norm(module) and not is_elementwise(module):
        raise ValueError(
            f"cannot remove all channels of {type(module).__name__} {name!r}, whose output size is not known; use "
            "another position, numeric padding, or gating='layer'"
        )


def shared_modules(model: nn.Module) -> set[nn.Module]:
    """The modules that are used in several places of the network, or share a tensor with another module.

    Cutting them for one place would also cut the others, or break the sharing.
    """
    places: Counter[nn.Module | Tensor] = Counter()
    for parent in model.modules():
        held = (*parent._modules.values(), *parent._parameters.values(), *parent._buffers.values())
        places.update(value for value in held if value is not None)
    return {
        module
        for module in model.modules()
        if places[module] > 1
        or any(places[t] > 1 for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)
    }
