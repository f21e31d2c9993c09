"""The gate head, one launch forward and one backward: launchers.

Forward (`_gate_head_fwd.py`): programs reduce x (pool and fc1, or a piece of the flattened fc1) to partial sums of the
first dense layer; the last program to finish adds them up in a fixed order and does batch norm, ReLU, fc2 and the
threshold. Backward (`_gate_head_bwd.py`): every program takes a block of fc1's inputs and computes the small gradients
it needs for itself, so that none waits for another. A pooled head's dx is the same for every pixel: it is returned as
[N, C] and broadcast by the caller, which moves no bytes.
"""

from dataclasses import dataclass

import torch
import triton
from fastgate.kernels._gate_head_bwd import gate_head_bwd_depth1_kernel, gate_head_bwd_kernel
from fastgate.kernels._gate_head_fwd import gate_head_fwd_flat_kernel, gate_head_fwd_pooled_kernel
from fastgate.kernels._launch import counter, is_channels_last, next_power_of_2, plane_tile
from torch import Tensor

WINDOWS = {"clipped": 0, "restoring": 1, "identity": 2}
MAX_HIDDEN = 128  # a sample's hidden row is one tile
_DOT = 16  # tl.dot wants at least this many rows and columns (fp32, Triton 3.6)
# pieces of the flattened fc1: about as many programs as a large GPU has multiprocessors
_FLAT_PROGRAMS = 128


@dataclass(frozen=True)
class Head:
    """Sizes of one call; `flat` where fc1 takes more inputs than there are channels (or x is already pooled)."""

    samples: int
    channels: int
    pixels: int
    hidden: int
    out: int
    depth: int
    flat: bool

    @classmethod
    def of(cls, x: Tensor, fc1_weight: Tensor, fc2_weight: Tensor | None) -> "Head":
        """The sizes of a head on x."""
        n, channels = x.shape[:2]
        pixels = x.shape[2] * x.shape[3] if x.dim() == 4 else 1
        hidden = fc1_weight.shape[0]
        out = hidden if fc2_weight is None else fc2_weight.shape[0]
        flat = x.dim() == 2 or fc1_weight.shape[1] != channels
        return cls(n, channels, pixels, hidden, out, 1 if fc2_weight is None else 2, flat)

    @property
    def features(self) -> int:
        """Inputs of fc1."""
        return self.channels * self.pixels if self.flat else self.channels

    @property
    def block_h(self) -> int:
        """Hidden units per tile: all of them for two layers, else a part."""
        return next_power_of_2(self.hidden, _DOT, MAX_HIDDEN if self.depth == 2 else 64)

    @property
    def block_o(self) -> int:
        """Gates per tile."""
        return next_power_of_2(self.out, _DOT, 64)

    @property
    def block_n(self) -> int:
        """Samples per tile: 64 of them spill, up to 320 bytes of stack in the backward of 32 or more channels."""
        return next_power_of_2(self.samples, _DOT, 32)


def gate_head_fwd(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """decisions, logits [N, out], and for backward: features [N, C], hidden [N, h], mean and rstd [h]; all fp32.

    x is dense [N, C, H, W], or already pooled [N, C]. `features` is empty for a flat head (x itself serves), `hidden`,
    `mean` and `rstd` are empty for a head of one layer.
    """
    head = Head.of(x, fc1_weight, fc2_weight)
    n, deep = head.samples, head.depth == 2

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    decisions, logits = empty(n, head.out), empty(n, head.out)
    hidden = empty(n, head.hidden) if deep else empty(0)
    mean, rstd = (empty(head.hidden), empty(head.hidden)) if deep else (empty(0), empty(0))
    features = empty(0) if head.flat else empty(n, head.channels)
    last = x.dim() == 4 and is_channels_last(x)
    block_c, block_p = plane_tile(head.channels, head.pixels, last)
    block_m = next_power_of_2(n, _DOT, 64)
    block_k = next_power_of_2(head.features, _DOT, 64)
    rows = triton.cdiv(n, block_m)
    split_k = block_k * triton.cdiv(triton.cdiv(head.features, block_k), max(1, _FLAT_PROGRAMS // rows))
    splits = triton.cdiv(head.features, split_k) if head.flat else triton.cdiv(head.channels, block_c)
    partial = empty(n, splits, head.hidden)

    def given(tensor: Tensor | None) -> Tensor:
        return partial if tensor is None else tensor  # a pointer that is never read

    ending = {
        "n_samples": n,
        "momentum": momentum,
        "eps": eps,
        "C": head.channels,
        "HW": head.pixels,
        "CHANNELS_LAST": last,
        "SPLITS": splits,
        "HIDDEN": head.hidden,
        "OUT": head.out,
        "DEPTH": head.depth,
        "TRAINING": training,
        "HAS_RUNNING": running_mean is not None,
        "AFFINE": bn_weight is not None,
        "HAS_B1": fc1_bias is not None,
        "HAS_B2": fc2_bias is not None,
        "BLOCK_N": head.block_n,
        "BLOCK_H": head.block_h,
        "BLOCK_O": head.block_o,
        "num_warps": 4,
    }
    inputs = (
        counter(x.device),
        given(running_mean),
        given(running_var),
        x,
        fc1_weight,
        given(fc1_bias),
        given(bn_weight),
        given(bn_bias),
        given(fc2_weight),
        given(fc2_bias),
    )
    if head.flat:
        gate_head_fwd_flat_kernel[(rows, splits)](
            decisions, logits, hidden, mean, rstd, partial, *inputs,
            SPLIT_K=split_k, BLOCK_M=block_m, BLOCK_K=block_k, **ending,
        )  # fmt: skip
    else:
        gate_head_fwd_pooled_kernel[(n, splits)](
            decisions, logits, features, hidden, mean, rstd, partial, *inputs,
            BLOCK_C=block_c, BLOCK_P=block_p, **ending,
        )  # fmt: skip
    return decisions, logits, features, hidden, mean, rstd


def gate_head_bwd(
    grad_decisions: Tensor | None,
    grad_logits: Tensor | None,
    logits: Tensor,
    features: Tensor,
    hidden: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    fc2_weight: Tensor | None,
    training: bool,
    window: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx and the gradients of fc1 (weight, bias), batch norm (weight, bias) and fc2 (weight, bias).

    dx is [N, C] fp32 for a pooled head, to be broadcast over the pixels, and like x for a flat one. Of a head of one
    layer the last four are empty.
    """
    head = Head.of(x, fc1_weight, fc2_weight)
    deep = head.depth == 2
    source = x if head.flat else features
    dx = torch.empty_like(source)

    def empty(*shape: int) -> Tensor:
        return logits.new_empty(shape if deep or len(shape) == 0 else (0,))

    dw1, db1 = torch.empty_like(fc1_weight), logits.new_empty(head.hidden)
    dgamma, dbeta = empty(head.hidden), empty(head.hidden)
    dw2, db2 = empty(head.out, head.hidden), empty(head.out)
    # 32 columns of a pooled head spill on sm_90 (8 bytes)
    block_k = next_power_of_2(head.features, _DOT, 64) if head.flat else _DOT
    common = {
        "n_samples": head.samples,
        "scale": 1.0 if head.flat else 1.0 / head.pixels,
        "K": head.features,
        "C": head.channels,
        "HW": head.pixels,
        "CHANNELS_LAST": head.flat and x.dim() == 4 and is_channels_last(x),
        "OUT": head.out,
        "WINDOW": WINDOWS[window],
        "HAS_GRAD_DECISIONS": grad_decisions is not None,
        "HAS_GRAD_LOGITS": grad_logits is not None,
        # 32 samples spill on sm_90 with 64 gates (16 bytes) or 64 flattened features (32 bytes, Triton 3.6)
        "BLOCK_N": min(head.block_n, 16) if head.flat or head.block_o == 64 else head.block_n,
        "BLOCK_K": block_k,
        "BLOCK_O": head.block_o,
        "num_warps": 4,
    }
    gradients = (logits if grad_decisions is None else grad_decisions, logits if grad_logits is None else grad_logits)
    blocks = triton.cdiv(head.features, block_k)
    if deep:
        affine = bn_weight is not None and bn_bias is not None
        gate_head_bwd_kernel[(blocks + 1,)](
            dx, dw1, db1, dgamma, dbeta, dw2, db2, *gradients, logits, hidden, mean, rstd, source, fc1_weight,
            bn_weight if affine else mean, bn_bias if affine else mean, fc2_weight,
            HIDDEN=head.hidden, TRAINING=training, AFFINE=affine, BLOCK_H=head.block_h, **common,
        )  # fmt: skip
    else:
        gate_head_bwd_depth1_kernel[(blocks,)](dx, dw1, db1, *gradients, logits, source, fc1_weight, **common)
    return dx, dw1, db1, dgamma, dbeta, dw2, db2
