"""The promise that a cut network computes what the frozen one computed, checked whenever something is cut."""

import torch
from torch import Tensor, nn

from fastgate.gates import named_gates
from fastgate.ops.dispatch import requested_impl
from fastgate.pruning.comparison import compare

# Largest allowed difference between the frozen and the cut network, relative to the largest output: 0 for layer gates,
# which leave the same operations on the same tensors; for channel gates a hundred fp32 roundings (a sum over fewer
# channels is added up in another order, once per convolution).
_TOLERANCE = {"layer": 0.0, "channel": 100 * torch.finfo(torch.float32).eps}


class NotEqual(RuntimeError):
    """The cut network does not compute what the frozen network computes: nothing is saved."""


def check_equal(frozen: nn.Module, cut: nn.Module, x: Tensor, gating: str) -> float:
    """The largest difference of the two networks' outputs on x `[N, C, H, W]`, both in eval mode.

    Raises:
        NotEqual: it is more than the rounding that this kind of gates allows.
    """
    difference = compare(frozen, cut, x)
    with torch.no_grad():
        scale = float(cut.eval()(x).abs().max())
    # our kernels, where they are asked for, add up in another order than the convolutions of the cut network
    ours = any(requested_impl(gate.impl)[0] == "triton" for _, gate in named_gates(frozen))
    allowed = _TOLERANCE["channel" if ours else gating] * max(scale, 1.0)
    if not difference <= allowed:
        raise NotEqual(
            f"the compact network differs from the frozen one by {difference:.3g}, expected at most {allowed:.3g}; "
            "this is a bug of fastgate, please report it with the run folder"
        )
    return difference


def hold_open(*models: nn.Module) -> None:
    """Freeze the live gates of these networks open, so that no rounding of a gate's input changes what it decides."""
    for model in models:
        for _, gate in named_gates(model):
            if not gate.frozen:
                gate.freeze(torch.ones(gate.gates, dtype=torch.bool))
