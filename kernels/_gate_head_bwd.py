"""Device code of the gate head's backward: see :mod:`fastgate.kernels.gate_head`.

With f the features, h = f @ w1.T + b1, m and r batch norm's mean and 1 / standard deviation, u = (h - m) * r,
z = gamma * u + beta, logits = relu(z) @ w2.T + b2::

    dlogits = grad_logits + window(logits, grad_decisions)
    dw2, db2 = dlogits.T @ relu(z), sum over n of dlogits
    dz = (dlogits @ w2) where not z <= 0
    dgamma, dbeta = sum of dz * u, sum of dz
    dh = gamma * r * (dz - dbeta / N - u * dgamma / N)       (in evaluation: gamma * r * dz)
    dw1, db1, df = dh.T @ f, sum of dh, dh @ w1
"""

import triton
import triton.language as tl
from fastgate.kernels._gate_head_fwd import batch_norm, relu


@triton.jit
def _logit_gradient(upstream, logits_ptr, at, inside, WINDOW: tl.constexpr):
    """dlogits at these places of [N, OUT]; 0 outside."""
    grad = tl.zeros(inside.shape, dtype=tl.float32)
    if upstream.decisions_ptr is not None:
        through = tl.load(upstream.decisions_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if WINDOW != "identity":
            logits = tl.load(logits_ptr + at, mask=inside, other=0.0)
            passes = tl.abs(logits) <= 1
            if WINDOW == "restoring":
                passes = passes | ((tl.abs(logits) > 1) & (logits * through > 0))
            through = tl.where(passes, through, 0.0)
        grad += through
    if upstream.logits_ptr is not None:
        grad += tl.load(upstream.logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return grad


@triton.jit
def gate_head_bwd_hidden_kernel(
    dz_ptr,
    upstream,
    saved,
    head,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """dlogits @ w2 of one sample per program, before the ReLU's mask: for heads of several gates."""
    n = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_O, BLOCK_H], dtype=tl.float32)
    for first in range(0, OUT, BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)
        dlogits = _logit_gradient(upstream, saved.logits_ptr, n * OUT + o, o < OUT, WINDOW)
        w2_inside = (o < OUT)[:, None] & (j < HIDDEN)[None, :]
        w2 = tl.load(head.w2_ptr + o[:, None] * HIDDEN + j[None, :], mask=w2_inside, other=0.0)
        total += dlogits[:, None] * w2
    tl.store(dz_ptr + n * HIDDEN + j, tl.sum(total, axis=0), mask=j < HIDDEN)


@triton.jit
def _normalised(saved, head, n, j, inside, HIDDEN: tl.constexpr):
    """(u, z) [BN, BH] of samples n and hidden units j."""
    mean = tl.load(saved.mean_ptr + j, mask=j < HIDDEN, other=0.0)
    rstd = tl.load(saved.rstd_ptr + j, mask=j < HIDDEN, other=0.0)
    h = tl.load(saved.hidden_ptr + n[:, None] * HIDDEN + j[None, :], mask=inside, other=0.0)
    return batch_norm(h, mean, rstd, head, j, HIDDEN)


@triton.jit
def _norm_gradient(
    dz_ptr, upstream, saved, head, n, j, n_samples, HIDDEN: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """(dz, u) [BN, BH] of samples n and hidden units j, 0 outside; without `dz_ptr` there is one gate."""
    inside = (n < n_samples)[:, None] & (j < HIDDEN)[None, :]
    u, z = _normalised(saved, head, n, j, inside, HIDDEN)
    if dz_ptr is None:
        dlogits = _logit_gradient(upstream, saved.logits_ptr, n, n < n_samples, WINDOW)
        w2 = tl.load(head.w2_ptr + j, mask=j < HIDDEN, other=0.0)
        dz = dlogits[:, None] * w2[None, :]
    else:
        dz = tl.load(dz_ptr + n[:, None] * HIDDEN + j[None, :], mask=inside, other=0.0)
    return tl.where(inside & ~(z <= 0), dz, 0.0), tl.where(inside, u, 0.0)


@triton.jit
def _feature_gradients(
    gradients, dz, u, dbeta, dgamma, gain, saved, w1, n, c, n_samples, scale, C: tl.constexpr, TRAINING: tl.constexpr
):
    """Stores df of samples n and channels c, and returns their part of (dw1 [BH, BC], db1 [BH])."""
    if TRAINING:
        dz -= (dbeta / n_samples)[None, :] + u * (dgamma / n_samples)[None, :]
    dh = tl.where((n < n_samples)[:, None], dz * gain[None, :], 0.0)
    at = n[:, None] * C + c[None, :]
    inside = (n < n_samples)[:, None] & (c < C)[None, :]
    f = tl.load(saved.features_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # not dh * w1: Triton turns a sum over such a product into a TF32 dot (off by 7e-4 on an H200)
    df = tl.sum(w1[None, :, :] * dh[:, :, None], axis=1) * scale
    tl.store(gradients.df_ptr + at, df, mask=inside)
    return tl.sum(dh[:, :, None] * f[:, None, :], axis=0), tl.sum(dh, axis=0)


@triton.jit
def gate_head_bwd_kernel(
    gradients,
    dz_ptr,
    upstream,
    saved,
    head,
    n_samples,
    scale,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    TRAINING: tl.constexpr,
    WINDOW: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """All gradients from dz and dlogits, with one independent program per block of channels or of gates.

    `scale` * dh @ w1 is df; with scale 1 / HW it is the gradient of every pixel.
    """
    block = tl.program_id(0)
    j = tl.arange(0, BLOCK_H)
    unit = j < HIDDEN
    n = tl.arange(0, BLOCK_N)
    blocks_of_channels: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    if block < blocks_of_channels:
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        gain = tl.load(saved.rstd_ptr + j, mask=unit, other=0.0)
        if head.gamma_ptr is not None:
            gain *= tl.load(head.gamma_ptr + j, mask=unit, other=0.0)
        w1_at = j[:, None] * C + c[None, :]
        w1_inside = unit[:, None] & (c < C)[None, :]
        w1 = tl.load(head.w1_ptr + w1_at, mask=w1_inside, other=0.0)
        if ONE_TILE:
            dz, u = _norm_gradient(dz_ptr, upstream, saved, head, n, j, n_samples, HIDDEN, WINDOW)
            dbeta, dgamma = tl.sum(dz, axis=0), tl.sum(dz * u, axis=0)
            dw1, db1 = _feature_gradients(
                gradients, dz, u, dbeta, dgamma, gain, saved, w1, n, c, n_samples, scale, C, TRAINING
            )
        else:
            dbeta = tl.zeros([BLOCK_H], dtype=tl.float32)
            dgamma = tl.zeros([BLOCK_H], dtype=tl.float32)
            first = 0
            while first < n_samples:
                dz, u = _norm_gradient(dz_ptr, upstream, saved, head, first + n, j, n_samples, HIDDEN, WINDOW)
                dbeta += tl.sum(dz, axis=0)
                dgamma += tl.sum(dz * u, axis=0)
                first += BLOCK_N
            dw1 = tl.zeros([BLOCK_H, BLOCK_C], dtype=tl.float32)
            db1 = tl.zeros([BLOCK_H], dtype=tl.float32)
            first = 0
            while first < n_samples:
                dz, u = _norm_gradient(dz_ptr, upstream, saved, head, first + n, j, n_samples, HIDDEN, WINDOW)
                more_dw1, more_db1 = _feature_gradients(
                    gradients, dz, u, dbeta, dgamma, gain, saved, w1, first + n, c, n_samples, scale, C, TRAINING
                )
                dw1 += more_dw1
                db1 += more_db1
                first += BLOCK_N
        tl.store(gradients.dw1_ptr + w1_at, dw1, mask=w1_inside)
        if block == 0:
            tl.store(gradients.db1_ptr + j, db1, mask=unit)
            tl.store(gradients.dgamma_ptr + j, dgamma, mask=unit)
            tl.store(gradients.dbeta_ptr + j, dbeta, mask=unit)
    else:
        o = (block - blocks_of_channels) * BLOCK_O + tl.arange(0, BLOCK_O)
        dw2 = tl.zeros([BLOCK_O, BLOCK_H], dtype=tl.float32)
        db2 = tl.zeros([BLOCK_O], dtype=tl.float32)
        first = 0
        while first < n_samples:
            inside = (first + n < n_samples)[:, None] & unit[None, :]
            z = tl.where(inside, relu(_normalised(saved, head, first + n, j, inside, HIDDEN)[1]), 0.0)
            out_inside = (first + n < n_samples)[:, None] & (o < OUT)[None, :]
            at = (first + n)[:, None] * OUT + o[None, :]
            dlogits = _logit_gradient(upstream, saved.logits_ptr, at, out_inside, WINDOW)
            dw2 += tl.sum(dlogits[:, :, None] * z[:, None, :], axis=0)
            db2 += tl.sum(dlogits, axis=0)
            first += BLOCK_N
        dw2_inside = (o < OUT)[:, None] & unit[None, :]
        tl.store(gradients.dw2_ptr + o[:, None] * HIDDEN + j[None, :], dw2, mask=dw2_inside)
        tl.store(gradients.db2_ptr + o, db2, mask=o < OUT)
