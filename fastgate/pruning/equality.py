"""The check that a pruned network has the same outputs as the frozen one, made whenever something is cut."""

from typing import Any

import torch
from torch import nn

from fastgate.gates import LayerGate, named_gates
from fastgate.modes import eval_mode
from fastgate.ops.dispatch import requested_impl
from fastgate.pruning.comparison import compare
from fastgate.values import Forward, call, device_of, tensors_in, to_device_of

# Channel gates: a hundred roundings relative to the largest output (a sum over fewer channels is computed in another
# order, once per convolution). Layer gates leave the same operations on the same tensors: 0.
_ROUNDINGS = 100


class NotEqual(RuntimeError):
    """The outputs of the pruned network differ from those of the frozen network."""


def check_equal(frozen: nn.Module, cut: nn.Module, inputs: Any, forward: Forward | None = None) -> float:
    """Check that two networks have equal outputs in eval mode, and return the difference (:func:`fastgate.compare`).

    Raises:
        NotEqual: the difference exceeds both the rounding error that the gates of `frozen` allow and the network's own
            nondeterminism (random numbers, atomic additions).
    """
    device = device_of(frozen)
    with torch.autocast("cpu" if device is None else device.type, enabled=False):
        difference = compare(frozen, cut, inputs, forward=forward)
        allowed = _allowed(frozen, inputs, forward)
        if not difference <= allowed and not difference <= 2 * compare(frozen, frozen, inputs, forward=forward):
            raise NotEqual(
                f"the compact network differs from the frozen one by {difference:.3g}, expected at most "
                f"{allowed:.3g}; this is a bug in fastgate; please report it with the network and its decisions"
            )
    return difference


def _allowed(frozen: nn.Module, inputs: Any, forward: Forward | None) -> float:
    gates = [gate for _, gate in named_gates(frozen)]
    # our kernels, if requested, sum in another order than the convolutions of the pruned network
    exact = all(isinstance(gate, LayerGate) and requested_impl(gate.impl)[0] != "triton" for gate in gates)
    if exact:
        return 0.0
    with torch.no_grad(), eval_mode(frozen):
        outputs = tensors_in(call(frozen, to_device_of(frozen, inputs, copied=True), forward))
    sizes = [(float(x.abs().max()), torch.finfo(x.dtype).eps) for x in outputs if x.is_floating_point() and x.numel()]
    return max((_ROUNDINGS * eps * max(largest, 1.0) for largest, eps in sizes), default=0.0)


def hold_open(*models: nn.Module) -> None:
    """Freeze the live gates of these networks open, so that rounding in a gate's input cannot change its decision."""
    for model in models:
        for _, gate in named_gates(model):
            if not gate.frozen:
                gate.freeze(torch.ones(gate.gates, dtype=torch.bool))
