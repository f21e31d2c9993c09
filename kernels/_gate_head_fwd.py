"""Device code of the gate head's forward: see :mod:`fastgate.kernels.gate_head`."""

import triton
import triton.language as tl


@triton.jit
def _threshold(logits):
    """1 where a logit > 0, else 0; nan stays nan, so that it is never closed without a word."""
    return tl.where((logits > 0) | (logits <= 0), tl.where(logits > 0, 1.0, 0.0), logits)


@triton.jit
def batch_norm(h, mean, rstd, gamma_ptr, beta_ptr, j, HIDDEN: tl.constexpr, AFFINE: tl.constexpr):
    """(normalised, scaled and shifted) rows of h [BN, BH] for hidden units j [BH]."""
    normal = (h - mean[None, :]) * rstd[None, :]
    if AFFINE:
        gamma = tl.load(gamma_ptr + j, mask=j < HIDDEN, other=0.0)
        beta = tl.load(beta_ptr + j, mask=j < HIDDEN, other=0.0)
        return normal, normal * gamma[None, :] + beta[None, :]
    return normal, normal


@triton.jit
def _add_partials(partial_ptr, b1_ptr, n, j, inside, SPLITS: tl.constexpr, HIDDEN: tl.constexpr, HAS_B1: tl.constexpr):
    """fc1's outputs [BN, BH] of samples n [BN] and units j [BH]: its bias plus the partial sums, in fixed order."""
    h = tl.zeros(inside.shape, dtype=tl.float32)
    if HAS_B1:
        h += tl.load(b1_ptr + j, mask=j < HIDDEN, other=0.0)[None, :]
    for s in range(SPLITS):
        at = (n[:, None] * SPLITS + s) * HIDDEN + j[None, :]
        # other programs stored them: bypass this multiprocessor's L1
        h += tl.load(partial_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
    return h


@triton.jit
def _decide(
    decisions_ptr,
    logits_ptr,
    hidden_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,
    running_mean_ptr,
    running_var_ptr,
    b1_ptr,
    gamma_ptr,
    beta_ptr,
    w2_ptr,
    b2_ptr,
    n_samples,
    momentum,
    eps,
    SPLITS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    TRAINING: tl.constexpr,
    HAS_RUNNING: tl.constexpr,
    AFFINE: tl.constexpr,
    HAS_B1: tl.constexpr,
    HAS_B2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """From partial sums [N, SPLITS, HIDDEN] to decisions and logits [N, OUT], by one program."""
    # while, not range: loops with bounds known at run time fail in Triton 3.6's interpreter under NumPy 2.4
    if DEPTH == 1:
        first = 0
        while first < n_samples:
            n = first + tl.arange(0, BLOCK_N)
            for j0 in range(0, HIDDEN, BLOCK_H):
                j = j0 + tl.arange(0, BLOCK_H)
                inside = (n < n_samples)[:, None] & (j < HIDDEN)[None, :]
                logits = _add_partials(partial_ptr, b1_ptr, n, j, inside, SPLITS, HIDDEN, HAS_B1)
                at = n[:, None] * HIDDEN + j[None, :]
                tl.store(logits_ptr + at, logits, mask=inside)
                tl.store(decisions_ptr + at, _threshold(logits), mask=inside)
            first += BLOCK_N
    else:
        j = tl.arange(0, BLOCK_H)
        total = tl.zeros([BLOCK_H], dtype=tl.float32)
        first = 0
        while first < n_samples:
            n = first + tl.arange(0, BLOCK_N)
            inside = (n < n_samples)[:, None] & (j < HIDDEN)[None, :]
            h = _add_partials(partial_ptr, b1_ptr, n, j, inside, SPLITS, HIDDEN, HAS_B1)
            tl.store(hidden_ptr + n[:, None] * HIDDEN + j[None, :], h, mask=inside)
            total += tl.sum(tl.where(inside, h, 0.0), axis=0)
            first += BLOCK_N
        # what follows reads hidden entries that other threads of this program stored
        tl.debug_barrier()
        if TRAINING:
            mean = total / n_samples
            squares = tl.zeros([BLOCK_H], dtype=tl.float32)
            first = 0
            while first < n_samples:
                n = first + tl.arange(0, BLOCK_N)
                inside = (n < n_samples)[:, None] & (j < HIDDEN)[None, :]
                h = tl.load(hidden_ptr + n[:, None] * HIDDEN + j[None, :], mask=inside, other=0.0)
                d = tl.where(inside, h - mean[None, :], 0.0)
                squares += tl.sum(d * d, axis=0)
                first += BLOCK_N
            var = squares / n_samples
            if HAS_RUNNING:
                old_mean = tl.load(running_mean_ptr + j, mask=j < HIDDEN, other=0.0)
                tl.store(running_mean_ptr + j, old_mean + momentum * (mean - old_mean), mask=j < HIDDEN)
                old_var = tl.load(running_var_ptr + j, mask=j < HIDDEN, other=0.0)
                unbiased = squares / (n_samples - 1)
                tl.store(running_var_ptr + j, old_var + momentum * (unbiased - old_var), mask=j < HIDDEN)
        else:
            mean = tl.load(running_mean_ptr + j, mask=j < HIDDEN, other=0.0)
            var = tl.load(running_var_ptr + j, mask=j < HIDDEN, other=1.0)
        rstd = 1.0 / tl.sqrt(var + eps)
        tl.store(mean_ptr + j, mean, mask=j < HIDDEN)
        tl.store(rstd_ptr + j, rstd, mask=j < HIDDEN)
        first = 0
        while first < n_samples:
            n = first + tl.arange(0, BLOCK_N)
            inside = (n < n_samples)[:, None] & (j < HIDDEN)[None, :]
            h = tl.load(hidden_ptr + n[:, None] * HIDDEN + j[None, :], mask=inside, other=0.0)
            _, z = batch_norm(h, mean, rstd, gamma_ptr, beta_ptr, j, HIDDEN, AFFINE)
            z = tl.where(inside & ~(z <= 0), z, 0.0)  # nan goes on
            for o0 in range(0, OUT, BLOCK_O):
                o = o0 + tl.arange(0, BLOCK_O)
                w_inside = (o < OUT)[None, :] & (j < HIDDEN)[:, None]
                w2 = tl.load(w2_ptr + o[None, :] * HIDDEN + j[:, None], mask=w_inside, other=0.0)
                logits = tl.dot(z, w2, input_precision="ieee")
                if HAS_B2:
                    logits += tl.load(b2_ptr + o, mask=o < OUT, other=0.0)[None, :]
                out_inside = (n < n_samples)[:, None] & (o < OUT)[None, :]
                at = n[:, None] * OUT + o[None, :]
                tl.store(logits_ptr + at, logits, mask=out_inside)
                tl.store(decisions_ptr + at, _threshold(logits), mask=out_inside)
            first += BLOCK_N


@triton.jit
def _last_to_finish(counter_ptr, programs):
    """Whether all other programs of the launch have finished their stores; the caller resets the counter."""
    # every thread's store before the count: Triton up to 3.8 does not order them by itself
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1


@triton.jit
def gate_head_fwd_pooled_kernel(
    decisions_ptr,
    logits_ptr,
    features_ptr,
    hidden_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,
    counter_ptr,
    running_mean_ptr,
    running_var_ptr,
    x_ptr,
    w1_ptr,
    b1_ptr,
    gamma_ptr,
    beta_ptr,
    w2_ptr,
    b2_ptr,
    n_samples,
    momentum,
    eps,
    C: tl.constexpr,
    HW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SPLITS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    TRAINING: tl.constexpr,
    HAS_RUNNING: tl.constexpr,
    AFFINE: tl.constexpr,
    HAS_B1: tl.constexpr,
    HAS_B2: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    # one program per (sample, block of channels): their means, and what they add to fc1's outputs
    n = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    c = split * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, HW, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        if CHANNELS_LAST:
            at = n * C * HW + p[None, :] * C + c[:, None]
        else:
            at = n * C * HW + c[:, None] * HW + p[None, :]
        x = tl.load(x_ptr + at, mask=(c < C)[:, None] & (p < HW)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(x, axis=1)
    mean = total / HW
    tl.store(features_ptr + n * C + c, mean, mask=c < C)
    for j0 in range(0, HIDDEN, BLOCK_H):
        j = j0 + tl.arange(0, BLOCK_H)
        w_inside = (j < HIDDEN)[:, None] & (c < C)[None, :]
        w1 = tl.load(w1_ptr + j[:, None] * C + c[None, :], mask=w_inside, other=0.0)
        h = tl.sum(w1 * mean[None, :], axis=1)
        tl.store(partial_ptr + (n * SPLITS + split) * HIDDEN + j, h, mask=j < HIDDEN)
    if _last_to_finish(counter_ptr, n_samples * SPLITS):
        _decide(
            decisions_ptr,
            logits_ptr,
            hidden_ptr,
            mean_ptr,
            rstd_ptr,
            partial_ptr,
            running_mean_ptr,
            running_var_ptr,
            b1_ptr,
            gamma_ptr,
            beta_ptr,
            w2_ptr,
            b2_ptr,
            n_samples,
            momentum,
            eps,
            SPLITS,
            HIDDEN,
            OUT,
            DEPTH,
            TRAINING,
            HAS_RUNNING,
            AFFINE,
            HAS_B1,
            HAS_B2,
            BLOCK_N,
            BLOCK_H,
            BLOCK_O,
        )
        tl.store(counter_ptr, 0)


@triton.jit
def gate_head_fwd_flat_kernel(
    decisions_ptr,
    logits_ptr,
    hidden_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,
    counter_ptr,
    running_mean_ptr,
    running_var_ptr,
    x_ptr,
    w1_ptr,
    b1_ptr,
    gamma_ptr,
    beta_ptr,
    w2_ptr,
    b2_ptr,
    n_samples,
    momentum,
    eps,
    C: tl.constexpr,
    HW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    TRAINING: tl.constexpr,
    HAS_RUNNING: tl.constexpr,
    AFFINE: tl.constexpr,
    HAS_B1: tl.constexpr,
    HAS_B2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    # one program per (block of samples, piece of the flattened features): a piece of x @ fc1.T
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    split = tl.program_id(1)
    for j0 in range(0, HIDDEN, BLOCK_H):
        j = j0 + tl.arange(0, BLOCK_H)
        total = tl.zeros([BLOCK_M, BLOCK_H], dtype=tl.float32)
        for start in range(0, SPLIT_K, BLOCK_K):
            # k runs in the order of x in memory, w is that place's column of fc1 (always c * HW + p)
            k = split * SPLIT_K + start + tl.arange(0, BLOCK_K)
            w = k
            if CHANNELS_LAST:
                w = (k % C) * HW + k // C
            k_inside = (k < C * HW) & (start + tl.arange(0, BLOCK_K) < SPLIT_K)
            x_at = m[:, None] * (C * HW) + k[None, :]
            x = tl.load(x_ptr + x_at, mask=(m < n_samples)[:, None] & k_inside[None, :], other=0.0).to(tl.float32)
            w_inside = (j < HIDDEN)[None, :] & k_inside[:, None]
            w1 = tl.load(w1_ptr + j[None, :] * (C * HW) + w[:, None], mask=w_inside, other=0.0)
            total = tl.dot(x, w1, total, input_precision="ieee")
        at = (m[:, None] * SPLITS + split) * HIDDEN + j[None, :]
        tl.store(partial_ptr + at, total, mask=(m < n_samples)[:, None] & (j < HIDDEN)[None, :])
    if _last_to_finish(counter_ptr, tl.num_programs(0) * SPLITS):
        _decide(
            decisions_ptr,
            logits_ptr,
            hidden_ptr,
            mean_ptr,
            rstd_ptr,
            partial_ptr,
            running_mean_ptr,
            running_var_ptr,
            b1_ptr,
            gamma_ptr,
            beta_ptr,
            w2_ptr,
            b2_ptr,
            n_samples,
            momentum,
            eps,
            SPLITS,
            HIDDEN,
            OUT,
            DEPTH,
            TRAINING,
            HAS_RUNNING,
            AFFINE,
            HAS_B1,
            HAS_B2,
            BLOCK_N,
            BLOCK_H,
            BLOCK_O,
        )
        tl.store(counter_ptr, 0)
