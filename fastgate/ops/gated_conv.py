"""The gated convolution: conv2d(x * in_gate, weight) * out_gate."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgate.ops.dispatch import register, tensor_obstacle


def gated_conv2d_torch(
    x: Tensor, weight: Tensor, in_gate: Tensor | None, out_gate: Tensor | None, stride: int, padding: int
) -> Tensor:
    """The plain-PyTorch meaning of :func:`fastgate.functional.gated_conv2d`; gates are [N or 1, C or 1]."""
    if in_gate is not None:
        x = x * in_gate[:, :, None, None]
    y = F.conv2d(x, weight, None, stride, padding)
    return y if out_gate is None else y * out_gate[:, :, None, None]


def gated_conv2d_gathered(
    x: Tensor, weight: Tensor, in_gate: Tensor | None, out_gate: Tensor | None, stride: int, padding: int
) -> Tensor:
    """The same by a smaller dense convolution: take what is open, convolve, put the result in its place.

    For constant gates of shape [1, C] (open channels) and [N, 1] (open samples). Asks the device what is open.
    """
    n, out = x.shape[0], weight.shape[0]
    samples = inputs = outputs = None
    sample_gate = _product(*(gate for gate in (in_gate, out_gate) if gate is not None and gate.shape[1] == 1))
    if sample_gate is not None:
        samples = _open_unless_all(sample_gate[:, 0])
    if in_gate is not None and in_gate.shape[1] > 1:
        inputs = _open_unless_all(in_gate[0])
    if out_gate is not None and out_gate.shape[1] > 1:
        outputs = _open_unless_all(out_gate[0])
    if any(indices is not None and len(indices) == 0 for indices in (samples, inputs, outputs)):
        size = [(x.shape[d] + 2 * padding - weight.shape[d]) // stride + 1 for d in (2, 3)]
        # sums of nothing: gradients of zero, as the plain path has them, not of None
        return x.new_zeros(n, out, *size) + (x[:0].sum() + weight[:0].sum())
    if samples is not None:
        x = x.index_select(0, samples)
    if inputs is not None:
        x, weight = select_channels(x, inputs), weight.index_select(1, inputs)
    if outputs is not None:
        weight = weight.index_select(0, outputs)
    y = F.conv2d(x, weight, None, stride, padding)
    if outputs is not None:
        y = put_channels(y, outputs, out)
    if samples is not None:
        y = torch.zeros_like(y[:1]).expand(n, -1, -1, -1).index_copy(0, samples, y)
    return y


def select_channels(x: Tensor, channels: Tensor) -> Tensor:
    """Channels of x [N, C, H, W] in the layout of x; `index_select` alone would always return NCHW."""
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return x.permute(0, 2, 3, 1).index_select(3, channels).permute(0, 3, 1, 2)
    return x.index_select(1, channels)


def put_channels(y: Tensor, channels: Tensor, total: int) -> Tensor:
    """The inverse of :func:`select_channels`: zeros with y [N, c, H, W] in its channels, in the layout of y."""
    n, _, height, width = y.shape
    if y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous():
        return y.new_zeros(n, height, width, total).index_copy(3, channels, y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return y.new_zeros(n, total, height, width).index_copy(1, channels, y)


def _open_unless_all(gate: Tensor) -> Tensor | None:
    indices = gate.detach().nonzero().flatten()
    return None if len(indices) == len(gate) else indices


def _product(*gates: Tensor) -> Tensor | None:
    if not gates:
        return None
    return gates[0] if len(gates) == 1 else gates[0] * gates[1]


def _open_lists(gate: Tensor) -> tuple[Tensor, Tensor]:
    from fastgate.kernels.open_lists import open_lists

    return open_lists(gate)


def _open_lists_fake(gate: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape, dtype=torch.int32), gate.new_empty(gate.shape[:1], dtype=torch.int32)


def _fwd(x: Tensor, *arguments: Any) -> Tensor:
    from fastgate.kernels.gated_conv import gated_conv_fwd

    return gated_conv_fwd(x, *arguments)


def _fwd_fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(F.conv2d(x, weight, None, *rest[-2:]), memory_format=_layout(x))


def _dgrad(dy: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    from fastgate.kernels.gated_conv import gated_conv_dgrad

    return gated_conv_dgrad(dy, *arguments)


def _dgrad_fake(dy: Tensor, weight: Tensor, x: Tensor, in_gate: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((0,) if in_gate is None else x.shape[:2], dtype=torch.float32)


def _wgrad(x: Tensor, *arguments: Any) -> Tensor:
    from fastgate.kernels.gated_conv import gated_conv_wgrad

    return gated_conv_wgrad(x, *arguments)


def _wgrad_fake(x: Tensor, dy: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(weight)


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


_LISTS = "Tensor? in_list, Tensor? in_count, Tensor? out_list, Tensor? out_count"
_SAMPLES = "Tensor? sample_list, Tensor? sample_count, int stride, int padding"
register("open_lists", "(Tensor gate) -> (Tensor, Tensor)", _open_lists, _open_lists_fake)
register("gated_conv2d_fwd", f"(Tensor x, Tensor weight, {_LISTS}, {_SAMPLES}) -> Tensor", _fwd, _fwd_fake)
register(
    "gated_conv2d_dgrad",
    f"(Tensor dy, Tensor weight, Tensor x, Tensor? in_gate, {_LISTS}, {_SAMPLES}) -> (Tensor, Tensor)",
    _dgrad,
    _dgrad_fake,
)
register(
    "gated_conv2d_wgrad",
    f"(Tensor x, Tensor dy, Tensor weight, {_LISTS}, Tensor? out_gate, {_SAMPLES}) -> Tensor",
    _wgrad,
    _wgrad_fake,
)


def gated_conv2d_obstacle(x: Tensor, weight: Tensor, *gates: Tensor | None) -> str | None:
    """Why the kernels cannot serve these arguments, or None."""
    if x.dtype != weight.dtype:
        return f"its kernels take x and weight of one dtype, and they are {x.dtype} and {weight.dtype}"
    return tensor_obstacle(x, weight, *gates)


class GatedConv2d(torch.autograd.Function):
    """The skipping kernels with their gradients; gates are None or [N or 1, C or 1].

    What a gate closes is skipped wherever its own gradient is not asked for. A gate that requires grad is skipped too,
    but for what its gradient needs: an input gate's is <dz, x> with dz computed for closed channels as well, an output
    gate's is <dy, z> with z computed for them in the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        in_gate: Tensor | None,
        out_gate: Tensor | None,
        stride: int,
        padding: int,
    ) -> Tensor:
        """y [N, C_out, H', W']."""
        ctx.live_in, ctx.live_out = ctx.needs_input_grad[2:4]
        in_lists = _channel_lists(in_gate)
        out_lists = _channel_lists(out_gate)
        none = (None, None)
        skipped_out = none if ctx.live_out else out_lists
        samples = _sample_lists(in_gate, None if ctx.live_out else out_gate)
        z = torch.ops.fastgate.gated_conv2d_fwd(x, weight, *in_lists, *skipped_out, *samples, stride, padding)
        ctx.options = (stride, padding)
        lists = (*in_lists, *out_lists)
        ctx.save_for_backward(x, weight, in_gate, out_gate, z if ctx.live_out else None, *lists)
        if not ctx.live_out or out_gate is None:
            return z
        return z * out_gate.to(z.dtype)[:, :, None, None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and the gates."""
        x, weight, in_gate, out_gate, z, *lists = ctx.saved_tensors
        in_lists, out_lists, none = lists[:2], lists[2:], (None, None)
        dy = grads[0].contiguous(memory_format=_layout(x))
        dx = dw = d_in = d_out = None
        if ctx.needs_input_grad[0] or ctx.live_in:
            dx, d_in = torch.ops.fastgate.gated_conv2d_dgrad(
                dy, weight, x, in_gate if ctx.live_in else None, *(none if ctx.live_in else in_lists), *out_lists,
                *_sample_lists(None if ctx.live_in else in_gate, out_gate), *ctx.options,
            )  # fmt: skip
        if ctx.needs_input_grad[1]:
            dw = torch.ops.fastgate.gated_conv2d_wgrad(
                x, dy, weight, *_wgrad_gates(x, in_gate, out_gate, in_lists, out_lists), *ctx.options
            )
        if ctx.live_in:
            d_in = d_in.sum_to_size(in_gate.shape).to(in_gate.dtype)
        if ctx.live_out:
            d_out = (dy * z).sum((2, 3), dtype=torch.float32).sum_to_size(out_gate.shape).to(out_gate.dtype)
        return (
            dx if ctx.needs_input_grad[0] else None,
            dw,
            d_in if ctx.live_in else None,
            d_out,
            None,
            None,
        )


def _channel_lists(gate: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Lists of open channels of a gate that has channels."""
    if gate is None or gate.shape[1] == 1:
        return None, None
    return torch.ops.fastgate.open_lists(gate)


def _sample_lists(*gates: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """List of the samples that every gate of shape [N, 1] leaves open."""
    gate = _product(*(gate for gate in gates if gate is not None and gate.shape[1] == 1))
    return (None, None) if gate is None else torch.ops.fastgate.open_lists(gate.t())


def _wgrad_gates(
    x: Tensor, in_gate: Tensor | None, out_gate: Tensor | None, in_lists: list[Tensor], out_lists: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gates as the weight gradient wants them: input channels, output channels, output gate, samples."""
    none = (None, None)
    samples = _sample_lists(in_gate, out_gate)
    if in_gate is not None and in_gate.shape[0] > 1 and in_gate.shape[1] > 1:
        # the samples where each input channel is open, and the sample itself
        pairs = in_gate
        if out_gate is not None and out_gate.shape[1] == 1:
            pairs = in_gate * out_gate
        samples = torch.ops.fastgate.open_lists(pairs.t())
        in_lists = none
    each_out = out_gate is not None and out_gate.shape[0] > 1 and out_gate.shape[1] > 1
    return (*in_lists, *(none if each_out else out_lists), out_gate.contiguous() if each_out else None, *samples)
