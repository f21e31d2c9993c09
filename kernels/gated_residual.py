"""y = relu(shortcut + gate * branch) in one pass, and its gradients in one pass.

One program per (sample, block of channels) walks over the pixels. A closed sample's or channel's branch is not read.
"""

import torch
import triton
import triton.language as tl
from fastgate.kernels._launch import counter, is_channels_last, plane_tile
from torch import Tensor


@triton.jit
def _offsets(n, c, p, C: tl.constexpr, HW: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Element offsets of channels c [BC] and pixels p [BP] of sample n, as [BC, BP]."""
    if CHANNELS_LAST:
        return n * C * HW + p[None, :] * C + c[:, None]
    return n * C * HW + c[:, None] * HW + p[None, :]


@triton.jit
def _gate_of_channels(gate_ptr, n, c, C: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """The gate of channels c [BC] of sample n, fp32."""
    if PER_CHANNEL:
        return tl.load(gate_ptr + n * C + c, mask=c < C, other=0.0).to(tl.float32)
    return tl.load(gate_ptr + n + c * 0).to(tl.float32)


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
    POOL: tl.constexpr,
    SHORTCUT_LAST: tl.constexpr,
    BRANCH_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    gate = _gate_of_channels(gate_ptr, n, c, C, PER_CHANNEL)
    total = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, HW, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (c < C)[:, None] & (p < HW)[None, :]
        at = _offsets(n, c, p, C, HW, SHORTCUT_LAST)
        y = tl.load(shortcut_ptr + at, mask=inside, other=0.0).to(tl.float32)
        branch_at = _offsets(n, c, p, C, HW, BRANCH_LAST)
        # closed: the load is masked off, so nothing is read
        branch = tl.load(branch_ptr + branch_at, mask=inside & (gate != 0)[:, None], other=0.0).to(tl.float32)
        y += gate[:, None] * branch
        if RELU:
            y = tl.where(y < 0, 0.0, y)  # not maximum: a NaN stays one, as in torch.relu
        y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + at, y, mask=inside)
        if POOL:
            total += tl.sum(y.to(tl.float32), axis=1)
    if POOL:
        tl.store(pooled_ptr + n * C + c, total / HW, mask=c < C)


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
    HAS_DY: tl.constexpr,
    HAS_DPOOLED: tl.constexpr,
    NEEDS_DGATE: tl.constexpr,
    DY_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    BRANCH_LAST: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    c = split * BLOCK_C + tl.arange(0, BLOCK_C)
    gate = _gate_of_channels(gate_ptr, n, c, C, PER_CHANNEL)
    dgate = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, HW, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (c < C)[:, None] & (p < HW)[None, :]
        at = _offsets(n, c, p, C, HW, Y_LAST)
        dy = tl.zeros([BLOCK_C, BLOCK_P], dtype=tl.float32)
        if HAS_DY:
            dy_at = _offsets(n, c, p, C, HW, DY_LAST)
            dy += tl.load(dy_ptr + dy_at, mask=inside, other=0.0).to(tl.float32)
        if HAS_DPOOLED:
            dy += (tl.load(dpooled_ptr + n * C + c, mask=c < C, other=0.0) / HW)[:, None]
        if RELU:
            y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
            dy = tl.where(y > 0, dy, 0.0)
        tl.store(dshortcut_ptr + at, dy.to(dshortcut_ptr.dtype.element_ty), mask=inside)
        branch_at = _offsets(n, c, p, C, HW, BRANCH_LAST)
        tl.store(dbranch_ptr + branch_at, (gate[:, None] * dy).to(dbranch_ptr.dtype.element_ty), mask=inside)
        if NEEDS_DGATE:
            branch = tl.load(branch_ptr + branch_at, mask=inside, other=0.0).to(tl.float32)
            dgate += tl.sum(tl.where(inside, dy * branch, 0.0), axis=1)
    if NEEDS_DGATE:
        if PER_CHANNEL:
            tl.store(dgate_ptr + n * C + c, dgate.to(dgate_ptr.dtype.element_ty), mask=c < C)
        elif SPLITS == 1:
            tl.store(dgate_ptr + n, tl.sum(dgate, axis=0).to(dgate_ptr.dtype.element_ty))
        else:
            tl.store(partial_ptr + n * SPLITS + split, tl.sum(dgate, axis=0))
            # every thread's store before the count: Triton up to 3.8 does not order them by itself
            tl.debug_barrier()
            done = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
            if done == n_samples * SPLITS - 1:
                first = 0
                while first < n_samples:
                    samples = first + tl.arange(0, BLOCK_N)
                    total = tl.zeros([BLOCK_N], dtype=tl.float32)
                    for i in range(SPLITS):
                        total += tl.load(
                            partial_ptr + samples * SPLITS + i,
                            mask=samples < n_samples,
                            other=0.0,
                            cache_modifier=".cg",
                        )
                    tl.store(dgate_ptr + samples, total.to(dgate_ptr.dtype.element_ty), mask=samples < n_samples)
                    first += BLOCK_N
                tl.store(counter_ptr, 0)


def gated_residual_fwd(shortcut: Tensor, branch: Tensor, gate: Tensor, relu: bool, pool: bool) -> tuple[Tensor, Tensor]:
    """y in the layout of `shortcut`, and its means over H, W, fp32 [N, C] (empty where `pool` is false).

    `gate` is contiguous, [N] or [N, C]; `shortcut` and `branch` are dense, [N, C, H, W].
    """
    n, channels, height, width = shortcut.shape
    pixels = height * width
    y = torch.empty_like(shortcut, dtype=torch.promote_types(shortcut.dtype, branch.dtype))
    pooled = shortcut.new_empty((n, channels) if pool else (0,), dtype=torch.float32)
    block_c, block_p = plane_tile(channels, pixels, is_channels_last(shortcut))
    _gated_residual_fwd_kernel[(n, triton.cdiv(channels, block_c))](
        y,
        pooled,
        shortcut,
        branch,
        gate,
        C=channels,
        HW=pixels,
        PER_CHANNEL=gate.dim() == 2,
        RELU=relu,
        POOL=pool,
        SHORTCUT_LAST=is_channels_last(shortcut),
        BRANCH_LAST=is_channels_last(branch),
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        num_warps=4,
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
    """dshortcut in the layout of `y`, dbranch in that of `branch`, dgate like `gate` (empty unless needed)."""
    n, channels, height, width = y.shape
    pixels = height * width
    dshortcut, dbranch = torch.empty_like(y), torch.empty_like(branch)
    dgate = torch.empty_like(gate) if needs_dgate else gate.new_empty(0)
    block_c, block_p = plane_tile(channels, pixels, is_channels_last(y))
    splits = triton.cdiv(channels, block_c)
    partial = y.new_empty((n, splits), dtype=torch.float32)
    _gated_residual_bwd_kernel[(n, splits)](
        dshortcut,
        dbranch,
        dgate,
        partial,
        counter(y.device),
        y if dy is None else dy,
        partial if dpooled is None else dpooled,
        y,
        branch,
        gate,
        n,
        C=channels,
        HW=pixels,
        PER_CHANNEL=gate.dim() == 2,
        RELU=relu,
        HAS_DY=dy is not None,
        HAS_DPOOLED=dpooled is not None,
        NEEDS_DGATE=needs_dgate,
        DY_LAST=is_channels_last(y if dy is None else dy),
        Y_LAST=is_channels_last(y),
        BRANCH_LAST=is_channels_last(branch),
        SPLITS=splits,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        BLOCK_N=128,
        num_warps=4,
    )
    return dshortcut, dbranch, dgate
