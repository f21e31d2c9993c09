"""Launchers of the two-layer gate head on pooled features.

Forward (`_gate_head_fwd.py`), one launch: programs reduce x to its means and to partial sums of the first dense layer;
the last program to finish adds them up in a fixed order and computes batch norm, ReLU, fc2 and the threshold. Backward
(`_gate_head_bwd.py`), one launch for one gate and two for several: every program handles a block of channels or of
gates and all samples, independently of the others. The gradient of x is the same for every pixel: it is returned as
[N, C] and expanded by the caller, without a copy.
"""

from typing import NamedTuple

import torch
import triton
from fastgate.kernels._gate_head_bwd import gate_head_bwd_hidden_kernel, gate_head_bwd_kernel
from fastgate.kernels._gate_head_fwd import gate_head_fwd_kernel
from fastgate.kernels._launch import counter, is_channels_last, next_power_of_2, plane_tile
from torch import Tensor

MAX_HIDDEN = 128  # a sample's hidden row is one tile
_DOT = 16  # tl.dot needs at least this many rows and columns (fp32, Triton 3.6)
_TILE = 4096  # samples times hidden units of a tile
# samples times hidden units times channels (or gates) of a tile; twice as many: 5.1 us instead of 3.3 on the T4 model
_PRODUCTS = 8192
_WARPS = 8


class Head(NamedTuple):
    """Parameters: w1 [HIDDEN, C] and w2 [OUT, HIDDEN] of the dense layers, their biases, batch norm's; or None."""

    w1_ptr: Tensor
    b1_ptr: Tensor | None
    gamma_ptr: Tensor | None
    beta_ptr: Tensor | None
    w2_ptr: Tensor
    b2_ptr: Tensor | None


class Running(NamedTuple):
    """Running statistics [HIDDEN], or None."""

    mean_ptr: Tensor | None
    var_ptr: Tensor | None


class Results(NamedTuple):
    """Outputs of the forward, fp32."""

    decisions_ptr: Tensor  # [N, OUT]
    logits_ptr: Tensor  # [N, OUT]
    features_ptr: Tensor | None  # [N, C], None if x is already pooled
    hidden_ptr: Tensor  # [N, HIDDEN], before batch norm
    mean_ptr: Tensor  # [HIDDEN], subtracted by batch norm
    rstd_ptr: Tensor  # [HIDDEN], 1 / standard deviation


class Saved(NamedTuple):
    """Results of the forward that the backward needs."""

    logits_ptr: Tensor
    features_ptr: Tensor
    hidden_ptr: Tensor
    mean_ptr: Tensor
    rstd_ptr: Tensor


class Upstream(NamedTuple):
    """Incoming gradients [N, OUT], or None."""

    decisions_ptr: Tensor | None
    logits_ptr: Tensor | None


class Gradients(NamedTuple):
    """Outputs of the backward: gradients of the features, scaled, and of the parameters, fp32."""

    df_ptr: Tensor
    dw1_ptr: Tensor
    db1_ptr: Tensor
    dgamma_ptr: Tensor
    dbeta_ptr: Tensor
    dw2_ptr: Tensor
    db2_ptr: Tensor


def _tile_of_samples(samples: int, hidden: int) -> tuple[int, int]:
    """(samples, hidden units) of a tile: all of them if they fit."""
    block_h = next_power_of_2(hidden, _DOT, MAX_HIDDEN)
    return next_power_of_2(samples, _DOT, _TILE // block_h), block_h


def gate_head_fwd(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute decisions, logits [N, out], and for backward features [N, C], hidden [N, h], mean and rstd [h]; all fp32.

    x is dense [N, C, H, W], or already pooled [N, C]: `features` is then empty, as x itself is used.
    """
    n, channels = x.shape[:2]
    hidden, out = fc1_weight.shape[0], fc2_weight.shape[0]
    pooled = x.dim() == 2
    pixels = 1 if pooled else x.shape[2] * x.shape[3]
    channels_last = pooled or is_channels_last(x)

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    results = Results(
        empty(n, out), empty(n, out), None if pooled else empty(n, channels), empty(n, hidden), empty(hidden),
        empty(hidden),
    )  # fmt: skip
    block_c, block_p = plane_tile(channels, pixels)
    block_n, block_h = _tile_of_samples(n, hidden)
    splits = triton.cdiv(channels, block_c)
    gate_head_fwd_kernel[(n, splits)](
        results,
        empty(n, splits, hidden),
        counter(x.device),
        x,
        Head(fc1_weight, fc1_bias, bn_weight, bn_bias, fc2_weight, fc2_bias),
        Running(running_mean, running_var),
        n,
        momentum,
        eps,
        C=channels,
        HW=pixels,
        CHANNELS_LAST=channels_last,
        SPLITS=splits,
        HIDDEN=hidden,
        OUT=out,
        TRAINING=training,
        ONE_TILE=n <= block_n,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        BLOCK_H=block_h,
        # 64 gates spill with a wide head (8 bytes, sm_75) or a loop over tiles (24 bytes)
        BLOCK_O=next_power_of_2(out, _DOT, 64 if n <= block_n and block_h == _DOT else _DOT),
        num_warps=_WARPS,
        num_stages=3 if block_h <= 64 else 1,  # pipelined, a wide head spills on sm_90 with some versions (8 bytes)
    )
    decisions, logits, features, *rest = results
    return decisions, logits, empty(0) if features is None else features, *rest


def gate_head_bwd(
    grad_decisions: Tensor | None,
    grad_logits: Tensor | None,
    logits: Tensor,
    features: Tensor,
    hidden: Tensor,
    mean: Tensor,
    rstd: Tensor,
    fc1_weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    fc2_weight: Tensor,
    pixels: int,
    training: bool,
    window: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute gradients of every pixel of x, fp32 [N, C], and of fc1, batch norm and fc2 (weight and bias of each).

    `features` is [N, C], the means over `pixels` pixels, of any dtype.
    """
    (n, channels), (out, units) = features.shape, fc2_weight.shape
    gradients = Gradients(
        torch.empty_like(features, dtype=torch.float32), torch.empty_like(fc1_weight), logits.new_empty(units),
        logits.new_empty(units), logits.new_empty(units), torch.empty_like(fc2_weight), logits.new_empty(out),
    )  # fmt: skip
    upstream = Upstream(grad_decisions, grad_logits)
    saved = Saved(logits, features, hidden, mean, rstd)
    head = Head(fc1_weight, None, bn_weight, bn_bias, fc2_weight, None)
    block_n, block_h = _tile_of_samples(n, units)
    dz = None
    if out > 1:
        dz = torch.empty_like(hidden)
        gate_head_bwd_hidden_kernel[(n,)](
            dz,
            upstream,
            saved,
            head,
            HIDDEN=units,
            OUT=out,
            WINDOW=window,
            BLOCK_H=block_h,
            BLOCK_O=next_power_of_2(out, high=_TILE // block_h),
            num_warps=4,
        )
    columns = _PRODUCTS // (block_n * block_h)
    block_c, block_o = next_power_of_2(channels, high=columns), next_power_of_2(out, high=columns)
    gate_head_bwd_kernel[(triton.cdiv(channels, block_c) + triton.cdiv(out, block_o),)](
        gradients,
        dz,
        upstream,
        saved,
        head,
        n,
        1.0 / pixels,
        C=channels,
        HIDDEN=units,
        OUT=out,
        TRAINING=training,
        WINDOW=window,
        ONE_TILE=n <= block_n,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        BLOCK_H=block_h,
        BLOCK_O=block_o,
        num_warps=_WARPS,
    )
    return gradients
