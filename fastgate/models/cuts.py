"""Which modules a channel gate can cut exactly, and why another one cannot be cut."""

from collections import Counter

from torch import nn
from torch.nn.utils import parametrize

# modules that act on each channel (and pixel) by itself and have no weights to cut
ELEMENTWISE = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Identity, nn.Dropout, nn.Dropout2d)

# batch norms with an elementwise dropout and activation of their own behind them, by qualified class name
_NORMS_WITH_ACTIVATION = ("timm.layers.norm_act.BatchNormAct2d",)


def runs_as(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether the module is of one of these classes and computes as that class says: its forward is theirs."""
    return "forward" not in vars(module) and any(
        isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds
    )


def is_elementwise(module: nn.Module) -> bool:
    """A module that can stay as it is when channels go."""
    return runs_as(module, *ELEMENTWISE)


def is_conv(module: nn.Module) -> bool:
    """A module that computes as `nn.Conv2d` does, its weight being a parameter or computed from others."""
    return (
        runs_as(module, nn.Conv2d)
        and type(module)._conv_forward is nn.Conv2d._conv_forward  # type: ignore[attr-defined]
        and "_conv_forward" not in vars(module)
    )


def is_norm(module: nn.Module) -> bool:
    """A batch norm, synchronised or not, whose output's channel depends on that input channel alone."""
    cls = type(module)
    if f"{cls.__module__}.{cls.__qualname__}" in _NORMS_WITH_ACTIVATION:
        return "forward" not in vars(module) and all(is_elementwise(child) for child in module.children())
    return runs_as(module, nn.BatchNorm2d, nn.SyncBatchNorm)


def check_cut(name: str, module: nn.Module) -> None:
    """Raise ValueError unless this convolution, norm or elementwise module can be cut exactly."""
    if is_elementwise(module):
        return
    known = is_conv(module) or is_norm(module)
    if known and set(module._parameters) == {"weight", "bias"}:
        tensors = {"running_mean", "running_var", "num_batches_tracked"} if is_norm(module) else set()
        if tensors.issuperset(module._buffers):
            return
    what = f"{type(module).__name__} {name!r}"
    if not known and isinstance(module, nn.Conv2d):
        raise ValueError(
            f"cannot cut the channels of {what}, which computes otherwise than nn.Conv2d; put an nn.Conv2d in its "
            "place or use gating='layer'"
        )
    if not known:
        raise ValueError(
            f"cannot cut the channels of {what} between a convolution and its gate; use another position or "
            "gating='layer'"
        )
    raise ValueError(
        f"cannot cut the channels of {what}, whose tensors are computed from others or more than weight and bias; "
        f"{_remedy(module)}or use gating='layer'"
    )


def _remedy(module: nn.Module) -> str:
    """How torch.nn.utils makes a computed weight a parameter again."""
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
    """Raise ValueError unless it is known how this module changes the size of a map, so that it can be left out."""
    if is_conv(module) and not isinstance(module.padding, str):
        return
    if not is_norm(module) and not is_elementwise(module):
        raise ValueError(
            f"cannot do without the channels that {type(module).__name__} {name!r} hands on; use another position, "
            "numeric padding, or gating='layer'"
        )


def shared_modules(model: nn.Module) -> set[nn.Module]:
    """The modules that stand at several places of the network: to cut them for one place would cut the others."""
    places = Counter(child for parent in model.modules() for child in parent._modules.values() if child is not None)
    return {module for module, count in places.items() if count > 1}
