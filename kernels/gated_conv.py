"""Launchers of convolutions that skip closed channels and samples: forward and both gradients.

Gates are [N or 1, C or 1] and are passed to the kernels unchanged. A tile is dense; closed values in it are zeroed in
registers, and a tile is not computed at all if its sample or all its channels are closed. There is no synchronization
with the host, and no grid depends on what is open.
"""

from typing import Any, NamedTuple

import torch
import triton
from fastgate.kernels import _turing
from fastgate.kernels._gated_conv import Gate, Map, Strides, Taps, Tile, gated_conv_kernel
from fastgate.kernels._gated_conv_wgrad import gated_conv_wgrad_kernel
from fastgate.kernels._launch import INTERPRETED, counter, is_channels_last, next_power_of_2
from torch import Tensor

_WGRAD_PROGRAMS = 256  # a few on every GPU's multiprocessors


def gated_conv_fwd(
    x: Tensor,
    weight: Tensor,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    stride: int,
    padding: int,
    write_closed: bool,
) -> Tensor:
    """Compute y [N, C_out, H', W'] in the layout and dtype of x.

    Where `out_gate` is closed, y is zero, or uninitialized memory with `write_closed` False.
    """
    taps = Taps(weight.shape[2], weight.shape[3], stride, padding)
    height, width = x.shape[2:]
    size = ((height + 2 * padding - taps.rows) // stride + 1, (width + 2 * padding - taps.columns) // stride + 1)
    y = _empty_map(x, weight.shape[0], *size)
    _launch(y, x, weight, in_gate, out_gate, taps, transposed=False, write_closed=write_closed)
    return y


def gated_conv_dgrad(
    dy: Tensor,
    weight: Tensor,
    x: Tensor,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    stride: int,
    padding: int,
    needs_dgate: bool,
) -> tuple[Tensor, Tensor]:
    """Compute (dx like x, zero where `in_gate` is closed; gradient of `in_gate` per sample and channel, fp32 [N, C]).

    The second is empty without `needs_dgate`; with it, it includes closed channels.
    """
    dx = torch.empty_like(x)
    taps = Taps(weight.shape[2], weight.shape[3], stride, padding)
    dgate = _launch(
        dx, dy, weight, out_gate, in_gate, taps, transposed=True, factor=x if needs_dgate else None
    )  # fmt: skip
    return dx, dgate


def gated_conv_wgrad(
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    stride: int,
    padding: int,
) -> Tensor:
    """Compute dweight like `weight`."""
    n, c_in = x.shape[:2]
    c_out, _, kh, kw = weight.shape
    if n == 0:
        return torch.zeros_like(weight)  # gates per sample have no row to read
    plan = _plan(x)
    tile, warps = _wgrad_tile(plan, c_out, dy.shape[2] * dy.shape[3], is_channels_last(x))
    columns = 8 * triton.cdiv(c_in, 8) * kh * kw
    m_tiles, n_tiles = triton.cdiv(columns, tile.m), triton.cdiv(c_out, tile.n)
    samples = triton.cdiv(n, max(1, min(_WGRAD_PROGRAMS // (m_tiles * n_tiles), n)))
    splits = triton.cdiv(n, samples)
    dw = torch.empty_like(weight)
    partial = x.new_empty(m_tiles * n_tiles * splits * tile.m * tile.n if splits > 1 else 0, dtype=torch.float32)
    gated_conv_wgrad_kernel[(m_tiles, n_tiles, splits)](
        dw,
        partial,
        counter(x.device, m_tiles * n_tiles),
        x,
        dy,
        dw if in_gate is None else in_gate,
        dw if out_gate is None else out_gate,
        n,
        samples,
        X=_map(x),
        DY=_map(dy),
        TAPS=Taps(kh, kw, stride, padding),
        WEIGHT=Strides(*dw.stride()),
        IN_GATE=_gate(in_gate),
        OUT_GATE=_gate(out_gate),
        IS_SPLIT=splits > 1,
        TILE=tile,
        num_warps=warps,
        # with an explicit register limit, ptxas does not spill registers to fit one more block
        maxnreg=168 if warps == 4 and is_channels_last(x) != plan.fp32 else 255,
        **plan.options,
    )
    return dw


def _launch(
    dst: Tensor,
    src: Tensor,
    weight: Tensor,
    src_gate: Tensor | None,
    dst_gate: Tensor | None,
    taps: Taps,
    *,
    transposed: bool,
    write_closed: bool = True,
    factor: Tensor | None = None,
) -> Tensor:
    """Compute one convolution into `dst`; return the gradient of `dst_gate` if `factor` is given, fp32 [N, C_dst]."""
    n, c_dst, h_dst, w_dst = dst.shape
    classes = taps.stride**2 if transposed else 1
    pixels = triton.cdiv(h_dst, taps.stride) * triton.cdiv(w_dst, taps.stride) if transposed else h_dst * w_dst
    plan = _plan(src)
    tile, warps = _conv_tile(plan, src.shape[1], c_dst, pixels, is_channels_last(src))
    tiles = classes * triton.cdiv(pixels, tile.m)
    partial = dst.new_empty((n, tiles, c_dst) if factor is not None else (0,), dtype=torch.float32)
    gated_conv_kernel[(n * tiles * triton.cdiv(c_dst, tile.n),)](
        dst,
        partial,
        src,
        weight,
        *(dst if t is None else t for t in (src_gate, dst_gate, factor)),
        SRC=_map(src),
        DST=_map(dst),
        FACTOR=None if factor is None else _map(factor),
        TAPS=taps,
        WEIGHT=Strides(*weight.stride()),
        SRC_GATE=_gate(src_gate),
        DST_GATE=_gate(dst_gate),
        TRANSPOSED=transposed,
        WRITE_CLOSED=write_closed,
        TILE=tile,
        num_warps=warps,
        **plan.options,
    )
    return partial.sum(1) if factor is not None else partial


class _Plan(NamedTuple):
    """How a convolution calls `tl.dot`, given dtype and device."""

    upcast: bool  # convert the operands to fp32 first
    fp32: bool  # the operands are fp32, originally or after conversion
    precision: str
    options: dict[str, Any]  # launch options; empty except for the tensor cores of sm_75


def _plan(x: Tensor) -> _Plan:
    """TF32 only where PyTorch's switch for convolutions allows it."""
    upcast, options = _turing.plan_dot(x.device, x.dtype)
    if INTERPRETED and x.dtype == torch.bfloat16:
        upcast = True  # the interpreter computes garbage from raw bf16
    allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"
    tf32 = allowed and x.dtype == torch.float32 and _turing.capability(x.device) >= 80
    return _Plan(upcast, upcast or x.dtype == torch.float32, "tf32" if tf32 else "ieee", options)


# Tiles: the largest that do not spill. On sm_75 shared memory is the bottleneck: few warps, each with a large part of
# the tile in registers, read it least; NCHW maps, whose vectors end at every tap, need the registers for addresses.
# `python -m bench.floors` shows the cost of a choice.


def _conv_tile(plan: _Plan, c_src: int, c_dst: int, pixels: int, channels_last: bool) -> tuple[Tile, int]:
    """(tile of [pixels, dst channels] and source channels of a step, warps)."""
    block_n = next_power_of_2(c_dst, 16, 64)
    block_m = next_power_of_2(pixels, 16, 64 if plan.fp32 else 4096 // block_n)
    # the longest step with the least padding after the last channel
    warps = 2 if plan.options and channels_last else 4
    longest = (64, 32, 16) if plan.options and not channels_last else (32, 16)
    block_k = 16 if plan.fp32 else min(longest, key=lambda k: triton.cdiv(c_src, k) * k)
    return Tile(block_m, block_n, block_k, plan.upcast, plan.precision), warps


def _wgrad_tile(plan: _Plan, c_out: int, pixels: int, channels_last: bool) -> tuple[Tile, int]:
    """(tile of [columns, output channels] and pixels of a step, warps)."""
    block_n = next_power_of_2(c_out, 16, 64)
    block_m, warps = 32 if plan.fp32 and not channels_last else 64, 4
    block_k = 32 if channels_last and not plan.fp32 else 16
    if plan.options:
        block_m = 32 if block_n == 32 and not channels_last else 64
        block_k = 16 if block_n == 64 else 32
        warps = 4 if block_n == 64 and not channels_last else 2
    return Tile(block_m, block_n, next_power_of_2(pixels, 16, block_k), plan.upcast, plan.precision), warps


def _map(x: Tensor) -> Map:
    return Map(*x.shape[1:], is_channels_last(x))


def _gate(gate: Tensor | None) -> Gate | None:
    if gate is None:
        return None
    samples, channels = gate.shape
    return Gate(gate.stride(0) if samples > 1 else 0, gate.stride(1) if channels > 1 else 0, channels > 1)


def _empty_map(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    size = (like.shape[0], channels, height, width)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)
