"""Device code of the gated convolution's weight gradient: see :mod:`fastgate.kernels.gated_conv`."""

import triton
import triton.language as tl
from fastgate.kernels._gated_conv import any_open, map_offset, open_channels, zero_closed


@triton.jit
def next_open(
    n,
    end,
    in_gate_ptr,
    out_gate_ptr,
    c,
    d,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    IN_GATE: tl.constexpr,
    OUT_GATE: tl.constexpr,
):
    """The first sample from n on with open channels in both c and d, or `end`.

    It is a separate loop: a branch around the product would move the sums through shared memory at every sample.
    """
    if IN_GATE is not None or OUT_GATE is not None:
        searching = n < end
        while searching:
            found = any_open(in_gate_ptr, n, c, C_IN, IN_GATE) & any_open(out_gate_ptr, n, d, C_OUT, OUT_GATE)
            n += tl.where(found, 0, 1)
            searching = (n < end) & (found == 0)
    return n


@triton.jit
def gated_conv_wgrad_kernel(
    dw_ptr,
    partial_ptr,
    counter_ptr,
    x_ptr,
    dy_ptr,
    in_gate_ptr,
    out_gate_ptr,
    n_samples,
    samples_per_split,
    X: tl.constexpr,
    DY: tl.constexpr,
    TAPS: tl.constexpr,
    WEIGHT: tl.constexpr,
    IN_GATE: tl.constexpr,
    OUT_GATE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """The gradient of weight[d, c, r, s]::

        dw[d, c, r, s] = sum over n, y, x of out_gate[n, d] * dy[n, d, y, x]
            * in_gate[n, c] * x[n, c, y * stride + r - padding, x * stride + s - padding]

    A matrix product over pixels: a tile is [TILE.m columns (r, s, c), TILE.n output channels], c innermost and padded
    to a multiple of 8, so that vectors of channels are read; each step handles TILE.k pixels of one sample. Closed
    values are zeroed in registers, whatever they contain, and a sample that closes the whole tile on either side is
    skipped. A split handles consecutive samples; the last program of a tile to finish adds the splits in order.
    """
    UNITS: tl.constexpr = (X.channels + 7) // 8
    PIXELS: tl.constexpr = DY.height * DY.width
    m_tile = tl.program_id(0)
    n_tile = tl.program_id(1)
    split = tl.program_id(2)

    # in units of 8 columns, which are then known to share a tap
    column = m_tile * TILE.m + tl.arange(0, TILE.m)
    tap = column // 8 // UNITS
    c = column // 8 % UNITS * 8 + column % 8
    r = tap // TAPS.columns
    s = tap % TAPS.columns
    exists = (r < TAPS.rows) & (c < X.channels)  # there is nothing past the last tap
    of_column = map_offset((r - TAPS.padding) * X.width + s - TAPS.padding, c, X)
    d = n_tile * TILE.n + tl.arange(0, TILE.n)

    TILE_M: tl.constexpr = TILE.m  # Triton 3.6 rejects fields in a shape, which it sees as plain numbers
    TILE_N: tl.constexpr = TILE.n
    acc = tl.zeros([TILE_M, TILE_N], dtype=tl.float32)
    n = (split * samples_per_split).to(tl.int64)
    end = tl.minimum(n + samples_per_split, n_samples)
    n = next_open(n, end, in_gate_ptr, out_gate_ptr, c, d, X.channels, DY.channels, IN_GATE, OUT_GATE)
    while n < end:
        c_opened = open_channels(in_gate_ptr, n, c, X.channels, IN_GATE)
        d_opened = open_channels(out_gate_ptr, n, d, DY.channels, OUT_GATE)
        x_start = x_ptr + n * (X.channels * X.height * X.width)
        dy_start = dy_ptr + n * (DY.channels * PIXELS)
        for step in range((PIXELS + TILE.k - 1) // TILE.k):
            pixel = step * TILE.k + tl.arange(0, TILE.k)
            y = pixel // DY.width * TAPS.stride
            x = pixel % DY.width * TAPS.stride
            yy = y[:, None] + (r - TAPS.padding)[None, :]
            xx = x[:, None] + (s - TAPS.padding)[None, :]
            there = (pixel < PIXELS)[:, None] & exists[None, :]
            on_map = there & (yy >= 0) & (yy < X.height) & (xx >= 0) & (xx < X.width)
            at = map_offset(y * X.width + x, 0, X)[:, None] + of_column[None, :]
            a = tl.load(x_start + at, mask=on_map, other=0.0)
            there = (pixel < PIXELS)[:, None] & (d < DY.channels)[None, :]
            b = tl.load(dy_start + map_offset(pixel[:, None], d[None, :], DY), mask=there, other=0.0)
            if TILE.upcast:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            if IN_GATE is not None and IN_GATE.per_channel:
                a = zero_closed(a, c_opened[None, :])
            if OUT_GATE is not None and OUT_GATE.per_channel:
                b = zero_closed(b, d_opened[None, :])
            acc = tl.dot(tl.trans(a), b, acc, input_precision=TILE.precision)
        n = next_open(n + 1, end, in_gate_ptr, out_gate_ptr, c, d, X.channels, DY.channels, IN_GATE, OUT_GATE)

    of_column = c * WEIGHT.channel + r * WEIGHT.row + s * WEIGHT.column
    target = dw_ptr + of_column[:, None] + (d * WEIGHT.out)[None, :]
    stored = exists[:, None] & (d < DY.channels)[None, :]
    if IS_SPLIT:
        splits = tl.num_programs(2)
        tile = m_tile * tl.num_programs(1) + n_tile
        within = tl.arange(0, TILE.m)[:, None] * TILE.n + tl.arange(0, TILE.n)[None, :]
        first = partial_ptr + (tile * splits).to(tl.int64) * (TILE.m * TILE.n) + within
        tl.store(first + split * (TILE.m * TILE.n), acc)
        # orders every thread's stores before the count, which Triton up to 3.8 does not do by itself
        tl.debug_barrier()
        done = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if done == splits - 1:
            acc = tl.zeros([TILE_M, TILE_N], dtype=tl.float32)
            part = 0
            while part < splits:
                for ahead in tl.static_range(4):  # serialized loads would dominate the time here
                    # stored by other programs: bypass this multiprocessor's L1
                    at = first + (part + ahead) * (TILE.m * TILE.n)
                    # compared as a block: Triton 3.9's interpreter rejects masks made from a scalar comparison
                    there = tl.full([TILE_M, TILE_N], part + ahead, tl.int32) < splits
                    acc += tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
                part += 4
            tl.store(target, acc.to(dw_ptr.dtype.element_ty), mask=stored)
            tl.store(counter_ptr + tile, 0)
    else:
        tl.store(target, acc.to(dw_ptr.dtype.element_ty), mask=stored)
