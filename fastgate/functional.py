"""The operations as functions, in the style of `torch.nn.functional`.

Each checks its arguments, selects an implementation (`impl`, or `FASTGATE_IMPL` if `impl="auto"`) and calls it.
"""

import os
from typing import Literal, overload

import torch
from torch import Tensor

from fastgate.ops import choices
from fastgate.ops.dispatch import requested_impl, resolve_impl
from fastgate.ops.gate_head import GateHead, HeadCall, check_window, gate_head_obstacle, gate_head_torch
from fastgate.ops.gated_conv import (
    GatedConv2d,
    Ways,
    choose_ways,
    gated_conv2d_gathered,
    gated_conv2d_obstacle,
    gated_conv2d_torch,
    worth_gathering,
)
from fastgate.ops.gated_residual import (
    ResidualCall,
    gated_residual_fused,
    gated_residual_obstacle,
    gated_residual_plain,
)
from fastgate.ops.means import known_means
from fastgate.ops.synchronization import batch_norm_processes, statistics_obstacle

__all__ = ["gate_head", "gated_conv2d", "gated_residual"]


def gate_head(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    fc2_weight: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    window: str = "clipped",
    pooled: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Decide which of `out` gates are open for each sample (Table 1 of the paper, with Eq. 4 and 5).

    With f = mean over H, W of x, or x flattened, whichever `fc1_weight` fits::

        logits    = relu(batch_norm(f @ fc1_weight.T + fc1_bias)) @ fc2_weight.T + fc2_bias
        decisions = 1 where logits > 0, else 0
        backward:   dlogits = grad_logits + window(logits, grad_decisions)

    Without `fc2_weight` the head has one layer: logits = f @ fc1_weight.T + fc1_bias.

    Args:
        x: features `[N, C, H, W]`, any floating dtype, NCHW or channels_last.
        fc1_weight: `[hidden, C]` (pooled) or `[hidden, C*H*W]` (flattened); with one layer, `hidden` is `out`. The head
            is computed in this dtype.
        fc1_bias: `[hidden]` or None.
        bn_weight: `[hidden]` or None, as in `torch.nn.functional.batch_norm`; so are the next three.
        bn_bias: `[hidden]` or None.
        running_mean: `[hidden]`, updated in place when training; None if running statistics are not tracked.
        running_var: `[hidden]`, updated in place when training (with the unbiased variance).
        fc2_weight: `[out, hidden]`, or None for a head of one layer.
        fc2_bias: `[out]` or None.
        training: use batch statistics and update the running statistics; otherwise use the running statistics.
        momentum: weight of the new statistics in the running update.
        eps: added to the variance.
        window: where the gradient of a decision passes: `"clipped"` (Eq. 5), `"restoring"` or `"identity"`.
        pooled: means of x over H and W, `[N, C]` in the dtype of `fc1_weight`, if already computed (see
            `return_pooled` of :func:`gated_residual`). x is then not read, and its gradient flows through them.
        impl: `"auto"`, `"triton"` (pooled heads of two layers) or `"torch"`.

    Returns:
        decisions and logits, both `[N, out]` in the dtype of `fc1_weight`.

    Raises:
        ValueError: mismatched shapes or devices, an unknown window or implementation, or a single sample in training
            (its batch variance is undefined).
        TypeError: `x` is not a floating-point tensor, or the parameters have different dtypes.
    """
    check_window(window)
    if x.dim() != 4:
        raise ValueError(f"x: expected [N, C, H, W], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}; convert the images first")
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    if pixels == 0 and pooled is None:
        raise ValueError(f"x: expected at least one pixel, got {list(x.shape)}, over which means are undefined")
    if fc1_weight.dim() != 2 or fc1_weight.shape[1] not in (channels, channels * pixels):
        raise ValueError(
            f"fc1_weight: expected [hidden, {channels}] (pooled) or [hidden, {channels * pixels}] (flattened) for x of "
            f"{list(x.shape)}, got {list(fc1_weight.shape)}"
        )
    for name, tensor in (
        ("fc1_bias", fc1_bias),
        ("bn_weight", bn_weight),
        ("bn_bias", bn_bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("fc2_weight", fc2_weight),
        ("fc2_bias", fc2_bias),
    ):
        if tensor is not None and tensor.dtype != fc1_weight.dtype:
            raise TypeError(f"{name}: expected the dtype of fc1_weight, {fc1_weight.dtype}, got {tensor.dtype}")
        if tensor is not None and tensor.device != fc1_weight.device:
            raise ValueError(f"{name}: expected the device of fc1_weight, {fc1_weight.device}, got {tensor.device}")
    if x.device != fc1_weight.device:
        raise ValueError(f"x: expected the device of fc1_weight, {fc1_weight.device}, got {x.device}")
    hidden = fc1_weight.shape[0]
    if fc2_weight is not None:
        if fc2_weight.dim() != 2 or fc2_weight.shape[1] != hidden:
            raise ValueError(f"fc2_weight: expected [out, {hidden}], got {list(fc2_weight.shape)}")
        if not training and (running_mean is None or running_var is None):
            raise ValueError("running_mean, running_var: expected tensors when training=False, got None")
        if training and x.shape[0] * batch_norm_processes() < 2:
            raise ValueError(
                f"x: expected at least 2 samples in training (batch statistics), got {x.shape[0]}; use drop_last=True "
                "in the DataLoader"
            )
    for name, vector, size in (
        ("fc1_bias", fc1_bias, hidden),
        ("bn_weight", bn_weight, hidden),
        ("bn_bias", bn_bias, hidden),
        ("running_mean", running_mean, hidden),
        ("running_var", running_var, hidden),
        ("fc2_bias", fc2_bias, None if fc2_weight is None else fc2_weight.shape[0]),
    ):
        if vector is not None and (size is None or vector.shape != (size,)):
            expected = "None without fc2_weight" if size is None else f"[{size}]"
            raise ValueError(f"{name}: expected {expected}, got {list(vector.shape)}")
    if pooled is not None and (pooled.shape != x.shape[:2] or fc1_weight.shape[1] != channels):
        raise ValueError(
            f"pooled: expected {list(x.shape[:2])} and a pooled head, got {list(pooled.shape)} and fc1_weight of "
            f"{list(fc1_weight.shape)}"
        )
    source = x if pooled is None else pooled
    parameters = (fc1_weight, fc1_bias, bn_weight, bn_bias, running_mean, running_var, fc2_weight, fc2_bias)
    options = (training, momentum, eps, window)

    def obstacle() -> str | None:
        reason = statistics_obstacle() if training else None
        return gate_head_obstacle(source, *parameters) or reason

    means = known_means(x) if pooled is None else None

    def choose() -> str:
        return choices.choose(HeadCall.of(source, means, fc1_weight, fc2_weight, training), source, fc1_weight)

    if resolve_impl(_unless_empty(impl, source), "gate_head", obstacle, choose) == "triton":
        source = source if pooled is None else pooled.contiguous()
        decisions, logits = GateHead.apply(source, means, *parameters, *options)
        return decisions, logits
    return gate_head_torch(source, *parameters, *options)


@overload
def gated_residual(
    shortcut: Tensor,
    branch: Tensor,
    gate: Tensor,
    *,
    relu: bool = ...,
    return_pooled: Literal[False] = ...,
    impl: str = ...,
) -> Tensor: ...


@overload
def gated_residual(
    shortcut: Tensor, branch: Tensor, gate: Tensor, *, relu: bool = ..., return_pooled: Literal[True], impl: str = ...
) -> tuple[Tensor, Tensor]: ...


def gated_residual(
    shortcut: Tensor,
    branch: Tensor,
    gate: Tensor,
    *,
    relu: bool = True,
    return_pooled: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Add a gated branch to its shortcut: y = relu(shortcut + gate * branch).

    Args:
        shortcut: `[N, C, H, W]`.
        branch: `[N, C, H, W]`, the same shape and device.
        gate: 0 or 1 per sample (`[N]` or `[N, 1, 1, 1]`) or per channel (`[N, C]` or `[N, C, 1, 1]`).
        relu: apply the ReLU; without it y = shortcut + gate * branch.
        return_pooled: also return the means of y over H and W, float32 or wider, for the next gate head.
        impl: `"auto"`, `"triton"` (a closed branch is not read, so its NaN and infinities do not spread) or `"torch"`.

    Returns:
        y `[N, C, H, W]`, or (y, means `[N, C]`).

    Raises:
        ValueError: mismatched shapes or devices, or an unknown implementation.
    """
    if shortcut.dim() != 4 or branch.shape != shortcut.shape:
        raise ValueError(
            f"shortcut, branch: expected the same [N, C, H, W], got {list(shortcut.shape)} and {list(branch.shape)}"
        )
    if not shortcut.device == branch.device == gate.device:
        raise ValueError(
            f"shortcut, branch, gate: expected one device, got {shortcut.device}, {branch.device}, {gate.device}"
        )
    n, c = shortcut.shape[:2]
    if gate.shape not in ((n,), (n, 1), (n, c), (n, 1, 1, 1), (n, c, 1, 1)):
        raise ValueError(
            f"gate: expected [{n}], [{n}, 1, 1, 1], [{n}, {c}] or [{n}, {c}, 1, 1], got {list(gate.shape)}"
        )
    flat = gate.reshape(n) if gate.dim() == 1 or gate.size(1) == 1 else gate.reshape(n, c)
    arguments = (shortcut, branch, flat, relu, return_pooled)
    fused = resolve_impl(
        _unless_empty(impl, shortcut),
        "gated_residual",
        lambda: gated_residual_obstacle(shortcut, branch, flat),
        lambda: choices.choose(ResidualCall.of(*arguments), shortcut, branch, flat),
    )
    y, pooled = (gated_residual_fused if fused == "triton" else gated_residual_plain)(*arguments)
    return y if pooled is None else (y, pooled)


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    *,
    in_gate: Tensor | None = None,
    out_gate: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    write_closed: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Convolution that can skip closed channels and samples: conv2d(x * in_gate, weight) * out_gate.

    Gates contain only 0 and 1; results for other values are undefined, and they are detected only if
    `FASTGATE_CHECKED=1` is set (which synchronizes with the device). Gradients are exact, including those of gates: an
    input gate's is <dz, x>, z the gated input, for closed channels too. If a gate does not require grad, its closed
    channels and samples are skipped in backward as well.

    Args:
        x: `[N, C_in, H, W]`, NCHW or channels_last.
        weight: `[C_out, C_in, kh, kw]`, the dtype and device of x.
        in_gate: per sample (`[N]` or `[N, 1]`), per sample and channel (`[N, C_in]`), or per channel for the whole
            batch (`[C_in]` or `[1, C_in]`); each may have two trailing dimensions of 1. None: no gate.
        out_gate: the same for the output, with `C_out`.
        stride: stride in both dimensions.
        padding: zero padding on every side.
        write_closed: write zeros where `out_gate` is closed. If False, the values there are unspecified: `"triton"`
            leaves the memory uninitialized (possibly NaN) to save writes, so select the open values instead of
            multiplying by the gate. Gradients are the same either way: they do not depend on closed outputs, and the
            gradient of a closed output contributes only to the gradient of its gate, if that requires grad.
        impl: `"triton"` (closed inputs count as zero, so their NaN and infinities do not spread, nor do those in
            gradients of closed outputs; those in the weight do), `"torch"` (dense), or
            `"auto"`: on CUDA the fastest in measurements (:mod:`fastgate.ops.choices`), chosen separately for each
            gradient; on a CPU, a convolution of the open channels or samples only, if that pays off and the gates are
            constant.

    Returns:
        `[N, C_out, H', W']` in the dtype of x; H' = (H + 2 padding - kh) // stride + 1.

    Raises:
        ValueError: mismatched shapes or devices, an ambiguous gate of N = C values, or an unknown implementation.
        TypeError: x or a gate is not a floating-point tensor.
    """
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"x, weight: expected [N, C_in, H, W] and [C_out, C_in, kh, kw], got {list(x.shape)} and "
            f"{list(weight.shape)}"
        )
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}; convert the images first")
    if weight.device != x.device:
        raise ValueError(f"weight: expected the device of x, {x.device}, got {weight.device}")
    if stride < 1 or padding < 0:
        raise ValueError(f"stride, padding: expected at least 1 and at least 0, got {stride} and {padding}")
    if min(x.shape[d] + 2 * padding - weight.shape[d] for d in (2, 3)) < 0:
        raise ValueError(
            f"x: expected a height and width of at least the kernel size {list(weight.shape[2:])} with padding "
            f"{padding}, got {list(x.shape[2:])}"
        )
    ins = _gate_rows("in_gate", in_gate, x, x.shape[1])
    outs = _gate_rows("out_gate", out_gate, x, weight.shape[0])
    autocast = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
    if autocast and x.dtype != torch.float64:  # as F.conv2d does
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.dtype != weight.dtype:
        raise TypeError(f"weight: expected the dtype of x, {x.dtype}, got {weight.dtype}; convert one of them")
    arguments = (x, weight, ins, outs, stride, padding)

    def obstacle() -> str | None:
        return gated_conv2d_obstacle(x, weight, ins, outs)

    ways = resolve_impl(_unless_empty(impl, x, weight), "gated_conv2d", obstacle, lambda: choose_ways(*arguments))
    if ways == "triton":
        ways = Ways("triton", "triton", "triton")
    if isinstance(ways, Ways) and "triton" in ways:
        y: Tensor = GatedConv2d.apply(*arguments, write_closed, ways)
        return y
    gathers = requested_impl(impl)[0] == "auto" and worth_gathering(x, weight, ins, outs, stride)
    return (gated_conv2d_gathered if gathers else gated_conv2d_torch)(*arguments)


def _unless_empty(impl: str, *tensors: Tensor) -> str:
    """The requested implementation, or "torch" if a tensor is empty: no kernel can be launched on nothing."""
    requested_impl(impl)
    return impl if all(tensor.numel() for tensor in tensors) else "torch"


def _gate_rows(name: str, gate: Tensor | None, x: Tensor, channels: int) -> Tensor | None:
    """The gate as [N, 1], or as [N, C] or [1, C] with more than one channel."""
    if gate is None:
        return None
    n = x.shape[0]
    shape = list(gate.shape)
    if len(shape) > 2 and shape[-2:] == [1, 1]:
        shape = shape[:-2]
    if len(shape) == 1 and 1 < n == channels == shape[0]:
        raise ValueError(
            f"{name}: [{n}] could be per sample or per channel, as there are {n} of both; pass [{n}, 1] or [1, {n}]"
        )
    if shape == [n]:
        shape = [n, 1]
    elif shape == [channels]:
        shape = [1, channels]
    if len(shape) != 2 or shape[0] not in (1, n) or shape[1] not in (1, channels):
        raise ValueError(
            f"{name}: expected [{n}], [{n}, {channels}] or [{channels}], or one with two trailing dimensions of 1, "
            f"got {list(gate.shape)}"
        )
    if not gate.is_floating_point():
        raise TypeError(
            f"{name}: expected a floating-point tensor of 0 and 1, got {gate.dtype}; convert it with .to(x.dtype)"
        )
    if gate.device != x.device:
        raise ValueError(f"{name}: expected the device of x, {x.device}, got {gate.device}")
    if os.environ.get("FASTGATE_CHECKED") == "1" and not bool(((gate == 0) | (gate == 1)).all()):
        raise ValueError(f"{name}: expected 0 and 1, got other values; threshold the gate first")
    gate = gate.reshape(shape)
    return gate.expand(n, 1) if shape == [1, 1] else gate
