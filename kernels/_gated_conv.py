"""Device code of the gated convolution, forward and input gradient: see :mod:`fastgate.kernels.gated_conv`."""

from typing import NamedTuple

import triton
import triton.language as tl


class Map(NamedTuple):
    """Sizes of [N, C, H, W] feature maps and whether channels are innermost in memory; a compile-time argument."""

    channels: int
    height: int
    width: int
    last: bool


class Taps(NamedTuple):
    """A convolution's kernel size, stride and padding."""

    rows: int
    columns: int
    stride: int
    padding: int


class Strides(NamedTuple):
    """Strides of the weight, in elements, along output channels, input channels, rows and columns."""

    out: int
    channel: int
    row: int
    column: int


class Gate(NamedTuple):
    """Access to a gate [N or 1, C or 1]: its strides along samples and channels, and whether it has channels."""

    sample: int
    channel: int
    per_channel: bool


class Tile(NamedTuple):
    """Tile sizes of a program, and its use of `tl.dot`: whether operands are upcast to fp32, and the precision."""

    m: int
    n: int
    k: int
    upcast: bool
    precision: str


@triton.jit
def map_offset(pixel, c, MAP: tl.constexpr):
    """Offset of a pixel of channel c from the start of its sample."""
    return pixel * MAP.channels + c if MAP.last else pixel + c * (MAP.height * MAP.width)


@triton.jit
def open_channels(gate_ptr, n, c, C: tl.constexpr, GATE: tl.constexpr):
    """Mask of the channels c of sample n that exist and are open."""
    opened = c < C
    if GATE is not None:
        opened = tl.load(gate_ptr + n * GATE.sample + c * GATE.channel, mask=opened, other=0.0) != 0
    return opened


@triton.jit
def any_open(gate_ptr, n, c, C: tl.constexpr, GATE: tl.constexpr):
    """Whether any of the channels c of sample n is open."""
    if GATE is None:
        result = True
    elif GATE.per_channel:
        result = tl.max(open_channels(gate_ptr, n, c, C, GATE).to(tl.int32), axis=0) > 0
    else:
        result = tl.load(gate_ptr + n * GATE.sample) != 0
    return result


@triton.jit
def zero_closed(values, opened):
    """Values where open, zero elsewhere, by masking bits, so that nan and infinity become 0 and pairs stay packed."""
    if values.dtype == tl.float32:
        kept = values.to(tl.int32, bitcast=True) & -opened.to(tl.int32)
    else:
        kept = values.to(tl.int16, bitcast=True) & -opened.to(tl.int16)
    return kept.to(values.dtype, bitcast=True)


@triton.jit
def gated_conv_kernel(
    dst_ptr,
    partial_ptr,
    src_ptr,
    weight_ptr,
    src_gate_ptr,
    dst_gate_ptr,
    factor_ptr,
    SRC: tl.constexpr,
    DST: tl.constexpr,
    FACTOR: tl.constexpr,
    TAPS: tl.constexpr,
    WEIGHT: tl.constexpr,
    SRC_GATE: tl.constexpr,
    DST_GATE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WRITE_CLOSED: tl.constexpr,
    TILE: tl.constexpr,
):
    """dst = conv(src * src_gate) * dst_gate, or with TRANSPOSED its transpose, the input gradient::

        dst[n, d, y, x] = dst_gate[n, d] * sum over r, s, c of
            src_gate[n, c] * src[n, c, y * stride + r - padding, x * stride + s - padding] * weight[d, c, r, s]

    A program computes [TILE.m pixels of one sample, TILE.n channels]; each step of its loop handles one tap and TILE.k
    source channels. Closed source channels are loaded with their vectors and zeroed in registers, whatever they
    contain. A program multiplies nothing if its sample, all source channels or all its own channels are closed.
    Without WRITE_CLOSED, closed outputs are not written.

    With FACTOR (the map of factor_ptr) every dst channel is computed, and partial[n, tile, d] gets the sum over a
    tile's pixels of dst * factor before the gate: the gradient of dst_gate.

    The transpose of a strided convolution consists of stride x stride classes of pixels, each a dense convolution with
    the taps that reach it.
    """
    CLASSES: tl.constexpr = TAPS.stride * TAPS.stride if TRANSPOSED else 1
    M_TILES: tl.constexpr = (
        ((DST.height + TAPS.stride - 1) // TAPS.stride * ((DST.width + TAPS.stride - 1) // TAPS.stride) + TILE.m - 1)
        // TILE.m
        if TRANSPOSED
        else (DST.height * DST.width + TILE.m - 1) // TILE.m
    )
    N_TILES: tl.constexpr = (DST.channels + TILE.n - 1) // TILE.n
    K_TILES: tl.constexpr = (SRC.channels + TILE.k - 1) // TILE.k
    item = tl.program_id(0)
    n_tile = item % N_TILES
    m_tile = (item // N_TILES) % M_TILES
    pixel_class = (item // (N_TILES * M_TILES)) % CLASSES
    n = (item // (N_TILES * M_TILES * CLASSES)).to(tl.int64)

    # the tile's pixels, and the source pixel under each one's first tap
    m = m_tile * TILE.m + tl.arange(0, TILE.m)
    if TRANSPOSED:
        class_y = pixel_class // TAPS.stride
        class_x = pixel_class % TAPS.stride
        # a class may be empty: all its pixels are outside
        width = tl.maximum((DST.width - class_x + TAPS.stride - 1) // TAPS.stride, 1)
        y = class_y + m // width * TAPS.stride
        x = class_x + m % width * TAPS.stride
        src_y = m // width + (class_y + TAPS.padding) // TAPS.stride
        src_x = m % width + (class_x + TAPS.padding) // TAPS.stride
        first_r = (class_y + TAPS.padding) % TAPS.stride
        first_s = (class_x + TAPS.padding) % TAPS.stride
        ROWS: tl.constexpr = (TAPS.rows + TAPS.stride - 1) // TAPS.stride
        COLUMNS: tl.constexpr = (TAPS.columns + TAPS.stride - 1) // TAPS.stride
    else:
        y = m // DST.width
        x = m % DST.width
        src_y = y * TAPS.stride - TAPS.padding
        src_x = x * TAPS.stride - TAPS.padding
        ROWS: tl.constexpr = TAPS.rows
        COLUMNS: tl.constexpr = TAPS.columns
    inside = (y < DST.height) & (x < DST.width)

    d = n_tile * TILE.n + tl.arange(0, TILE.n)
    opened = open_channels(dst_gate_ptr, n, d, DST.channels, DST_GATE)

    all_c = tl.arange(0, triton.next_power_of_2(SRC.channels))
    busy = any_open(src_gate_ptr, n, all_c, SRC.channels, SRC_GATE)
    if FACTOR is None:
        busy = busy & any_open(dst_gate_ptr, n, d, DST.channels, DST_GATE)
    if TRANSPOSED and TAPS.stride > 1:
        busy = busy & (first_r < TAPS.rows) & (first_s < TAPS.columns)

    TILE_M: tl.constexpr = TILE.m  # Triton 3.6 rejects fields in a shape, which it sees as plain numbers
    TILE_N: tl.constexpr = TILE.n
    acc = tl.zeros([TILE_M, TILE_N], dtype=tl.float32)
    src_pixel = src_y * SRC.width + src_x
    src_start = src_ptr + n * (SRC.channels * SRC.height * SRC.width)
    if busy:
        for step in range(ROWS * COLUMNS * K_TILES):
            tap = step // K_TILES
            c = (step % K_TILES) * TILE.k + tl.arange(0, TILE.k)
            r = tap // COLUMNS
            s = tap % COLUMNS
            there = c < SRC.channels
            if TRANSPOSED:
                yy = src_y - r
                xx = src_x - s
                pixel = src_pixel - (r * SRC.width + s)
                r = first_r + r * TAPS.stride
                s = first_s + s * TAPS.stride
                if TAPS.stride > 1:
                    # not `there & (r < ...)`: Triton 3.9's interpreter rejects masks made from a scalar comparison
                    there = c < tl.where((r < TAPS.rows) & (s < TAPS.columns), SRC.channels, 0)
            else:
                yy = src_y + r
                xx = src_x + s
                pixel = src_pixel + (r * SRC.width + s)
            on_map = inside & (yy >= 0) & (yy < SRC.height) & (xx >= 0) & (xx < SRC.width)
            at = map_offset(pixel[:, None], c[None, :], SRC)
            a = tl.load(src_start + at, mask=on_map[:, None] & there[None, :], other=0.0)
            of_tap = r * WEIGHT.row + s * WEIGHT.column
            at = of_tap + c[:, None] * (WEIGHT.out if TRANSPOSED else WEIGHT.channel)
            at += d[None, :] * (WEIGHT.channel if TRANSPOSED else WEIGHT.out)
            b = tl.load(weight_ptr + at, mask=there[:, None] & (d < DST.channels)[None, :], other=0.0)
            if TILE.upcast:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            if SRC_GATE is not None and SRC_GATE.per_channel:
                a = zero_closed(a, open_channels(src_gate_ptr, n, c, SRC.channels, SRC_GATE)[None, :])
            acc = tl.dot(a, b, acc, input_precision=TILE.precision)

    pixel = y * DST.width + x
    stored = inside[:, None] & (opened if not WRITE_CLOSED else d < DST.channels)[None, :]
    dst_start = n * (DST.channels * DST.height * DST.width)
    if FACTOR is not None:
        there = inside[:, None] & (d < DST.channels)[None, :]
        factor = tl.load(factor_ptr + dst_start + map_offset(pixel[:, None], d[None, :], FACTOR), mask=there, other=0.0)
        sums = tl.sum(tl.where(there, acc * factor.to(tl.float32), 0.0), axis=0)
        tile = (n * CLASSES + pixel_class) * M_TILES + m_tile
        tl.store(partial_ptr + tile * DST.channels + d, sums, mask=d < DST.channels)
    acc = tl.where(opened[None, :], acc, 0.0)
    at = dst_start + map_offset(pixel[:, None], d[None, :], DST)
    tl.store(dst_ptr + at, acc.to(dst_ptr.dtype.element_ty), mask=stored)
