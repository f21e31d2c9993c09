"""The gate head: pooled or flattened features -> dense -> BN -> ReLU -> dense -> straight-through threshold."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOWS = ("clipped", "restoring", "identity")


def check_window(window: str) -> str:
    """Return `window`, or raise a `ValueError` that lists the known ones."""
    if window not in WINDOWS:
        raise ValueError(f"window: expected one of {', '.join(WINDOWS)}, got {window!r}")
    return window


def window_gradient(logits: Tensor, grad: Tensor, window: str) -> Tensor:
    """The straight-through gradient of a thresholded logit, same shape as `logits`.

    * `"clipped"` (Eq. 5): `grad` where |logit| <= 1, else 0.
    * `"restoring"`: also where a gradient-descent step would move a saturated logit back towards the window, that is
      logit > 1 and grad > 0, or logit < -1 and grad < 0.
    * `"identity"`: `grad` everywhere.
    """
    if window == "identity":
        return grad
    passes = logits.abs() <= 1
    if window == "restoring":
        passes = passes | ((logits.abs() > 1) & (logits * grad > 0))
    return torch.where(passes, grad, 0)


class StraightThrough(torch.autograd.Function):
    """Eq. 4 forward (1 where logit > 0, else 0), :func:`window_gradient` backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, window: str) -> Tensor:
        """Threshold `logits`; 0 itself is closed."""
        ctx.save_for_backward(logits)
        ctx.window = window
        return (logits > 0).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Pass the gradient through the window."""
        (logits,) = ctx.saved_tensors
        return window_gradient(logits, grads[0], ctx.window), None


def gate_head_torch(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    fc2_weight: Tensor | None,
    fc2_bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    window: str,
) -> tuple[Tensor, Tensor]:
    """The plain-PyTorch meaning of :func:`fastgate.functional.gate_head`; in fp64 the oracle of every kernel."""
    # the head is tiny and its threshold sensitive: it computes in its parameters' dtype, also under autocast
    with torch.autocast(device_type=x.device.type, enabled=False):
        if fc1_weight.shape[1] == x.shape[1]:
            features = x.mean((2, 3), dtype=fc1_weight.dtype)
        else:
            features = x.flatten(1).to(fc1_weight.dtype)
        logits = F.linear(features, fc1_weight, fc1_bias)
        if fc2_weight is not None:
            hidden = F.batch_norm(logits, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
            logits = F.linear(F.relu(hidden), fc2_weight, fc2_bias)
        decisions: Tensor = StraightThrough.apply(logits, window)
    return decisions, logits
