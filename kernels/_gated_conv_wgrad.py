"""Device code of the gated convolution's weight gradient: see :mod:`fastgate.kernels.gated_conv`."""

import triton
import triton.language as tl
from fastgate.kernels._gated_conv import channel_offset, pixel_offset


@triton.jit
def gated_conv_wgrad_kernel(
    dw_ptr,
    partial_ptr,
    counter_ptr,
    x_ptr,
    dy_ptr,
    in_list_ptr,
    in_count_ptr,
    out_list_ptr,
    out_count_ptr,
    out_gate_ptr,
    sample_list_ptr,
    sample_count_ptr,
    n_samples,
    C_IN: tl.constexpr,
    H_IN: tl.constexpr,
    W_IN: tl.constexpr,
    X_LAST: tl.constexpr,
    C_OUT: tl.constexpr,
    H_OUT: tl.constexpr,
    W_OUT: tl.constexpr,
    DY_LAST: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    W_OUT_STRIDE: tl.constexpr,
    W_IN_STRIDE: tl.constexpr,
    W_KH_STRIDE: tl.constexpr,
    W_KW_STRIDE: tl.constexpr,
    IN_LIST: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    SAMPLES: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS_PER_TILE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dw [C_OUT, C_IN, KH, KW] as a product of dy [output channels, pixels] and x [pixels, (input channel, tap)].

    The pixels are those of the open samples: SAMPLES is "none" (all), "shared" (one list) or "each" (one list per input
    channel, of the samples where it is open; a tile then holds one channel). OUT_ROWS is "none", "shared" (a list of
    the output channels) or "each" (a gate per sample and channel: what is closed is not read, but takes its place in
    the product). Programs take turns with the pixels; the last one of a tile adds their sums in a fixed order.
    """
    TAPS: tl.constexpr = KH * KW
    PIXELS: tl.constexpr = H_OUT * W_OUT
    out_tile = tl.program_id(0)
    in_tile = tl.program_id(1)
    split = tl.program_id(2)

    column = tl.arange(0, BLOCK_N)
    i = in_tile * CHANNELS_PER_TILE + column // TAPS
    tap = column % TAPS
    exists = (column < CHANNELS_PER_TILE * TAPS) & (i < C_IN)
    ci = i
    in_open = exists
    k_end = n_samples * PIXELS
    if IN_LIST:
        n_in = tl.load(in_count_ptr)
        ci = tl.load(in_list_ptr + i, mask=exists, other=0)
        in_open = exists & (i < n_in)
        k_end = tl.where(in_tile * CHANNELS_PER_TILE < n_in, k_end, 0)
    list_row = 0
    if SAMPLES == "each":
        list_row = in_tile
    if SAMPLES != "none":
        k_end = tl.minimum(k_end, tl.load(sample_count_ptr + list_row) * PIXELS)

    o = out_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    co = o
    out_open = o < C_OUT
    if OUT_ROWS == "shared":
        n_out = tl.load(out_count_ptr)
        co = tl.load(out_list_ptr + o, mask=o < C_OUT, other=0)
        out_open = o < n_out
        k_end = tl.where(out_tile * BLOCK_M < n_out, k_end, 0)

    r = tap // KW
    s = tap % KW
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    k0 = split * BLOCK_K
    while k0 < k_end:
        k = k0 + tl.arange(0, BLOCK_K)
        real = k < k_end
        place = k // PIXELS
        pixel = k % PIXELS
        n = place
        if SAMPLES != "none":
            n = tl.load(sample_list_ptr + list_row * n_samples + place, mask=real, other=0)
        n = n.to(tl.int64)
        at = channel_offset(co, PIXELS, DY_LAST)[:, None]
        at = at + (n * (C_OUT * PIXELS) + pixel_offset(pixel, C_OUT, DY_LAST))[None, :]
        wanted = out_open[:, None] & real[None, :]
        if OUT_ROWS == "each":
            gate = tl.load(out_gate_ptr + n[None, :] * C_OUT + co[:, None], mask=wanted, other=0.0)
            wanted = wanted & (gate != 0)
        a = tl.load(dy_ptr + at, mask=wanted, other=0.0)
        yy = (pixel // W_OUT * STRIDE - PADDING)[:, None] + r[None, :]
        xx = (pixel % W_OUT * STRIDE - PADDING)[:, None] + s[None, :]
        on_map = (yy >= 0) & (yy < H_IN) & (xx >= 0) & (xx < W_IN)
        at = channel_offset(ci, H_IN * W_IN, X_LAST)[None, :] + (n * (C_IN * H_IN * W_IN))[:, None]
        at += pixel_offset(yy * W_IN + xx, C_IN, X_LAST)
        b = tl.load(x_ptr + at, mask=on_map & real[:, None] & in_open[None, :], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        k0 += SPLITS * BLOCK_K

    target = dw_ptr + (co * W_OUT_STRIDE)[:, None]
    target = target + (ci * W_IN_STRIDE + r * W_KH_STRIDE + s * W_KW_STRIDE)[None, :]
    stored = (o < C_OUT)[:, None] & exists[None, :]
    if SPLITS == 1:
        tl.store(target, acc.to(dw_ptr.dtype.element_ty), mask=stored)
    else:
        tile = out_tile * tl.num_programs(1) + in_tile
        within = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + column[None, :]
        tl.store(partial_ptr + (tile * SPLITS + split).to(tl.int64) * (BLOCK_M * BLOCK_N) + within, acc)
        # every thread's store before the count: Triton up to 3.8 does not order them by itself
        tl.debug_barrier()
        done = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if done == SPLITS - 1:
            total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            part = 0
            while part < SPLITS:
                at = (tile * SPLITS + part).to(tl.int64) * (BLOCK_M * BLOCK_N) + within
                # other programs stored them: bypass this multiprocessor's L1
                total += tl.load(partial_ptr + at, cache_modifier=".cg")
                part += 1
            tl.store(target, total.to(dw_ptr.dtype.element_ty), mask=stored)
            tl.store(counter_ptr + tile, 0)
