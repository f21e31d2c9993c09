"""Convolutions that skip what gates have closed: launchers of the forward and of both gradients.

A gate reaches the kernels as lists (:mod:`fastgate.kernels.open_lists`): of a sample's open channels, or of the open
samples. Lists have one row for the whole batch or one per sample. Nothing waits for the host, and no grid depends on
what is open: a fixed number of programs goes round the tiles, and closed ones only write zeros, if anything.
"""

from typing import Any

import torch
import triton
from fastgate.kernels import _turing
from fastgate.kernels._gated_conv import gated_conv_kernel
from fastgate.kernels._gated_conv_wgrad import gated_conv_wgrad_kernel
from fastgate.kernels._launch import INTERPRETED, counter, is_channels_last, next_power_of_2
from torch import Tensor

_PROGRAMS = 2048  # a few rounds of every GPU's multiprocessors
_WGRAD_PROGRAMS = 256


def gated_conv_fwd(
    x: Tensor,
    weight: Tensor,
    in_list: Tensor | None,
    in_count: Tensor | None,
    out_list: Tensor | None,
    out_count: Tensor | None,
    sample_list: Tensor | None,
    sample_count: Tensor | None,
    stride: int,
    padding: int,
    write_closed: bool,
) -> Tensor:
    """y [N, C_out, H', W'] in the layout and dtype of x.

    Where an output channel or a sample is closed y is zero, or with `write_closed` False whatever was in its memory.
    """
    height, width = x.shape[2:]
    kh, kw = weight.shape[2:]
    size = ((height + 2 * padding - kh) // stride + 1, (width + 2 * padding - kw) // stride + 1)
    y = _empty_map(x, weight.shape[0], *size)
    _launch(
        y, x, weight, (0, 1), (in_list, in_count), (out_list, out_count), (sample_list, sample_count), stride, padding,
        transposed=False, write_closed=write_closed,
    )  # fmt: skip
    return y


def gated_conv_dgrad(
    dy: Tensor,
    weight: Tensor,
    x: Tensor,
    in_gate: Tensor | None,
    in_list: Tensor | None,
    in_count: Tensor | None,
    out_list: Tensor | None,
    out_count: Tensor | None,
    sample_list: Tensor | None,
    sample_count: Tensor | None,
    stride: int,
    padding: int,
) -> tuple[Tensor, Tensor]:
    """(dx like x, zero where an input channel or a sample is closed; gradient of a gate per sample and channel).

    With `in_gate` [N or 1, C or 1] the gradient is computed for closed channels too, fp32 [N, C]; it is empty
    otherwise.
    """
    dx = torch.empty_like(x)
    dgate = _launch(
        dx, dy, weight, (1, 0), (out_list, out_count), (in_list, in_count), (sample_list, sample_count), stride,
        padding, transposed=True, gate=in_gate, gated=x,
    )  # fmt: skip
    return dx, dgate


def gated_conv_wgrad(
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    in_list: Tensor | None,
    in_count: Tensor | None,
    out_list: Tensor | None,
    out_count: Tensor | None,
    out_gate: Tensor | None,
    sample_list: Tensor | None,
    sample_count: Tensor | None,
    stride: int,
    padding: int,
) -> Tensor:
    """dweight like `weight`.

    `in_list` and `out_list` have one row. `sample_list` has one row, or one per input channel (then without `in_list`).
    `out_gate` [N, C_out], contiguous, is for output channels that differ from sample to sample.
    """
    n, c_in, h_in, w_in = x.shape
    if n == 0:
        return torch.zeros_like(weight)  # gates per sample have no row to read
    c_out, _, kh, kw = weight.shape
    h_out, w_out = dy.shape[2:]
    taps = kh * kw
    each = sample_list is not None and sample_list.shape[0] > 1
    channels_per_tile = 1 if each else min(max(1, 64 // taps), c_in)
    plan, block_k, precision = _dot_plan(x)
    # spills on sm_75's tensor cores: 64 by 64 (24 bytes, Triton 3.6), with a list of samples 32 by 64 (8 bytes, 3.8)
    largest = (32 if sample_list is None else 16) if plan.options else 32 if out_list is not None else 64
    block_m = next_power_of_2(c_out, 16, largest)
    block_n = next_power_of_2(channels_per_tile * taps, 16)
    out_tiles, in_tiles = triton.cdiv(c_out, block_m), triton.cdiv(c_in, channels_per_tile)
    steps = triton.cdiv(n * h_out * w_out, block_k)
    splits = max(1, min(_WGRAD_PROGRAMS // (out_tiles * in_tiles), steps // 4))
    dw = torch.empty_like(weight)
    partial = x.new_empty(out_tiles * in_tiles * splits * block_m * block_n if splits > 1 else 0, dtype=torch.float32)
    gated_conv_wgrad_kernel[(out_tiles, in_tiles, splits)](
        dw,
        partial,
        counter(x.device, out_tiles * in_tiles),
        x,
        dy,
        *(dw if t is None else t for t in (in_list, in_count, out_list, out_count, out_gate)),
        *(dw if t is None else t for t in (sample_list, sample_count)),
        n,
        C_IN=c_in,
        H_IN=h_in,
        W_IN=w_in,
        X_LAST=is_channels_last(x),
        C_OUT=c_out,
        H_OUT=h_out,
        W_OUT=w_out,
        DY_LAST=is_channels_last(dy),
        KH=kh,
        KW=kw,
        STRIDE=stride,
        PADDING=padding,
        W_OUT_STRIDE=dw.stride(0),
        W_IN_STRIDE=dw.stride(1),
        W_KH_STRIDE=dw.stride(2),
        W_KW_STRIDE=dw.stride(3),
        IN_LIST=in_list is not None,
        OUT_ROWS="each" if out_gate is not None else "none" if out_list is None else "shared",
        SAMPLES="each" if each else "none" if sample_list is None else "shared",
        SPLITS=splits,
        CHANNELS_PER_TILE=channels_per_tile,
        UPCAST=plan.upcast,
        PRECISION=precision,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
        **plan.options,
    )
    return dw


def _launch(
    dst: Tensor,
    src: Tensor,
    weight: Tensor,
    channel_dims: tuple[int, int],
    src_lists: tuple[Tensor | None, Tensor | None],
    dst_lists: tuple[Tensor | None, Tensor | None],
    sample_lists: tuple[Tensor | None, Tensor | None],
    stride: int,
    padding: int,
    *,
    transposed: bool,
    write_closed: bool = True,
    gate: Tensor | None = None,
    gated: Tensor | None = None,
) -> Tensor:
    """One convolution into `dst`; `channel_dims` are the weight's dimensions of dst and src channels.

    Returns the gradient of `gate`, fp32 [N, C_dst], or an empty tensor.
    """
    n, c_dst, h_dst, w_dst = dst.shape
    _, c_src, h_src, w_src = src.shape
    classes = stride * stride if transposed else 1
    pixels = triton.cdiv(h_dst, stride) * triton.cdiv(w_dst, stride) if transposed else h_dst * w_dst
    plan, block_k, precision = _dot_plan(src)
    # a tile is skipped where no channel of it is open: smaller ones skip more
    block_n = next_power_of_2(c_dst, 16, 64 if dst_lists[0] is None else 32)
    # 128 pixels by 64 channels spill on sm_80 (200 bytes); fp32 products take more registers
    block_m = next_power_of_2(pixels, 16, 64 if block_n == 64 or plan.upcast or src.dtype == torch.float32 else 128)
    m_tiles, n_tiles = triton.cdiv(pixels, block_m), triton.cdiv(c_dst, block_n)
    items = n * classes * m_tiles * n_tiles
    partial = dst.new_empty((n, classes * m_tiles, c_dst) if gate is not None else (0,), dtype=torch.float32)
    gated_conv_kernel[(min(items, _PROGRAMS),)](
        dst,
        partial,
        src,
        weight,
        *(dst if t is None else t for t in (*src_lists, *dst_lists, *sample_lists, gate, gated)),
        items,
        TRANSPOSED=transposed,
        C_DST=c_dst,
        H_DST=h_dst,
        W_DST=w_dst,
        DST_LAST=is_channels_last(dst),
        C_SRC=c_src,
        H_SRC=h_src,
        W_SRC=w_src,
        SRC_LAST=is_channels_last(src),
        KH=weight.shape[2],
        KW=weight.shape[3],
        STRIDE=stride,
        PADDING=padding,
        W_DST_STRIDE=weight.stride(channel_dims[0]),
        W_SRC_STRIDE=weight.stride(channel_dims[1]),
        W_KH_STRIDE=weight.stride(2),
        W_KW_STRIDE=weight.stride(3),
        SRC_ROWS=_rows(src_lists[0]),
        DST_ROWS=_rows(dst_lists[0]),
        HAS_SAMPLES=sample_lists[0] is not None,
        WRITE_CLOSED=write_closed,
        NEEDS_DGATE=gate is not None,
        GATE_N_STRIDE=0 if gate is None or gate.shape[0] == 1 else gate.stride(0),
        GATE_C_STRIDE=0 if gate is None or gate.shape[1] == 1 else gate.stride(1),
        GATED_LAST=gated is not None and is_channels_last(gated),
        M_TILES=m_tiles,
        N_TILES=n_tiles,
        UPCAST=plan.upcast,
        PRECISION=precision,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
        **plan.options,
    )
    return partial.sum(1) if gate is not None else partial


def _rows(lists: Tensor | None) -> str:
    if lists is None:
        return "none"
    return "shared" if lists.shape[0] == 1 else "each"


def _empty_map(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    size = (like.shape[0], channels, height, width)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


def _dot_plan(x: Tensor) -> tuple[Any, int, str]:
    """(how to call `tl.dot`, its K, its precision): TF32 only where PyTorch's switch for convolutions allows it."""
    plan = _turing.plan_dot(x.device, x.dtype)
    if INTERPRETED and x.dtype == torch.bfloat16:
        plan = plan._replace(upcast=True)  # the interpreter computes garbage from raw bf16
    allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"
    fp32 = plan.upcast or x.dtype == torch.float32
    tf32 = allowed and x.dtype == torch.float32 and _turing.capability(x.device) >= 80
    return plan, 16 if fp32 else 32, "tf32" if tf32 else "ieee"
