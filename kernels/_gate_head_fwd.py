"""Device code of the gate head's forward: see :mod:`fastgate.kernels.gate_head`."""

import triton
import triton.language as tl
from fastgate.kernels._device import last_to_finish, map_offsets


@triton.jit
def _threshold(logits):
    """1 where a logit > 0, else 0; nan stays nan, so that it never closes a gate silently."""
    return tl.where((logits > 0) | (logits <= 0), tl.where(logits > 0, 1.0, 0.0), logits)


@triton.jit
def batch_norm(h, mean, rstd, head, j, HIDDEN: tl.constexpr):
    """(normalised, scaled and shifted) rows of h [BN, BH] for hidden units j [BH]."""
    normal = (h - mean[None, :]) * rstd[None, :]
    z = normal
    if head.gamma_ptr is not None:
        z *= tl.load(head.gamma_ptr + j, mask=j < HIDDEN, other=0.0)[None, :]
    if head.beta_ptr is not None:
        z += tl.load(head.beta_ptr + j, mask=j < HIDDEN, other=0.0)[None, :]
    return normal, z


@triton.jit
def relu(z):
    """max(z, 0), where nan stays nan."""
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def _hidden_rows(partial_ptr, b1_ptr, n, j, inside, SPLITS: tl.constexpr, HIDDEN: tl.constexpr):
    """fc1's outputs [BN, BH] of samples n and units j: the sum of its partial sums in fixed order, plus its bias."""
    h = tl.zeros(inside.shape, dtype=tl.float32)
    if b1_ptr is not None:
        h += tl.load(b1_ptr + j, mask=j < HIDDEN, other=0.0)[None, :]
    for split in range(SPLITS):
        at = (n[:, None] * SPLITS + split) * HIDDEN + j[None, :]
        h += tl.load(partial_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
    return h


@triton.jit
def _store_decisions(
    results, head, h, mean, rstd, n, j, n_samples, HIDDEN: tl.constexpr, OUT: tl.constexpr, BLOCK_O: tl.constexpr
):
    """logits = relu(batch_norm(h)) @ w2.T + b2 and decisions = logits > 0 of samples n, from h [BN, BH]."""
    inside = (n < n_samples)[:, None] & (j < HIDDEN)[None, :]
    z = tl.where(inside, relu(batch_norm(h, mean, rstd, head, j, HIDDEN)[1]), 0.0)
    if OUT == 1:
        w2 = tl.load(head.w2_ptr + j, mask=j < HIDDEN, other=0.0)
        logits = tl.sum(z * w2[None, :], axis=1)
        if head.b2_ptr is not None:
            logits += tl.load(head.b2_ptr)
        tl.store(results.logits_ptr + n, logits, mask=n < n_samples)
        tl.store(results.decisions_ptr + n, _threshold(logits), mask=n < n_samples)
    else:
        for first_gate in range(0, OUT, BLOCK_O):
            o = first_gate + tl.arange(0, BLOCK_O)
            w2_inside = (o < OUT)[None, :] & (j < HIDDEN)[:, None]
            w2 = tl.load(head.w2_ptr + o[None, :] * HIDDEN + j[:, None], mask=w2_inside, other=0.0)
            logits = tl.dot(z, w2, input_precision="ieee")
            if head.b2_ptr is not None:
                logits += tl.load(head.b2_ptr + o, mask=o < OUT, other=0.0)[None, :]
            at = n[:, None] * OUT + o[None, :]
            out_inside = (n < n_samples)[:, None] & (o < OUT)[None, :]
            tl.store(results.logits_ptr + at, logits, mask=out_inside)
            tl.store(results.decisions_ptr + at, _threshold(logits), mask=out_inside)


@triton.jit
def _decide(
    results,
    partial_ptr,
    head,
    running,
    n_samples,
    momentum,
    eps,
    SPLITS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    TRAINING: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """From partial sums [N, SPLITS, HIDDEN] to decisions and logits [N, OUT], by one program.

    Nothing else runs meanwhile: if a tile holds all samples, they stay in registers, with a single wait for memory.
    """
    j = tl.arange(0, BLOCK_H)
    unit = j < HIDDEN
    n = tl.arange(0, BLOCK_N)
    if ONE_TILE:
        inside = (n < n_samples)[:, None] & unit[None, :]
        h = _hidden_rows(partial_ptr, head.b1_ptr, n, j, inside, SPLITS, HIDDEN)
        tl.store(results.hidden_ptr + n[:, None] * HIDDEN + j[None, :], h, mask=inside)
        mean = tl.sum(tl.where(inside, h, 0.0), axis=0) / n_samples
        d = tl.where(inside, h - mean[None, :], 0.0)
        squares = tl.sum(d * d, axis=0)
    else:
        # tile by tile: merge each tile's mean and squares with those of the previous samples
        mean = tl.zeros([BLOCK_H], dtype=tl.float32)
        squares = tl.zeros([BLOCK_H], dtype=tl.float32)
        # while, not range: loops with bounds known at run time fail in Triton 3.6's interpreter under NumPy 2.4
        first = 0
        while first < n_samples:
            inside = (first + n < n_samples)[:, None] & unit[None, :]
            h = _hidden_rows(partial_ptr, head.b1_ptr, first + n, j, inside, SPLITS, HIDDEN)
            tl.store(results.hidden_ptr + (first + n)[:, None] * HIDDEN + j[None, :], h, mask=inside)
            count = tl.minimum(n_samples - first, BLOCK_N)
            tile_mean = tl.sum(tl.where(inside, h, 0.0), axis=0) / count
            d = tl.where(inside, h - tile_mean[None, :], 0.0)
            step = tile_mean - mean
            squares += tl.sum(d * d, axis=0) + step * step * (first * (count / (first + count)))
            mean += step * (count / (first + count))
            first += BLOCK_N
    if TRAINING:
        var = squares / n_samples
        if running.mean_ptr is not None:
            old_mean = tl.load(running.mean_ptr + j, mask=unit, other=0.0)
            tl.store(running.mean_ptr + j, old_mean + momentum * (mean - old_mean), mask=unit)
            old_var = tl.load(running.var_ptr + j, mask=unit, other=0.0)
            unbiased = squares / (n_samples - 1)
            tl.store(running.var_ptr + j, old_var + momentum * (unbiased - old_var), mask=unit)
    else:
        mean = tl.load(running.mean_ptr + j, mask=unit, other=0.0)
        var = tl.load(running.var_ptr + j, mask=unit, other=1.0)
    rstd = 1.0 / tl.sqrt(var + eps)
    tl.store(results.mean_ptr + j, mean, mask=unit)
    tl.store(results.rstd_ptr + j, rstd, mask=unit)
    if ONE_TILE:
        _store_decisions(results, head, h, mean, rstd, n, j, n_samples, HIDDEN, OUT, BLOCK_O)
    else:
        # the code below reads hidden entries stored by other threads of this program
        tl.debug_barrier()
        first = 0
        while first < n_samples:
            inside = (first + n < n_samples)[:, None] & unit[None, :]
            h = tl.load(results.hidden_ptr + (first + n)[:, None] * HIDDEN + j[None, :], mask=inside, other=0.0)
            _store_decisions(results, head, h, mean, rstd, first + n, j, n_samples, HIDDEN, OUT, BLOCK_O)
            first += BLOCK_N


@triton.jit
def gate_head_fwd_kernel(
    results,
    partial_ptr,
    counter_ptr,
    x_ptr,
    head,
    running,
    n_samples,
    momentum,
    eps,
    C: tl.constexpr,
    HW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SPLITS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    TRAINING: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Means of x and their contribution to fc1, per program (sample, block of channels); the last program decides.

    partial[n, split, j] = sum over c of w1[j, c] * mean over p of x[n, c, p], c in the split's block.
    """
    n = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    c = split * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C, BLOCK_P], dtype=tl.float32)
    for first in range(0, HW, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        at = map_offsets(c, p, C, HW, CHANNELS_LAST)
        inside = (c < C)[:, None] & (p < HW)[None, :]
        total += tl.load(x_ptr + n * (C * HW) + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=1) / HW
    if results.features_ptr is not None:
        tl.store(results.features_ptr + n * C + c, mean, mask=c < C)
    j = tl.arange(0, BLOCK_H)
    w1_inside = (j < HIDDEN)[:, None] & (c < C)[None, :]
    w1 = tl.load(head.w1_ptr + j[:, None] * C + c[None, :], mask=w1_inside, other=0.0)
    h = tl.sum(w1 * mean[None, :], axis=1)
    tl.store(partial_ptr + (n * SPLITS + split) * HIDDEN + j, h, mask=j < HIDDEN)
    if last_to_finish(counter_ptr, n_samples * SPLITS):
        _decide(
            results, partial_ptr, head, running, n_samples, momentum, eps, SPLITS, HIDDEN, OUT, TRAINING, ONE_TILE,
            BLOCK_N, BLOCK_H, BLOCK_O,
        )  # fmt: skip
