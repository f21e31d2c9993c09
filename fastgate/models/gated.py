"""Gates on modules that keep their own forward: on a module's result, or on the channels of its input.

The module stays the same object, with its tensors, children and hooks; its class is replaced by a subclass, and it gets
a child `gate`. Removing the gate restores its class.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.gates import Gate
from fastgate.ops.dispatch import transforms_active


@dataclass(frozen=True)
class Closed:
    """What a module computes when its layer gate is closed.

    Attributes:
        skip: names of its children to run in sequence instead; empty: it returns its input; None: it returns zeros.
        within: its name in the block whose residual sum it feeds; "" if it is the block itself.
        gone: names in that block of the modules that are unused when the gate is closed, including its own.
        zeroed: whether these are replaced by zeros instead of their input, because other operations of the branch
            remain and may work in place on their input.
        others: number of results besides the first; None for a module that returns a tensor.
        channels: channel dimension of its input, 1 or -1.
        child: name of the child that is its gate.
        alone: whether it is called with its features only.
    """

    skip: tuple[str, ...] | None
    within: str = ""
    gone: tuple[str, ...] = ("",)
    zeroed: bool = False
    others: int | None = None
    channels: int = 1
    child: str = "gate"
    alone: bool = True


@dataclass(frozen=True)
class Cut:
    """The parts that are cut by the channel gate on a module's input.

    Attributes:
        parts: (name in the block, role) of every module that loses channels: "out": channels that it computes, "in":
            channels that it sums over, "each": channels that it processes one by one or in groups.
        within: the gated module's name in the block.
        group: number of channels per decision.
        channels: channel dimension of the input, 1 or -1.
        child: name of the child that is its gate.
    """

    parts: tuple[tuple[str, str], ...]
    within: str = ""
    group: int = 1
    channels: int = 1
    child: str = "gate"


class GatedModule(nn.Module):
    """Mixin that :func:`put_gate` adds to a module's class."""

    ungated: type[nn.Module]
    gated: Closed | Cut

    @property
    def own_gate(self) -> Gate | None:
        """The gate; None while removed temporarily (:mod:`fastgate.pruning.probe`)."""
        return self._modules[self.gated.child]  # type: ignore[return-value]

    def set_gate(self, gate: Gate | None) -> None:
        """Set the gate, or remove it temporarily with None."""
        self._modules[self.gated.child] = gate

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, gated by decisions made from its first argument."""
        gate = self.own_gate
        if gate is None:
            return super().forward(*args, **kwargs)
        name = "" if args else features_name(self.ungated)  # inspection takes 10 us: only for keyword-only calls
        x = args[0] if args else kwargs[name]
        features = as_features(x, self.gated.channels)
        if isinstance(self.gated, Cut):
            decisions = gate(features)
            if not gate.known_all_open:
                gated = x * _channel_mask(decisions, x, self.gated)
                args, kwargs = ((gated, *args[1:]), kwargs) if args else ((), {**kwargs, name: gated})
            return super().forward(*args, **kwargs)
        decisions = gate(features)
        if gate.known_all_open:
            return super().forward(*args, **kwargs)
        closed = None if self.gated.skip is None else self._run_skip(x)
        if closed is not None and _all_closed(decisions) and not any(map(has_gates, self._others())):
            return closed
        result = super().forward(*args, **kwargs)
        y, *rest = result if isinstance(result, tuple) else (result,)
        y = _pick(y, closed, decisions)
        return (y, *rest) if isinstance(result, tuple) else y

    def _others(self) -> Iterator[nn.Module]:
        """The children other than the gate."""
        return (part for name, part in self._modules.items() if part is not None and name != self.gated.child)

    def _run_skip(self, x: Tensor) -> Tensor:
        skip = self.gated.skip or ()  # type: ignore[union-attr]
        for i, name in enumerate(skip):
            module = getattr(self, name)
            # the module's own forward also needs the input, so an in-place module gets a copy
            x = module(x.clone() if i == 0 and getattr(module, "inplace", False) else x)
        return x

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles recreate the class."""
        return _restore, (self.ungated,), self.__getstate__()


class _GatedSequential(GatedModule):
    """A gated `nn.Sequential`, whose gate is not one of the modules in sequence."""

    def __iter__(self) -> Iterator[nn.Module | None]:
        return (module for name, module in self._modules.items() if name != self.gated.child)

    def __len__(self) -> int:
        return len(self._modules) - 1


_classes: dict[type[nn.Module], type[GatedModule]] = {}


def has_gates(module: nn.Module) -> bool:
    """Whether the module contains gated modules that keep their own forward."""
    return any(isinstance(part, GatedModule) for part in module.modules())


def gated_class(cls: type[nn.Module]) -> type[GatedModule]:
    """The gated subclass of a module class."""
    if cls not in _classes:
        names = {"__module__": cls.__module__, "__doc__": cls.__doc__, "ungated": cls}
        base = _GatedSequential if issubclass(cls, nn.Sequential) else GatedModule
        _classes[cls] = type(f"Gated{cls.__name__}", (base, cls), names)
    return _classes[cls]


def _restore(cls: type[nn.Module]) -> GatedModule:
    made = gated_class(cls)
    return made.__new__(made)


def put_gate(module: nn.Module, gate: Gate, gated: Closed | Cut) -> None:
    """Gate a module, in place."""
    child = "gate"
    while hasattr(module, child):  # the name may be in use
        child += "_"
    module.__class__ = gated_class(type(module))
    module.add_module(child, gate)
    module.gated = replace(gated, child=child)  # type: ignore[assignment]


def take_gate(module: GatedModule) -> None:
    """Remove the gate and restore the module's class, in place."""
    del module._modules[module.gated.child]
    del module.__dict__["gated"]
    module.__class__ = module.ungated  # type: ignore[assignment]


@contextmanager
def without_gate(module: nn.Module) -> Iterator[None]:
    """Context in which the module has no gate and its own class, for inspection."""
    if not isinstance(module, GatedModule):
        yield
        return
    cls, child = type(module), module.gated.child
    gate = module._modules.pop(child)
    try:
        module.__class__ = module.ungated  # type: ignore[assignment]
        yield
    finally:
        module.__class__ = cls
        module._modules[child] = gate


def owner_of(model: nn.Module, gate_name: str, module: GatedModule) -> nn.Module:
    """The block to which the names in a gated module's description are relative, from the name of its gate."""
    path, within = gate_name.rpartition(".")[0], module.gated.within
    return model.get_submodule(path[: len(path) - len(within)].rstrip(".") if within else path)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, without its gate."""
    return module.ungated if isinstance(module, GatedModule) else type(module)


def features_name(cls: type[nn.Module]) -> str:
    """Name of the first argument, the features, in the forward of a module class."""
    return list(inspect.signature(cls.forward).parameters)[1]


def zero_first(result: Any) -> Any:
    """A module's result with its first tensor replaced by zeros."""
    if isinstance(result, tuple):
        return (torch.zeros_like(result[0]), *result[1:])
    return torch.zeros_like(result)


class Zeros(nn.Module):
    """Replaces a module in a residual branch whose gate is closed: returns zeros of its input's shape.

    Args:
        features: name of the input argument; it may be called with other arguments too, in any order.
        others: number of further results, which become None; None for a module that returns a tensor.
    """

    def __init__(self, features: str, others: int | None = None) -> None:
        super().__init__()
        self.features = features
        self.others = others

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros of the features' shape."""
        zeros = torch.zeros_like(args[0] if args else kwargs[self.features])
        return zeros if self.others is None else (zeros, *[None] * self.others)


class Skip(nn.Sequential):
    """Replaces a closed block that is called with more arguments than its features: computes its shortcut.

    Args:
        shortcut: the modules of the shortcut.
        features: name of the input argument; it may be called with other arguments too, in any order.
    """

    def __init__(self, *shortcut: nn.Module, features: str) -> None:
        super().__init__(*shortcut)
        self.features = features

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the modules in sequence to the features."""
        return super().forward(args[0] if args else kwargs[self.features])


def as_features(x: Tensor, channels: int) -> Tensor:
    """Reshape features to `[N, C, H, W]`, for a gate.

    Args:
        x: `[N, C]`, optionally with further dimensions.
        channels: channel dimension: 1 for `[N, C, ...]`, -1 for `[N, ..., C]`.
    """
    if channels == -1 and x.dim() > 2:
        return x.flatten(1, -2).transpose(1, 2).unsqueeze(-1)
    if x.dim() == 4:
        return x
    return x.flatten(2).unsqueeze(-1) if x.dim() > 2 else x[:, :, None, None]


def _channel_mask(decisions: Tensor, x: Tensor, cut: Cut) -> Tensor:
    mask = decisions.flatten(1)
    if cut.group > 1:
        mask = mask.repeat_interleave(cut.group, 1)
    ones = [1] * (x.dim() - 2)
    return mask.reshape(-1, *ones, mask.shape[1]) if cut.channels == -1 else mask.reshape(*mask.shape, *ones)


def _all_closed(decisions: Tensor) -> bool:
    """Whether everything is closed; False where this cannot be read without synchronizing, or gradients are needed."""
    return not (
        decisions.requires_grad
        or decisions.device.type != "cpu"
        or torch.jit.is_tracing()
        or torch.compiler.is_compiling()
        or transforms_active()
    ) and not bool((decisions != 0).any())


def _pick(y: Tensor, closed: Tensor | None, decisions: Tensor) -> Tensor:
    """y where the decisions `[N, 1, 1, 1]` are 1, `closed` (None: zero) where they are 0, NaN where they are NaN."""
    gate = decisions.reshape(-1, *[1] * (y.dim() - 1))
    if closed is None:
        closed = y.new_zeros(())
    if transforms_active():
        return closed + gate * (y - closed)
    return _Pick.apply(y, closed.to(y.dtype), gate)


class _Pick(torch.autograd.Function):
    """Select y or closed, bit-exact, with the gradient of `closed + gate * (y - closed)`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, closed: Tensor, gate: Tensor) -> Tensor:
        """Gate `[N, 1, ...]`; closed of y's shape or a single zero."""
        ctx.save_for_backward(y if ctx.needs_input_grad[2] else None, closed, gate)
        return torch.where(gate == 0, closed, torch.where(gate == 1, y, gate.to(y.dtype)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, closed and gate."""
        y, closed, gate = ctx.saved_tensors
        dy = grads[0]
        dclosed = dy * (1 - gate) if ctx.needs_input_grad[1] else None
        dgate = None if y is None else (dy * (y - closed)).flatten(1).sum(1).reshape(gate.shape).to(gate.dtype)
        return dy * gate, dclosed, dgate
