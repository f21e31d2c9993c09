"""Device code of the gate head's backward: see :mod:`fastgate.kernels.gate_head`."""

import triton
import triton.language as tl
from fastgate.kernels._gate_head_fwd import batch_norm


@triton.jit
def _logit_gradient(
    grad_decisions_ptr,
    grad_logits_ptr,
    logits_ptr,
    n,
    o,
    n_samples,
    OUT: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_GRAD_DECISIONS: tl.constexpr,
    HAS_GRAD_LOGITS: tl.constexpr,
):
    """grad_logits + window(logits, grad_decisions) [BN, BO] of samples n and gates o; 0 outside."""
    inside = (n < n_samples)[:, None] & (o < OUT)[None, :]
    at = n[:, None] * OUT + o[None, :]
    grad = tl.zeros(inside.shape, dtype=tl.float32)
    if HAS_GRAD_DECISIONS:
        through = tl.load(grad_decisions_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if WINDOW != 2:
            logits = tl.load(logits_ptr + at, mask=inside, other=0.0)
            passes = tl.abs(logits) <= 1
            if WINDOW == 1:
                passes = passes | ((tl.abs(logits) > 1) & (logits * through > 0))
            through = tl.where(passes, through, 0.0)
        grad += through
    if HAS_GRAD_LOGITS:
        grad += tl.load(grad_logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return grad


@triton.jit
def _normalised_gradient(
    grad_decisions_ptr,
    grad_logits_ptr,
    logits_ptr,
    hidden_ptr,
    gamma_ptr,
    beta_ptr,
    w2_ptr,
    mean,
    rstd,
    n,
    j,
    n_samples,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    AFFINE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_GRAD_DECISIONS: tl.constexpr,
    HAS_GRAD_LOGITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """(gradient of batch norm's output, its normalised input, relu of its output), each [BN, BH], 0 outside."""
    dz = tl.zeros([BLOCK_N, BLOCK_H], dtype=tl.float32)
    for o0 in range(0, OUT, BLOCK_O):
        o = o0 + tl.arange(0, BLOCK_O)
        dlogits = _logit_gradient(
            grad_decisions_ptr,
            grad_logits_ptr,
            logits_ptr,
            n,
            o,
            n_samples,
            OUT,
            WINDOW,
            HAS_GRAD_DECISIONS,
            HAS_GRAD_LOGITS,
        )
        w_inside = (o < OUT)[:, None] & (j < HIDDEN)[None, :]
        w2 = tl.load(w2_ptr + o[:, None] * HIDDEN + j[None, :], mask=w_inside, other=0.0)
        dz = tl.dot(dlogits, w2, dz, input_precision="ieee")
    inside = (n < n_samples)[:, None] & (j < HIDDEN)[None, :]
    h = tl.load(hidden_ptr + n[:, None] * HIDDEN + j[None, :], mask=inside, other=0.0)
    normal, z = batch_norm(h, mean, rstd, gamma_ptr, beta_ptr, j, HIDDEN, AFFINE)
    on = inside & (z > 0)
    return tl.where(on, dz, 0.0), tl.where(inside, normal, 0.0), tl.where(on, z, 0.0)


@triton.jit
def _fc1_inputs(x_ptr, n, k, n_samples, K: tl.constexpr):
    """Features [BN, BK] of samples n at places k in memory order, fp32; 0 outside."""
    inside = (n < n_samples)[:, None] & (k < K)[None, :]
    return tl.load(x_ptr + n.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def gate_head_bwd_kernel(
    dx_ptr,
    dw1_ptr,
    db1_ptr,
    dgamma_ptr,
    dbeta_ptr,
    dw2_ptr,
    db2_ptr,
    grad_decisions_ptr,
    grad_logits_ptr,
    logits_ptr,
    hidden_ptr,
    mean_ptr,
    rstd_ptr,
    x_ptr,
    w1_ptr,
    gamma_ptr,
    beta_ptr,
    w2_ptr,
    n_samples,
    scale,
    K: tl.constexpr,
    C: tl.constexpr,
    HW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    TRAINING: tl.constexpr,
    AFFINE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_GRAD_DECISIONS: tl.constexpr,
    HAS_GRAD_LOGITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    # program 0: gradients of fc2, batch norm and fc1's bias; program i > 0: those of a block of fc1's inputs
    block = tl.program_id(0) - 1
    j = tl.arange(0, BLOCK_H)
    mean = tl.load(mean_ptr + j, mask=j < HIDDEN, other=0.0)
    rstd = tl.load(rstd_ptr + j, mask=j < HIDDEN, other=0.0)
    gain = rstd
    if AFFINE:
        gain = rstd * tl.load(gamma_ptr + j, mask=j < HIDDEN, other=0.0)
    sum_dy = tl.zeros([BLOCK_H], dtype=tl.float32)
    sum_dy_normal = tl.zeros([BLOCK_H], dtype=tl.float32)
    first = 0
    while first < n_samples:
        n = first + tl.arange(0, BLOCK_N)
        dy, normal, _ = _normalised_gradient(
            grad_decisions_ptr,
            grad_logits_ptr,
            logits_ptr,
            hidden_ptr,
            gamma_ptr,
            beta_ptr,
            w2_ptr,
            mean,
            rstd,
            n,
            j,
            n_samples,
            HIDDEN,
            OUT,
            AFFINE,
            WINDOW,
            HAS_GRAD_DECISIONS,
            HAS_GRAD_LOGITS,
            BLOCK_N,
            BLOCK_H,
            BLOCK_O,
        )
        sum_dy += tl.sum(dy, axis=0)
        sum_dy_normal += tl.sum(dy * normal, axis=0)
        first += BLOCK_N
    if block < 0:
        tl.store(dgamma_ptr + j, sum_dy_normal, mask=j < HIDDEN)
        tl.store(dbeta_ptr + j, sum_dy, mask=j < HIDDEN)
        for o0 in range(0, OUT, BLOCK_O):
            o = o0 + tl.arange(0, BLOCK_O)
            dw2 = tl.zeros([BLOCK_O, BLOCK_H], dtype=tl.float32)
            db2 = tl.zeros([BLOCK_O], dtype=tl.float32)
            first = 0
            while first < n_samples:
                n = first + tl.arange(0, BLOCK_N)
                dlogits = _logit_gradient(
                    grad_decisions_ptr,
                    grad_logits_ptr,
                    logits_ptr,
                    n,
                    o,
                    n_samples,
                    OUT,
                    WINDOW,
                    HAS_GRAD_DECISIONS,
                    HAS_GRAD_LOGITS,
                )
                inside = (n < n_samples)[:, None] & (j < HIDDEN)[None, :]
                h = tl.load(hidden_ptr + n[:, None] * HIDDEN + j[None, :], mask=inside, other=0.0)
                _, z = batch_norm(h, mean, rstd, gamma_ptr, beta_ptr, j, HIDDEN, AFFINE)
                dw2 = tl.dot(tl.trans(dlogits), tl.where(inside & (z > 0), z, 0.0), dw2, input_precision="ieee")
                db2 += tl.sum(dlogits, axis=0)
                first += BLOCK_N
            w_inside = (o < OUT)[:, None] & (j < HIDDEN)[None, :]
            tl.store(dw2_ptr + o[:, None] * HIDDEN + j[None, :], dw2, mask=w_inside)
            tl.store(db2_ptr + o, db2, mask=o < OUT)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    w = k
    if CHANNELS_LAST:
        w = (k % C) * HW + k // C
    w_inside = (j < HIDDEN)[:, None] & ((k >= 0) & (k < K))[None, :]
    w1 = tl.load(w1_ptr + j[:, None] * K + w[None, :], mask=w_inside, other=0.0)
    dw1 = tl.zeros([BLOCK_H, BLOCK_K], dtype=tl.float32)
    db1 = tl.zeros([BLOCK_H], dtype=tl.float32)
    first = 0
    while first < n_samples:
        n = first + tl.arange(0, BLOCK_N)
        dh, normal, _ = _normalised_gradient(
            grad_decisions_ptr,
            grad_logits_ptr,
            logits_ptr,
            hidden_ptr,
            gamma_ptr,
            beta_ptr,
            w2_ptr,
            mean,
            rstd,
            n,
            j,
            n_samples,
            HIDDEN,
            OUT,
            AFFINE,
            WINDOW,
            HAS_GRAD_DECISIONS,
            HAS_GRAD_LOGITS,
            BLOCK_N,
            BLOCK_H,
            BLOCK_O,
        )
        if TRAINING:
            dh -= (sum_dy / n_samples)[None, :] + normal * (sum_dy_normal / n_samples)[None, :]
        inside = (n < n_samples)[:, None] & (j < HIDDEN)[None, :]
        dh = tl.where(inside, dh * gain[None, :], 0.0)
        db1 += tl.sum(dh, axis=0)
        if block >= 0:
            x = _fc1_inputs(x_ptr, n, k, n_samples, K)
            dw1 = tl.dot(tl.trans(dh), x, dw1, input_precision="ieee")
            dx = tl.dot(dh, w1, input_precision="ieee") * scale
            x_inside = (n < n_samples)[:, None] & (k < K)[None, :]
            x_at = n.to(tl.int64)[:, None] * K + k[None, :]
            tl.store(dx_ptr + x_at, dx.to(dx_ptr.dtype.element_ty), mask=x_inside)
        first += BLOCK_N
    if block < 0:
        tl.store(db1_ptr + j, db1, mask=j < HIDDEN)
    else:
        tl.store(dw1_ptr + j[:, None] * K + w[None, :], dw1, mask=w_inside)


@triton.jit
def gate_head_bwd_depth1_kernel(
    dx_ptr,
    dw1_ptr,
    db1_ptr,
    grad_decisions_ptr,
    grad_logits_ptr,
    logits_ptr,
    x_ptr,
    w1_ptr,
    n_samples,
    scale,
    K: tl.constexpr,
    C: tl.constexpr,
    HW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    OUT: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_GRAD_DECISIONS: tl.constexpr,
    HAS_GRAD_LOGITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    # one program per block of the inputs of the only layer; the first one sums the bias gradient as well
    block = tl.program_id(0)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    w = k
    if CHANNELS_LAST:
        w = (k % C) * HW + k // C
    first = 0
    while first < n_samples:
        n = first + tl.arange(0, BLOCK_N)
        dx = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        for o0 in range(0, OUT, BLOCK_O):
            o = o0 + tl.arange(0, BLOCK_O)
            dlogits = _logit_gradient(
                grad_decisions_ptr,
                grad_logits_ptr,
                logits_ptr,
                n,
                o,
                n_samples,
                OUT,
                WINDOW,
                HAS_GRAD_DECISIONS,
                HAS_GRAD_LOGITS,
            )
            w_inside = (o < OUT)[:, None] & (k < K)[None, :]
            w1 = tl.load(w1_ptr + o[:, None] * K + w[None, :], mask=w_inside, other=0.0)
            dx = tl.dot(dlogits, w1, dx, input_precision="ieee")
        x_inside = (n < n_samples)[:, None] & (k < K)[None, :]
        x_at = n.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(dx_ptr + x_at, (dx * scale).to(dx_ptr.dtype.element_ty), mask=x_inside)
        first += BLOCK_N
    for o0 in range(0, OUT, BLOCK_O):
        o = o0 + tl.arange(0, BLOCK_O)
        dw1 = tl.zeros([BLOCK_O, BLOCK_K], dtype=tl.float32)
        db1 = tl.zeros([BLOCK_O], dtype=tl.float32)
        first = 0
        while first < n_samples:
            n = first + tl.arange(0, BLOCK_N)
            dlogits = _logit_gradient(
                grad_decisions_ptr,
                grad_logits_ptr,
                logits_ptr,
                n,
                o,
                n_samples,
                OUT,
                WINDOW,
                HAS_GRAD_DECISIONS,
                HAS_GRAD_LOGITS,
            )
            x = _fc1_inputs(x_ptr, n, k, n_samples, K)
            dw1 = tl.dot(tl.trans(dlogits), x, dw1, input_precision="ieee")
            db1 += tl.sum(dlogits, axis=0)
            first += BLOCK_N
        w_inside = (o < OUT)[:, None] & (k < K)[None, :]
        tl.store(dw1_ptr + o[:, None] * K + w[None, :], dw1, mask=w_inside)
        if block == 0:
            tl.store(db1_ptr + o, db1, mask=o < OUT)
