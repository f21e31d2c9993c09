"""Device code of the gated convolution, forward and backward by the input: see :mod:`fastgate.kernels.gated_conv`.

Both are one implicit matrix product. A tile is [pixels of one sample, channels] of the result; the inner loop walks
over (tap, open source channel) pairs, so what is closed is neither read nor multiplied.
"""

import triton
import triton.language as tl


@triton.jit
def channel_offset(c, PIXELS: tl.constexpr, LAST: tl.constexpr):
    """Elements from a sample's start to channel c at pixel 0."""
    return c if LAST else c * PIXELS


@triton.jit
def pixel_offset(p, C: tl.constexpr, LAST: tl.constexpr):
    """Elements from a channel's start to pixel p."""
    return p * C if LAST else p


@triton.jit
def gated_conv_kernel(
    dst_ptr,
    partial_ptr,
    src_ptr,
    weight_ptr,
    src_list_ptr,
    src_count_ptr,
    dst_list_ptr,
    dst_count_ptr,
    sample_list_ptr,
    sample_count_ptr,
    gate_ptr,
    gated_ptr,
    n_items,
    TRANSPOSED: tl.constexpr,
    C_DST: tl.constexpr,
    H_DST: tl.constexpr,
    W_DST: tl.constexpr,
    DST_LAST: tl.constexpr,
    C_SRC: tl.constexpr,
    H_SRC: tl.constexpr,
    W_SRC: tl.constexpr,
    SRC_LAST: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    W_DST_STRIDE: tl.constexpr,
    W_SRC_STRIDE: tl.constexpr,
    W_KH_STRIDE: tl.constexpr,
    W_KW_STRIDE: tl.constexpr,
    SRC_ROWS: tl.constexpr,
    DST_ROWS: tl.constexpr,
    HAS_SAMPLES: tl.constexpr,
    WRITE_CLOSED: tl.constexpr,
    NEEDS_DGATE: tl.constexpr,
    GATE_N_STRIDE: tl.constexpr,
    GATE_C_STRIDE: tl.constexpr,
    GATED_LAST: tl.constexpr,
    M_TILES: tl.constexpr,
    N_TILES: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dst = conv(src), or its transpose by the input.

    SRC_ROWS and DST_ROWS say whose list of open channels counts: "none" (all channels), "shared" (one list) or "each"
    (one per sample). With NEEDS_DGATE every dst channel is computed: partial gets the sums over a tile's pixels of
    dst * gated, and dst is then multiplied by its gate. Without WRITE_CLOSED, the memory of closed channels and of
    closed samples of dst stays as it was.

    The transpose of a strided convolution falls into STRIDE x STRIDE classes of result pixels, each a dense
    convolution with the taps that reach it.
    """
    CLASSES: tl.constexpr = STRIDE * STRIDE if TRANSPOSED else 1
    item = tl.program_id(0)
    while item < n_items:
        channel_tile = item % N_TILES
        pixel_tile = (item // N_TILES) % M_TILES
        pixel_class = (item // (N_TILES * M_TILES)) % CLASSES
        place = item // (N_TILES * M_TILES * CLASSES)
        sample = place
        if HAS_SAMPLES:
            sample = tl.load(sample_list_ptr + place)
        n = sample.to(tl.int64)

        # result pixels, the source pixel under each one's first tap, and the taps
        m = pixel_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        if TRANSPOSED:
            class_y = pixel_class // STRIDE
            class_x = pixel_class % STRIDE
            width = (W_DST - class_x + STRIDE - 1) // STRIDE
            width = tl.maximum(width, 1)  # a class may be empty: its pixels are all outside
            row = m // width
            column = m % width
            y = class_y + row * STRIDE
            x = class_x + column * STRIDE
            first_r = (class_y + PADDING) % STRIDE
            first_s = (class_x + PADDING) % STRIDE
            taps_r = (KH - first_r + STRIDE - 1) // STRIDE
            taps_s = (KW - first_s + STRIDE - 1) // STRIDE
            src_y = row + (class_y + PADDING) // STRIDE
            src_x = column + (class_x + PADDING) // STRIDE
            taps = taps_r * taps_s
        else:
            y = m // W_DST
            x = m % W_DST
            taps_s = KW
            src_y = y * STRIDE - PADDING
            src_x = x * STRIDE - PADDING
            taps = KH * KW
        inside = (y < H_DST) & (x < W_DST)

        # result channels
        j = channel_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        d = j
        computed = j < C_DST
        any_computed = True
        if DST_ROWS != "none":
            list_row = n * 0 if DST_ROWS == "shared" else n
            n_dst = tl.load(dst_count_ptr + list_row)
            d = tl.load(dst_list_ptr + list_row * C_DST + j, mask=j < C_DST, other=0)
            computed = j < n_dst
            any_computed = channel_tile * BLOCK_N < n_dst

        src_row = n * 0 if SRC_ROWS == "shared" else n
        n_src = C_SRC
        if SRC_ROWS != "none":
            n_src = tl.load(src_count_ptr + src_row)
        k_end = taps * n_src
        if DST_ROWS != "none":
            k_end = tl.where(any_computed, k_end, 0)
        if HAS_SAMPLES:
            n_samples = tl.load(sample_count_ptr)
            k_end = tl.where(place < n_samples, k_end, 0)

        src_start = src_ptr + n * (C_SRC * H_SRC * W_SRC)
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        k0 = 0
        while k0 < k_end:
            k = k0 + tl.arange(0, BLOCK_K)
            real = k < k_end
            tap = k // n_src
            c = k % n_src
            if SRC_ROWS != "none":
                c = tl.load(src_list_ptr + src_row * C_SRC + c, mask=real, other=0)
            r = tap // taps_s
            s = tap % taps_s
            if TRANSPOSED:
                yy = src_y[:, None] - r[None, :]
                xx = src_x[:, None] - s[None, :]
                r = first_r + r * STRIDE
                s = first_s + s * STRIDE
            else:
                yy = src_y[:, None] + r[None, :]
                xx = src_x[:, None] + s[None, :]
            on_map = (yy >= 0) & (yy < H_SRC) & (xx >= 0) & (xx < W_SRC)
            at = channel_offset(c, H_SRC * W_SRC, SRC_LAST)[None, :]
            at += pixel_offset(yy * W_SRC + xx, C_SRC, SRC_LAST)
            a = tl.load(src_start + at, mask=on_map & inside[:, None] & real[None, :], other=0.0)
            of_source = c * W_SRC_STRIDE + r * W_KH_STRIDE + s * W_KW_STRIDE
            b = tl.load(
                weight_ptr + of_source[:, None] + (d * W_DST_STRIDE)[None, :],
                mask=real[:, None] & computed[None, :],
                other=0.0,
            )
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            k0 += BLOCK_K

        written = C_DST
        if not WRITE_CLOSED:
            if DST_ROWS != "none":
                written = n_dst
            if HAS_SAMPLES:
                written = tl.where(place < n_samples, written, 0)
        stored = inside[:, None] & (j < written)[None, :]
        pixels = y * W_DST + x
        if NEEDS_DGATE:
            at = channel_offset(d, H_DST * W_DST, GATED_LAST)[None, :]
            at += pixel_offset(pixels, C_DST, GATED_LAST)[:, None]
            gated = tl.load(gated_ptr + n * (C_DST * H_DST * W_DST) + at, mask=stored, other=0.0).to(tl.float32)
            sums = tl.sum(tl.where(stored, acc * gated, 0.0), axis=0)
            tile = (n * CLASSES + pixel_class) * M_TILES + pixel_tile
            tl.store(partial_ptr + tile * C_DST + d, sums, mask=j < C_DST)
            gate = tl.load(gate_ptr + n * GATE_N_STRIDE + d * GATE_C_STRIDE, mask=j < C_DST, other=0.0)
            computed = computed & (gate != 0)
        acc = tl.where(computed[None, :], acc, 0.0)
        at = channel_offset(d, H_DST * W_DST, DST_LAST)[None, :]
        at += pixel_offset(pixels, C_DST, DST_LAST)[:, None]
        tl.store(dst_ptr + n * (C_DST * H_DST * W_DST) + at, acc.to(dst_ptr.dtype.element_ty), mask=stored)
        item += tl.num_programs(0)
