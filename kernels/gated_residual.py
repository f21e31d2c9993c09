"""y = relu(shortcut + gate * branch) in one pass, and its gradients in one pass.

One program per (sample, block of channels) loops over the pixels. The branch of a closed sample or channel is ignored,
and not read where that saves memory traffic: for a whole sample, or for a channel in NCHW.
"""

import torch
import triton
import triton.language as tl
from fastgate.kernels._device import last_to_finish, map_offsets
from fastgate.kernels._launch import counter, is_channels_last, plane_tile
from torch import Tensor


@triton.jit
def _gate_of_channels(gate_ptr, n, c, C: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """The gate of channels c [BC] of sample n, fp32."""
    if PER_CHANNEL:
        return tl.load(gate_ptr + n * C + c, mask=c < C, other=0.0).to(tl.float32)
    return tl.load(gate_ptr + n).to(tl.float32) + tl.zeros(c.shape, dtype=tl.float32)


@triton.jit
def _load_open(
    branch_ptr, gate_ptr, gate, n, c, p, C: tl.constexpr, HW: tl.constexpr, PER_CHANNEL: tl.constexpr,
    BRANCH_LAST: tl.constexpr,
):  # fmt: skip
    """branch [BC, BP] of sample n, fp32; 0 where `gate` [BC] is closed.

    A mask computed from a float is opaque to the compiler, which would then load element by element. Therefore a closed
    sample has an integer bound of 0 channels, and in channels_last, where closed channels are in sectors that are read
    anyway, they are read and discarded.
    """
    channels = C
    if not PER_CHANNEL:
        channels = tl.where(tl.load(gate_ptr + n) != 0, C, 0)
    inside = (c < channels)[:, None] & (p < HW)[None, :]
    at = map_offsets(c, p, C, HW, BRANCH_LAST)
    if PER_CHANNEL and not BRANCH_LAST:
        inside = inside & (gate != 0)[:, None]
    branch = tl.load(branch_ptr + n * (C * HW) + at, mask=inside, other=0.0).to(tl.float32)
    if PER_CHANNEL and BRANCH_LAST:
        return tl.where((gate != 0)[:, None], branch, 0.0)
    return branch


@triton.jit
def _gated_residual_fwd_kernel(
    y_ptr,
    pooled_ptr,
    shortcut_ptr,
    branch_ptr,
    gate_ptr,
    C: tl.constexpr,
    HW: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    RELU: tl.constexpr,
    SHORTCUT_LAST: tl.constexpr,
    BRANCH_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """y[n, c, p] = relu(shortcut[n, c, p] + gate[n, c] * branch[n, c, p]); pooled[n, c] = mean over p of y."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    gate = _gate_of_channels(gate_ptr, n, c, C, PER_CHANNEL)
    total = tl.zeros([BLOCK_C, BLOCK_P], dtype=tl.float32)
    for first in range(0, HW, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = (c < C)[:, None] & (p < HW)[None, :]
        at = map_offsets(c, p, C, HW, SHORTCUT_LAST)
        y = tl.load(shortcut_ptr + n * (C * HW) + at, mask=inside, other=0.0).to(tl.float32)
        y += gate[:, None] * _load_open(branch_ptr, gate_ptr, gate, n, c, p, C, HW, PER_CHANNEL, BRANCH_LAST)
        if RELU:
            y = tl.where(y < 0, 0.0, y)  # not maximum: a NaN stays one, as in torch.relu
        y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + n * (C * HW) + at, y, mask=inside)
        total += y.to(tl.float32)
    if pooled_ptr is not None:
        tl.store(pooled_ptr + n * C + c, tl.sum(total, axis=1) / HW, mask=c < C)


@triton.jit
def _gated_residual_bwd_kernel(
    dshortcut_ptr,
    dbranch_ptr,
    dgate_ptr,
    partial_ptr,
    counter_ptr,
    dy_ptr,
    dpooled_ptr,
    y_ptr,
    branch_ptr,
    gate_ptr,
    n_samples,
    C: tl.constexpr,
    HW: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    RELU: tl.constexpr,
    DY_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    BRANCH_LAST: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """With d = (dy + dpooled / HW) where not y <= 0: dshortcut = d, dbranch = gate * d, dgate = sum of d * branch."""
    n = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    c = split * BLOCK_C + tl.arange(0, BLOCK_C)
    gate = _gate_of_channels(gate_ptr, n, c, C, PER_CHANNEL)
    total = tl.zeros([BLOCK_C, BLOCK_P], dtype=tl.float32)
    for first in range(0, HW, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = (c < C)[:, None] & (p < HW)[None, :]
        y_at = n * (C * HW) + map_offsets(c, p, C, HW, Y_LAST)
        branch_at = n * (C * HW) + map_offsets(c, p, C, HW, BRANCH_LAST)
        d = tl.zeros([BLOCK_C, BLOCK_P], dtype=tl.float32)
        if dy_ptr is not None:
            dy_at = n * (C * HW) + map_offsets(c, p, C, HW, DY_LAST)
            d += tl.load(dy_ptr + dy_at, mask=inside, other=0.0).to(tl.float32)
        if dpooled_ptr is not None:
            d += (tl.load(dpooled_ptr + n * C + c, mask=c < C, other=0.0) / HW)[:, None]
        if RELU:
            d = tl.where(tl.load(y_ptr + y_at, mask=inside, other=0.0).to(tl.float32) <= 0, 0.0, d)
        tl.store(dshortcut_ptr + y_at, d.to(dshortcut_ptr.dtype.element_ty), mask=inside)
        tl.store(dbranch_ptr + branch_at, (gate[:, None] * d).to(dbranch_ptr.dtype.element_ty), mask=inside)
        if dgate_ptr is not None:
            branch = tl.load(branch_ptr + branch_at, mask=inside, other=0.0).to(tl.float32)
            total += tl.where(inside, d * branch, 0.0)
    if dgate_ptr is not None:
        if PER_CHANNEL:
            tl.store(dgate_ptr + n * C + c, tl.sum(total, axis=1).to(dgate_ptr.dtype.element_ty), mask=c < C)
        elif SPLITS == 1:
            tl.store(dgate_ptr + n, tl.sum(total).to(dgate_ptr.dtype.element_ty))
        else:
            tl.store(partial_ptr + n * SPLITS + split, tl.sum(total))
            if last_to_finish(counter_ptr, n_samples * SPLITS):
                start = 0
                while start < n_samples:
                    samples = start + tl.arange(0, BLOCK_N)
                    dgate = tl.zeros([BLOCK_N], dtype=tl.float32)
                    for i in range(SPLITS):
                        at = samples * SPLITS + i
                        dgate += tl.load(partial_ptr + at, mask=samples < n_samples, other=0.0, cache_modifier=".cg")
                    tl.store(dgate_ptr + samples, dgate.to(dgate_ptr.dtype.element_ty), mask=samples < n_samples)
                    start += BLOCK_N


def gated_residual_fwd(shortcut: Tensor, branch: Tensor, gate: Tensor, relu: bool, pool: bool) -> tuple[Tensor, Tensor]:
    """Compute y in the layout of `shortcut`, and its means over H, W, fp32 [N, C] (empty if `pool` is False).

    `gate` is contiguous, [N] or [N, C]; `shortcut` and `branch` are dense, [N, C, H, W].
    """
    n, channels, height, width = shortcut.shape
    pixels = height * width
    y = torch.empty_like(shortcut, dtype=torch.promote_types(shortcut.dtype, branch.dtype))
    pooled = shortcut.new_empty((n, channels) if pool else (0,), dtype=torch.float32)
    block_c, block_p = plane_tile(channels, pixels)
    _gated_residual_fwd_kernel[(n, triton.cdiv(channels, block_c))](
        y,
        pooled if pool else None,
        shortcut,
        branch,
        gate,
        C=channels,
        HW=pixels,
        PER_CHANNEL=gate.dim() == 2,
        RELU=relu,
        SHORTCUT_LAST=is_channels_last(shortcut),
        BRANCH_LAST=is_channels_last(branch),
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=8,  # 4 spill on sm_80 with large NCHW maps (8 bytes)
    )
    return y, pooled


def gated_residual_bwd(
    dy: Tensor | None,
    dpooled: Tensor | None,
    y: Tensor,
    branch: Tensor,
    gate: Tensor,
    relu: bool,
    needs_dgate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dshortcut in the layout of `y`, dbranch in that of `branch`, dgate like `gate` (empty unless needed)."""
    n, channels, height, width = y.shape
    pixels = height * width
    dshortcut, dbranch = torch.empty_like(y), torch.empty_like(branch)
    dgate = torch.empty_like(gate) if needs_dgate else gate.new_empty(0)
    block_c, block_p = plane_tile(channels, pixels)
    splits = triton.cdiv(channels, block_c)
    partial = y.new_empty((n, splits), dtype=torch.float32)
    _gated_residual_bwd_kernel[(n, splits)](
        dshortcut,
        dbranch,
        dgate if needs_dgate else None,
        partial,
        counter(y.device),
        dy,
        dpooled,
        y,
        branch,
        gate,
        n,
        C=channels,
        HW=pixels,
        PER_CHANNEL=gate.dim() == 2,
        RELU=relu,
        DY_LAST=dy is not None and is_channels_last(dy),
        Y_LAST=is_channels_last(y),
        BRANCH_LAST=is_channels_last(branch),
        SPLITS=splits,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        BLOCK_N=128,
        num_warps=4,  # 8 spill on sm_80 with 16 channels (8 bytes)
    )
    return dshortcut, dbranch, dgate
