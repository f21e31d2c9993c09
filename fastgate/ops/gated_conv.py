"""The gated convolution: conv2d(x * in_gate, weight) * out_gate."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgate.ops import choices, inputs
from fastgate.ops.dispatch import once_differentiable, register, tensor_obstacle, transforms_active
from fastgate.ops.gated_residual import GatedProduct
from fastgate.ops.inputs import is_channels_last
from fastgate.ops.measurement import Kind

# On a CPU: gathering and scattering open channels costs about 1 minus this fraction of a dense convolution (0.06 to
# 0.12 on an AMD EPYC); below this many multiply-adds (about a millisecond on two cores) reading gates does not pay off
_WORTH_GATHERING = 0.9
_WORTH_ASKING = 1e8


def gated_conv2d_torch(
    x: Tensor, weight: Tensor, in_gate: Tensor | None, out_gate: Tensor | None, stride: int, padding: int
) -> Tensor:
    """PyTorch reference of :func:`fastgate.functional.gated_conv2d`; gates are [N or 1, C or 1]."""
    y = F.conv2d(_gated(x, in_gate), weight, None, stride, padding)
    return _gated(y, out_gate)


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    if gate is None:
        return x
    # 0 and 1 are exact in any dtype; a wider gate must not widen the result
    gate = gate.to(x.dtype)[:, :, None, None]
    y: Tensor = x * gate if transforms_active() else GatedProduct.apply(x, gate)
    return y


def gated_conv2d_gathered(
    x: Tensor, weight: Tensor, in_gate: Tensor | None, out_gate: Tensor | None, stride: int, padding: int
) -> Tensor:
    """The same with a smaller dense convolution: gather the open parts, convolve, scatter the result.

    For constant gates of shape [1, C] (open channels) and [N, 1] (open samples). Reads the gates, which synchronizes.
    """
    # determined once: gathered tensors with a single channel or pixel are ambiguous
    n, out, layout = x.shape[0], weight.shape[0], _layout(x)
    samples = inputs = outputs = None
    sample_gate = _sample_gate(in_gate, out_gate)
    if sample_gate is not None:
        samples = _open_unless_all(sample_gate[:, 0])
    if in_gate is not None and in_gate.shape[1] > 1:
        inputs = _open_unless_all(in_gate[0])
    if out_gate is not None and out_gate.shape[1] > 1:
        outputs = _open_unless_all(out_gate[0])
    if any(indices is not None and len(indices) == 0 for indices in (samples, inputs, outputs)):
        size = [(x.shape[d] + 2 * padding - weight.shape[d]) // stride + 1 for d in (2, 3)]
        # empty sums: gradients are zero, as in the reference, not None
        y = x.new_zeros(n, out, *size).contiguous(memory_format=layout)
        return y + (x[:0].sum() + weight[:0].sum())
    if samples is not None:
        x = take(x, samples, 0)
    if inputs is not None:
        x, weight = take(x, inputs, 1), weight.index_select(1, inputs)
    if outputs is not None:
        weight = weight.index_select(0, outputs)
    y = F.conv2d(x, weight.contiguous(memory_format=_layout(x)), None, stride, padding)
    if outputs is not None:
        y = put(y, outputs, 1, out, layout)
    if samples is not None:
        y = put(y, samples, 0, n, layout)
    return y


def take(x: Tensor, indices: Tensor, dim: int) -> Tensor:
    """`x.index_select` on samples (dim 0) or channels (dim 1) that keeps the layout of x instead of giving NCHW."""
    # must be scriptable, as compact networks call it
    if not is_channels_last(x):
        return x.index_select(dim, indices)
    n, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1)
    if dim == 0:
        return rows.index_select(0, indices).permute(0, 3, 1, 2)
    # as a matrix: 2.6 times as fast on a CPU as the last of four dimensions
    return rows.reshape(-1, c).index_select(1, indices).reshape(n, h, w, -1).permute(0, 3, 1, 2)


def put(y: Tensor, indices: Tensor, dim: int, total: int, layout: torch.memory_format) -> Tensor:
    """The inverse of :func:`take`: zeros of `total` samples or channels with y at these indices, in this layout."""
    n, c, h, w = y.shape
    if layout is torch.contiguous_format:
        shape = (total, c, h, w) if dim == 0 else (n, total, h, w)
        return y.new_zeros(shape).index_copy_(dim, indices, y)
    rows = y.permute(0, 2, 3, 1)
    if dim == 0:
        return rows.new_zeros(total, h, w, c).index_copy_(0, indices, rows).permute(0, 3, 1, 2)
    # index_add: 2.4 times as fast on a CPU as index_copy along rows
    matrix = rows.new_zeros(n * h * w, total).index_add_(1, indices, rows.reshape(-1, c))
    return matrix.reshape(n, h, w, total).permute(0, 3, 1, 2)


def worth_gathering(x: Tensor, weight: Tensor, in_gate: Tensor | None, out_gate: Tensor | None, stride: int) -> bool:
    """Whether `impl="auto"` uses :func:`gated_conv2d_gathered`: on a CPU, where gates can be read without waiting."""
    gates = [gate for gate in (in_gate, out_gate) if gate is not None]
    # a tracer would freeze the choice into the graph; under a torch.func transform values cannot be read
    if not gates or torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms_active():
        return False
    # closed channels of live gates need gradients too
    live = torch.is_grad_enabled() and any(gate.requires_grad for gate in gates)
    if x.device.type != "cpu" or live or any(_is_pairs(gate) for gate in gates):
        return False
    opened = math.prod(float(gate.detach().mean()) for gate in gates)
    multiply_adds = weight.numel() * x.shape[0] * x.shape[2] * x.shape[3] / stride**2
    return opened == 1.0 or (opened <= _WORTH_GATHERING and multiply_adds >= _WORTH_ASKING)


def _open_unless_all(gate: Tensor) -> Tensor | None:
    indices = gate.detach().nonzero().flatten()
    return None if len(indices) == len(gate) else indices


def _sample_gate(*gates: Tensor | None) -> Tensor | None:
    """Product of the per-sample gates, [N, 1]; None if there are none."""
    of_samples = [gate for gate in gates if gate is not None and gate.shape[1] == 1]
    return math.prod(of_samples[1:], start=of_samples[0]) if of_samples else None


def _fwd_fake(
    x: Tensor, weight: Tensor, in_gate: Any, out_gate: Any, stride: int, padding: int, write_closed: bool
) -> Tensor:
    return torch.empty_like(F.conv2d(x, weight, None, stride, padding), memory_format=_layout(x))


def _dgrad_fake(dy: Tensor, weight: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:2] if rest[-1] else (0,), dtype=torch.float32)


def _wgrad_fake(x: Tensor, dy: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(weight)


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


_GATES = "Tensor? in_gate, Tensor? out_gate, int stride, int padding"
register("gated_conv_fwd", f"(Tensor x, Tensor weight, {_GATES}, bool write_closed) -> Tensor", "gated_conv", _fwd_fake)
register(
    "gated_conv_dgrad",
    f"(Tensor dy, Tensor weight, Tensor x, {_GATES}, bool needs_dgate) -> (Tensor, Tensor)",
    "gated_conv",
    _dgrad_fake,
)
register("gated_conv_wgrad", f"(Tensor x, Tensor dy, Tensor weight, {_GATES}) -> Tensor", "gated_conv", _wgrad_fake)


def gated_conv2d_obstacle(x: Tensor, weight: Tensor, *gates: Tensor | None) -> str | None:
    """Why the kernels do not support these arguments, or None."""
    return tensor_obstacle(x, weight, *gates)


class Ways(NamedTuple):
    """Implementations of a gated convolution and its gradients, each "triton" or "torch"."""

    forward: str
    dgrad: str  # gradient of the input
    wgrad: str  # gradient of the weight


def _forward_torch(
    x: Tensor,
    weight: Tensor,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    stride: int,
    padding: int,
    write_closed: bool,
) -> Tensor:
    return _times(F.conv2d(_times(x, in_gate), weight, None, stride, padding), out_gate)


def _dgrad_torch(
    dy: Tensor,
    weight: Tensor,
    x: Tensor,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    stride: int,
    padding: int,
    needs_dgate: bool,
) -> tuple[Tensor, Tensor]:
    dx = _convolution_gradient(_times(dy, out_gate), x, weight, stride, padding, of_weight=False)
    dgate = (dx * x).sum((2, 3), dtype=torch.float32) if needs_dgate else dx.new_empty(0, dtype=torch.float32)
    return _times(dx, in_gate), dgate


def _wgrad_torch(
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    stride: int,
    padding: int,
) -> Tensor:
    dz = _times(dy, out_gate)
    return _convolution_gradient(dz, _times(x, in_gate), weight, stride, padding, of_weight=True)


def _convolution_gradient(
    dz: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, *, of_weight: bool
) -> Tensor:
    geometry = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1)
    mask = [not of_weight, of_weight, False]
    gradients = torch.ops.aten.convolution_backward(dz, x, weight, None, *geometry, mask)
    found: Tensor = gradients[int(of_weight)]
    return found


def _times(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate.to(x.dtype)[:, :, None, None]


_ways: dict[tuple[str, str], Callable[..., Any]] = {
    ("forward", "torch"): _forward_torch,
    ("forward", "triton"): torch.ops.fastgate.gated_conv_fwd,
    ("dgrad", "torch"): _dgrad_torch,
    ("dgrad", "triton"): torch.ops.fastgate.gated_conv_dgrad,
    ("wgrad", "torch"): _wgrad_torch,
    ("wgrad", "triton"): torch.ops.fastgate.gated_conv_wgrad,
}


class GatedConv2d(torch.autograd.Function):
    """The gated convolution and its gradients, with skipping kernels in at least one direction.

    Gates are None or [N or 1, C or 1].

    Closed channels and samples are skipped except where the gradient of a gate needs them: an input gate's is <dz, x>
    with dz computed for closed channels as well, an output gate's is <dy, z> with z computed for them in the forward
    pass. Without `write_closed` the values of closed outputs are unspecified; nothing here reads them.
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
        write_closed: bool,
        ways: Ways,
    ) -> Tensor:
        """Compute y [N, C_out, H', W']."""
        ctx.live_in, ctx.live_out = ctx.needs_input_grad[2:4]
        skipped = None if ctx.live_out else out_gate
        z = _ways["forward", ways.forward](x, weight, in_gate, skipped, stride, padding, write_closed)
        ctx.options, ctx.ways = (stride, padding), ways
        ctx.save_for_backward(x, weight, in_gate, out_gate, z if ctx.live_out else None)
        if not ctx.live_out or out_gate is None or not write_closed:
            return z
        return z * out_gate.to(z.dtype)[:, :, None, None]

    @staticmethod
    @once_differentiable  # the kernels have no second derivative: it would silently be zero
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and the gates."""
        x, weight, in_gate, out_gate, z = ctx.saved_tensors
        dy = grads[0].contiguous(memory_format=_layout(x))
        gates = (in_gate, out_gate, *ctx.options)
        dx = dw = d_in = d_out = None
        if ctx.needs_input_grad[0] or ctx.live_in:
            dx, d_in = _ways["dgrad", ctx.ways.dgrad](dy, weight, x, *gates, ctx.live_in)
        if ctx.needs_input_grad[1]:
            dw = _ways["wgrad", ctx.ways.wgrad](x, dy, weight, *gates)
        if ctx.live_in and d_in is not None:
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
            None,
            None,
        )


@dataclass(frozen=True)
class ConvCall(Kind):
    """A kind of call, for :mod:`fastgate.ops.choices`: one direction of a gated convolution.

    Gates are "none", "batch" ([1, C]), "samples" ([N, 1]) or "pairs" ([N, C]).
    """

    operation: ClassVar[str] = "gated_conv2d"

    direction: str  # "forward", "dgrad" or "wgrad"
    in_gate: str
    out_gate: str
    live_in: bool  # the input gate requires grad
    live_out: bool
    samples: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel: tuple[int, int]
    stride: int
    padding: int
    dtype: str
    channels_last: bool

    def describe(self) -> str:
        """Such as "forward, 256x16x32x32 bfloat16, NHWC, 3x3 to 16, stride 1, gates pairs / none"."""
        size = inputs.sizes(self.samples, self.in_channels, self.height, self.width)
        kernel = inputs.sizes(*self.kernel)
        return (
            f"{self.direction}, {size} {self.dtype}, {'NHWC' if self.channels_last else 'NCHW'}, {kernel} to "
            f"{self.out_channels}, stride {self.stride}, gates {self.in_gate} / {self.out_gate}"
        )

    def candidates(self) -> tuple[str, ...]:
        """The skipping kernels; on sm_75, fp16 uses the tensor cores if that is enabled."""
        return ("triton",)

    def eps(self, dtype: torch.dtype) -> float:
        """The rounding of TF32 if the kernels may use it, even for shapes where PyTorch does not."""
        backends: Any = torch.backends
        allows_tf32 = dtype == torch.float32 and backends.cudnn.conv.fp32_precision == "tf32"
        return 2**-10 if allows_tf32 else super().eps(dtype)

    def make(self, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        """Feature maps, a weight, and half-open gates."""
        make = inputs.Maker(device, generator, self.channels_last)
        size = [
            (side + 2 * self.padding - kernel) // self.stride + 1
            for side, kernel in zip((self.height, self.width), self.kernel, strict=True)
        ]

        def gate(form: str, channels: int) -> Tensor | None:
            if form == "none":
                return None
            return make.gate((1 if form == "batch" else self.samples, 1 if form == "samples" else channels), self.dtype)

        fan_in = self.in_channels * math.prod(self.kernel)
        weight = make.map((self.out_channels, self.in_channels, *self.kernel), "float32") * fan_in**-0.5
        return {
            "x": make.map((self.samples, self.in_channels, self.height, self.width), self.dtype),
            "dy": make.map((self.samples, self.out_channels, *size), self.dtype),
            "weight": weight.to(getattr(torch, self.dtype)),
            "in_gate": gate(self.in_gate, self.in_channels),
            "out_gate": gate(self.out_gate, self.out_channels),
        }

    def run(self, candidate: str, values: dict[str, Any]) -> tuple[Tensor, ...]:
        """Compute the direction."""
        way = _ways[self.direction, candidate]
        x, dy, weight, in_gate, out_gate = values.values()
        geometry = (self.stride, self.padding)
        with torch.no_grad():
            if self.direction == "forward":
                return (way(x, weight, in_gate, None if self.live_out else out_gate, *geometry, True),)
            if self.direction == "wgrad":
                return (way(x, dy, weight, in_gate, out_gate, *geometry),)
            dx, dgate = way(dy, weight, x, in_gate, out_gate, *geometry, self.live_in)
            return dx, dgate


def choose_ways(
    x: Tensor, weight: Tensor, in_gate: Tensor | None, out_gate: Tensor | None, stride: int, padding: int
) -> Ways:
    """The implementation that `impl="auto"` uses on a GPU for each direction, from measurements."""
    records = torch.is_grad_enabled()
    needed = {
        "forward": True,
        "dgrad": records and (x.requires_grad or (in_gate is not None and in_gate.requires_grad)),
        "wgrad": records and weight.requires_grad,
    }
    if in_gate is None and out_gate is None:
        return Ways("torch", "torch", "torch")
    live = (records and gate is not None and gate.requires_grad for gate in (in_gate, out_gate))
    rest = (
        _form(in_gate), _form(out_gate), *live, *x.shape, weight.shape[0], tuple(weight.shape[2:]), stride, padding,
        inputs.dtype_name(x), is_channels_last(x),
    )  # fmt: skip
    ways = {
        direction: choices.choose(ConvCall(direction, *rest), x, weight, in_gate, out_gate) if asked else "torch"
        for direction, asked in needed.items()
    }
    return Ways(**ways)


def _form(gate: Tensor | None) -> str:
    if gate is None:
        return "none"
    if _is_pairs(gate):
        return "pairs"
    return "samples" if gate.shape[1] == 1 else "batch"


def _is_pairs(gate: Tensor) -> bool:
    """Whether a gate has a value per sample and channel."""
    return gate.shape[0] > 1 and gate.shape[1] > 1
