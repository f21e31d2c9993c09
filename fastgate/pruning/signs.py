"""Finds blocks whose inputs are never negative, so that a ReLU on their input has no effect."""

import operator
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules import module as module_globals

from fastgate.models.block import Gated, ResidualBlock
from fastgate.models.hooks import copy_network, is_own

# operations whose output is never negative
_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.Softmax, nn.Softmax2d)
_RECTIFYING = {torch.relu, F.relu, F.relu6, torch.sigmoid, F.sigmoid, torch.abs, torch.square, torch.exp, F.softmax}
_RECTIFYING_METHODS = {"relu", "sigmoid", "abs", "square", "exp", "softmax", "relu_", "sigmoid_", "abs_"}
# operations that select, average, add or multiply values of their inputs
_KEEPERS = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.ZeroPad2d, nn.UpsamplingNearest2d),
)
_KEEPING = {
    *(operator.add, operator.iadd, operator.mul, operator.imul, operator.getitem, torch.add, torch.mul, torch.cat),
    *(torch.flatten, torch.mean, torch.sum, torch.max_pool2d, F.max_pool2d, F.avg_pool2d, F.dropout, F.dropout2d),
    *(F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.permute, torch.reshape),
}
_KEEPING_METHODS = {
    *("flatten", "view", "reshape", "permute", "transpose", "contiguous", "mean", "sum", "clone", "detach", "squeeze"),
    *("unsqueeze", "expand", "add", "add_", "mul", "mul_"),
}
_SUMS = (operator.add, operator.iadd, operator.mul, operator.imul, torch.add, torch.mul)
_SUM_METHODS = ("add", "add_", "mul", "mul_")
# modules whose output shares no memory with other values, so that changing it in place affects nothing else
_FRESH = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# arguments that make an operation change a tensor in place; operations not listed above may make it negative
_IN_PLACE = ("inplace", "out")


class _Tracer(fx.Tracer):
    """Traces through all modules except those of `torch.nn`, gated modules and residual blocks."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Gated) or super().is_leaf_module(m, module_qualified_name)


def given_nonnegative(model: nn.Module) -> set[str]:
    """Names of the blocks whose inputs are proven non-negative in all calls, in training and in eval mode.

    The proof traces the forward of this network from the origin of each value, such as a ReLU, through poolings, sums
    and the like. A block is excluded if anything on the way is not known to preserve the sign (an operation, a
    subclass, a hook, an in-place change), or if the forward cannot be traced.

    Gradients also equal those with the ReLU: they could differ only at zero, and there the operation that produced the
    zero passes no gradient on, or has already passed on the ReLU's zero.
    """
    if module_globals._global_forward_hooks or module_globals._global_forward_pre_hooks:
        return set()
    found: list[set[str]] = []
    with suppress(Exception):  # a user's forward may raise anything when traced
        # a copy, since a forward may store state; parameters, which no forward changes, are shared
        copied = copy_network(model, shared=model.parameters())
        for training in (True, False):
            for module in copied.modules():
                module.training = training
            found.append(_trace(copied))
    return set.intersection(*found) if len(found) == 2 else set()


def _trace(model: nn.Module) -> set[str]:
    nonnegative: set[fx.Node] = set()
    given: dict[str, bool] = {}
    for node in _Tracer().trace(model).nodes:
        kept = bool(node.all_input_nodes) and nonnegative.issuperset(node.all_input_nodes) and not _has_negative(node)
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, ResidualBlock):
            name = str(node.target)
            given[name] = given.get(name, True) and kept and not node.kwargs and not _is_hooked(module)
        known = _rectifies(node, module) or (kept and _keeps(node, module))
        if known:
            nonnegative.add(node)
        elif _changes_in_place(node, module) and not _is_fresh(node.args[0], model):
            return set()
    return {name for name, is_nonnegative in given.items() if is_nonnegative}


def _has_negative(node: fx.Node) -> bool:
    """Whether an added or multiplied number is negative (or any other numeric argument, without distinction)."""
    adds = node.target in _SUMS or node.target in _SUM_METHODS
    numbers = [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, int | float)]
    return adds and any(number < 0 for number in numbers)


def _is_hooked(module: nn.Module) -> bool:
    return any(
        is_own(hook)
        for part in module.modules()
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    )


def _is_fresh(value: Any, model: nn.Module) -> bool:
    if not isinstance(value, fx.Node) or value.op != "call_module":
        return False
    module = model.get_submodule(str(value.target))
    return type(module) in _FRESH and not _is_hooked(module)


def _rectifies(node: fx.Node, module: nn.Module | None) -> bool:
    if isinstance(module, ResidualBlock):
        activation = getattr(module, module.activation_name or "", None)
        return type(activation) is nn.ReLU and not _is_hooked(module)
    if module is not None:
        return type(module) in _RECTIFIERS and not _is_hooked(module)
    return (node.op == "call_function" and node.target in _RECTIFYING) or (
        node.op == "call_method" and node.target in _RECTIFYING_METHODS
    )


def _keeps(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return type(module) in _KEEPERS and not _is_hooked(module)
    if any(name in node.kwargs for name in ("out", "alpha")):
        return False
    return (node.op == "call_function" and node.target in _KEEPING) or (
        node.op == "call_method" and node.target in _KEEPING_METHODS
    )


def _changes_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return bool(getattr(module, "inplace", False)) or _is_hooked(module)
    if any(node.kwargs.get(name) for name in _IN_PLACE):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return node.op in ("call_function", "call_method") and (
        in_place or name in ("isub", "itruediv", "ifloordiv", "iadd", "imul", "ipow", "imod", "setitem")
    )
