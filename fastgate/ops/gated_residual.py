"""The gated residual: y = relu(shortcut + gate * branch)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgate.ops import inputs
from fastgate.ops.dispatch import once_differentiable, register, tensor_obstacle, transforms_active
from fastgate.ops.means import remember_means
from fastgate.ops.measurement import Kind


def gated_residual_torch(shortcut: Tensor, branch: Tensor, gate: Tensor, relu: bool) -> Tensor:
    """PyTorch reference of :func:`fastgate.functional.gated_residual`, with `gate` reshaped to [N, 1 or C, 1, 1]."""
    y = shortcut + gate * branch
    return torch.relu(y) if relu else y


def gated_residual_plain(
    shortcut: Tensor, branch: Tensor, gate: Tensor, relu: bool, return_pooled: bool
) -> tuple[Tensor, Tensor | None]:
    """Implementation of `impl="torch"`: y, and its means over H and W if requested; `gate` is [N] or [N, C]."""
    # 0 and 1 are exact in any dtype; a wider gate must not widen the result, as it does not in the kernel
    gate = gate.reshape(*gate.shape, *[1] * (4 - gate.dim())).to(torch.promote_types(shortcut.dtype, branch.dtype))
    if shortcut.dtype == branch.dtype == gate.dtype and not transforms_active():
        y = PlainGatedResidual.apply(shortcut, branch, gate, relu)
    else:
        y = gated_residual_torch(shortcut, branch, gate, relu)
    return y, y.mean((2, 3), dtype=torch.promote_types(y.dtype, torch.float32)) if return_pooled else None


def gated_residual_fused(
    shortcut: Tensor, branch: Tensor, gate: Tensor, relu: bool, return_pooled: bool
) -> tuple[Tensor, Tensor | None]:
    """Implementation of `impl="triton"`, with the same results."""
    # the means are nearly free in the kernel, and save the next block's gate head a pass over y
    pool = return_pooled or not torch.compiler.is_compiling()
    y, pooled = GatedResidual.apply(shortcut, branch, gate.contiguous(), relu, pool)
    if pool:
        remember_means(y, pooled)
    return y, pooled if return_pooled else None


class PlainGatedResidual(torch.autograd.Function):
    """:func:`gated_residual_torch` with less memory traffic: one pass less in forward, one map less in backward.

    `gate` is [N, 1 or C, 1, 1]. Forward and backward take 0.7 to 0.95 of the time of plain autograd at the first stage
    of ResNet-110 on two EPYC cores (bench/results/amd-epyc).
    """

    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, branch: Tensor, gate: Tensor, relu: bool) -> Tensor:
        """Compute y; all arguments have the same dtype."""
        y = torch.addcmul(shortcut, gate, branch)
        if relu:
            y.relu_()
        ctx.save_for_backward(y if relu else None, branch if ctx.needs_input_grad[2] else None, gate)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of shortcut, branch and gate."""
        y, branch, gate = ctx.saved_tensors
        dy = grads[0] if y is None else torch.ops.aten.threshold_backward(grads[0], y, 0)
        return dy, *_product_gradients(dy, branch, gate), None


class GatedProduct(torch.autograd.Function):
    """x * gate, gate [N or 1, C or 1, 1, 1] of the same dtype, with the backward of :class:`PlainGatedResidual`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        """Compute the product."""
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, gate)
        return x * gate

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and gate."""
        x, gate = ctx.saved_tensors
        return _product_gradients(grads[0], x, gate)


def _product_gradients(dy: Tensor, branch: Tensor | None, gate: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of the branch and of the gate that multiplied it; the latter only if `branch` is given."""
    if branch is None:
        return dy * gate, None
    products = dy * branch
    dgate = products.sum([d for d in range(4) if gate.shape[d] == 1 or d > 1], keepdim=True)
    # reuse the memory of the products for dbranch, unless a double backward (create_graph) still needs them
    dbranch = dy * gate if torch.is_grad_enabled() else torch.mul(dy, gate, out=products)
    return dbranch, dgate


def _fwd_fake(shortcut: Tensor, branch: Tensor, gate: Tensor, relu: bool, pool: bool) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(shortcut, dtype=torch.promote_types(shortcut.dtype, branch.dtype))
    return y, shortcut.new_empty(shortcut.shape[:2] if pool else (0,), dtype=torch.float32)


def _bwd_fake(
    dy: Tensor | None,
    dpooled: Tensor | None,
    y: Tensor,
    branch: Tensor,
    gate: Tensor,
    relu: bool,
    needs_dgate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(y), torch.empty_like(branch), torch.empty_like(gate) if needs_dgate else gate.new_empty(0)


register(
    "gated_residual_fwd", "(Tensor shortcut, Tensor branch, Tensor gate, bool relu, bool pool) -> (Tensor, Tensor)",
    "gated_residual", _fwd_fake,
)  # fmt: skip
register(
    "gated_residual_bwd",
    "(Tensor? dy, Tensor? dpooled, Tensor y, Tensor branch, Tensor gate, bool relu, bool needs_dgate) "
    "-> (Tensor, Tensor, Tensor)",
    "gated_residual", _bwd_fake,
)  # fmt: skip


def gated_residual_obstacle(shortcut: Tensor, branch: Tensor, gate: Tensor) -> str | None:
    """Why the kernel does not support these arguments, or None."""
    # the caller makes the gate contiguous, so its layout does not matter
    return tensor_obstacle(shortcut, branch, gate.flatten())


class GatedResidual(torch.autograd.Function):
    """The fused kernel with its gradient: (y, means of y over H and W).

    Saved for backward: y if there is a ReLU (for its sign; the next block keeps it alive anyway), the gate, and the
    branch.
    """

    @staticmethod
    def forward(
        ctx: Any, shortcut: Tensor, branch: Tensor, gate: Tensor, relu: bool, pool: bool
    ) -> tuple[Tensor, Tensor]:
        """`gate` is [N] or [N, C]."""
        y, pooled = torch.ops.fastgate.gated_residual_fwd(shortcut, branch, gate, relu, pool)
        ctx.set_materialize_grads(False)
        # without a ReLU, backward does not read y, and later operations may change it in place
        ctx.save_for_backward(y if relu else None, branch, gate)
        ctx.relu, ctx.pool = relu, pool
        ctx.like = {
            "dtype": y.dtype,
            "memory_format": torch.channels_last if inputs.is_channels_last(y) else torch.contiguous_format,
        }
        ctx.dtype = shortcut.dtype
        return y, pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of shortcut, branch and gate."""
        y, branch, gate = ctx.saved_tensors
        dy, dpooled = grads
        if not ctx.pool:
            dpooled = None  # a compiled backward passes an empty tensor
        if dy is None and dpooled is None:
            return (None,) * 5
        if y is None:  # values are not read: it gives dtype and layout of the shortcut's gradient
            y = torch.empty_like(branch, **ctx.like)
        if dy is not None and tensor_obstacle(dy) is not None:
            dy = torch.empty_like(y, dtype=dy.dtype).copy_(dy)  # an expanded gradient, such as that of a sum
        if dpooled is not None:
            dpooled = dpooled.contiguous()
        dshortcut, dbranch, dgate = torch.ops.fastgate.gated_residual_bwd(
            dy, dpooled, y, branch, gate, ctx.relu, ctx.needs_input_grad[2]
        )
        return dshortcut.to(ctx.dtype), dbranch, dgate if ctx.needs_input_grad[2] else None, None, None


@dataclass(frozen=True)
class ResidualCall(Kind):
    """A kind of call, for :mod:`fastgate.ops.choices`: sizes of the feature maps, dtypes by name."""

    operation: ClassVar[str] = "gated_residual"

    samples: int
    channels: int
    height: int
    width: int
    dtype: str
    branch_dtype: str
    gate_dtype: str
    channels_last: bool
    per_channel: bool
    relu: bool
    return_pooled: bool
    gradient: bool
    live: bool  # the gate requires grad

    @classmethod
    def of(cls, shortcut: Tensor, branch: Tensor, gate: Tensor, relu: bool, return_pooled: bool) -> "ResidualCall":
        """The kind of a call."""
        records = torch.is_grad_enabled()
        n, c, height, width = shortcut.shape
        dtype, branch_dtype, gate_dtype = (inputs.dtype_name(tensor) for tensor in (shortcut, branch, gate))
        return cls(
            n, c, height, width, dtype, branch_dtype, gate_dtype, inputs.is_channels_last(shortcut),
            gate.numel() > len(gate), relu, return_pooled,
            records and (shortcut.requires_grad or branch.requires_grad), records and gate.requires_grad,
        )  # fmt: skip

    def describe(self) -> str:
        """Such as "256x16x32x32 bfloat16, NHWC, layer gate, backward"."""
        words = [f"{inputs.sizes(self.samples, self.channels, self.height, self.width)} {self.dtype}"]
        words += ["NHWC" if self.channels_last else "NCHW", "channel gate" if self.per_channel else "layer gate"]
        return ", ".join([*words, *(["backward"] if self.gradient or self.live else [])])

    def candidates(self) -> tuple[str, ...]:
        """The fused kernel."""
        return ("triton",)

    def make(self, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        """Feature maps, a half-open gate, and gradients of the results."""
        shape = (self.samples, self.channels, self.height, self.width)
        make = inputs.Maker(device, generator, self.channels_last)
        gate = make.gate(shape[:2] if self.per_channel else shape[:1], self.gate_dtype)
        return {
            "shortcut": make.map(shape, self.dtype).requires_grad_(self.gradient),
            "branch": make.map(shape, self.branch_dtype).requires_grad_(self.gradient),
            "gate": gate.requires_grad_(self.live),
            "dy": make.map(shape, self.dtype),
            "dpooled": make.normal(shape[:2]) if self.return_pooled else None,
        }

    def run(self, candidate: str, values: dict[str, Any]) -> tuple[Tensor, ...]:
        """y, its means, and the gradients."""
        compute = gated_residual_fused if candidate == "triton" else gated_residual_plain
        arguments = [values[name] for name in ("shortcut", "branch", "gate")]
        shortcut, branch, gate = arguments
        y, pooled = compute(shortcut, branch, gate, self.relu, self.return_pooled)
        grads = [values["dy"].to(y.dtype), values["dpooled"]]
        return inputs.with_gradients([y, pooled], grads, arguments)
