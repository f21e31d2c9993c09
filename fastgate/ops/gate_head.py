"""The gate head: pooled or flattened features -> dense -> BN -> ReLU -> dense -> straight-through threshold."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgate.ops import inputs
from fastgate.ops.dispatch import once_differentiable, register, tensor_obstacle
from fastgate.ops.measurement import Kind

WINDOWS = ("clipped", "restoring", "identity")


def check_window(window: str) -> str:
    """Return `window` if it is known; otherwise raise a `ValueError` that lists the known ones."""
    if window not in WINDOWS:
        raise ValueError(f"window: expected one of {', '.join(WINDOWS)}, got {window!r}")
    return window


def window_gradient(logits: Tensor, grad: Tensor, window: str) -> Tensor:
    """The straight-through gradient of a thresholded logit, same shape as `logits`.

    * `"clipped"` (Eq. 5): `grad` where |logit| <= 1, else 0.
    * `"restoring"`: also where a gradient-descent step would move a saturated logit back towards the window, that is
      logit > 1 and grad > 0, or logit < -1 and grad < 0.
    * `"identity"`: `grad` everywhere.
    """
    if window == "identity":
        return grad
    passes = logits.abs() <= 1
    if window == "restoring":
        passes = passes | (logits * grad > 0)
    return torch.where(passes, grad, 0)


class StraightThrough(torch.autograd.Function):
    """Eq. 4 forward (1 where logit > 0, else 0), :func:`window_gradient` backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, window: str) -> Tensor:
        """Threshold `logits`; 0 itself is closed, nan stays nan."""
        return logits.clamp(0, 1).ceil()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the logits."""
        logits, ctx.window = inputs
        ctx.save_for_backward(logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Pass the gradient through the window."""
        (logits,) = ctx.saved_tensors
        return window_gradient(logits, grads[0], ctx.window), None


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Context that disables autocast, if the device supports it (meta does not)."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def gate_head_torch(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    fc2_weight: Tensor | None,
    fc2_bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    window: str,
) -> tuple[Tensor, Tensor]:
    """PyTorch reference of :func:`fastgate.functional.gate_head`; in fp64, the ground truth of every kernel test.

    x is [N, C, H, W], or already pooled [N, C].
    """
    # the head is tiny and its threshold sensitive: it is computed in its parameters' dtype, also under autocast
    with no_autocast(x.device.type):
        if x.dim() == 2:
            features = x
        elif fc1_weight.shape[1] == x.shape[1]:
            # not x.mean, whose backward writes a full map of gradients, while that of a sum only expands (5 ms of a
            # 230 ms ResNet-20 step on two EPYC cores)
            wide = torch.promote_types(fc1_weight.dtype, torch.float32)  # sums of fp16 maps overflow
            features = (x.sum((2, 3), dtype=wide) * (1 / (x.shape[2] * x.shape[3]))).to(fc1_weight.dtype)
        else:
            features = x.flatten(1).to(fc1_weight.dtype)
        logits = F.linear(features, fc1_weight, fc1_bias)
        if fc2_weight is not None:
            hidden = F.batch_norm(logits, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
            logits = F.linear(F.relu(hidden), fc2_weight, fc2_bias)
        decisions: Tensor = StraightThrough.apply(logits, window)
    return decisions, logits


def _fwd_fake(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, bn_weight: Tensor | None, bn_bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, fc2_weight: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    n, hidden, out = x.shape[0], fc1_weight.shape[0], fc2_weight.shape[0]
    shapes: list[tuple[Any, ...]] = [(n, out), (n, out), (n, x.shape[1]) if x.dim() == 4 else (0,)]
    shapes += [(n, hidden), (hidden,), (hidden,)]
    return tuple(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _bwd_fake(
    grad_decisions: Tensor | None, grad_logits: Tensor | None, logits: Tensor, features: Tensor, hidden: Tensor,
    mean: Tensor, rstd: Tensor, fc1_weight: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None,
    fc2_weight: Tensor, pixels: int, training: bool, window: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    vector = logits.new_empty(fc1_weight.shape[0])
    norm = (torch.empty_like(vector) for _ in range(2))
    df = torch.empty_like(features, dtype=torch.float32)
    fc2 = (torch.empty_like(fc2_weight), logits.new_empty(fc2_weight.shape[0]))
    return (df, torch.empty_like(fc1_weight), vector, *norm, *fc2)


_TENSORS = ", ".join(["Tensor"] * 6)
register(
    "gate_head_fwd",
    "(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor? bn_weight, Tensor? bn_bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor fc2_weight, Tensor? fc2_bias, bool training, float momentum, float eps) "
    f"-> ({_TENSORS})",
    "gate_head",
    _fwd_fake,
)
register(
    "gate_head_bwd",
    "(Tensor? grad_decisions, Tensor? grad_logits, Tensor logits, Tensor features, Tensor hidden, Tensor mean, "
    "Tensor rstd, Tensor fc1_weight, Tensor? bn_weight, Tensor? bn_bias, Tensor fc2_weight, SymInt pixels, "
    f"bool training, str window) -> ({_TENSORS}, Tensor)",
    "gate_head",
    _bwd_fake,
)


def gate_head_obstacle(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, bn_weight: Tensor | None, bn_bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, fc2_weight: Tensor | None, fc2_bias: Tensor | None,
) -> str | None:  # fmt: skip
    """Why the kernel does not support these arguments, or None."""
    # other heads are used only in ablations of the paper, for which PyTorch is fast enough
    if fc2_weight is None:
        return "its kernel supports heads with two dense layers, and this one has one"
    if fc1_weight.shape[1] != x.shape[1]:
        return f"its kernel supports pooled features, and this head flattens {list(x.shape)}"
    if fc1_weight.dtype != torch.float32:
        return f"its kernel supports float32 parameters, and these are {fc1_weight.dtype}"
    parameters = (fc1_weight, fc1_bias, bn_weight, bn_bias, running_mean, running_var, fc2_weight, fc2_bias)
    for tensor in parameters:
        if tensor is not None and not tensor.is_contiguous():
            return f"its kernel supports contiguous parameters, and one has strides {tensor.stride()}"
    reason = tensor_obstacle(x, *parameters)
    if reason is None:
        from fastgate.kernels.gate_head import MAX_HIDDEN

        if fc1_weight.shape[0] > MAX_HIDDEN:
            return f"its kernel supports up to {MAX_HIDDEN} hidden features, and there are {fc1_weight.shape[0]}"
    return reason


class GateHead(torch.autograd.Function):
    """The fused kernel with its gradients: (decisions, logits)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        means: Tensor | None,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        fc2_weight: Tensor,
        fc2_bias: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        window: str,
    ) -> tuple[Tensor, Tensor]:
        """x is [N, C, H, W], or pooled; a map is not read if its means [N, C] (constants) are known."""
        source = x if means is None else means
        decisions, logits, features, *saved = torch.ops.fastgate.gate_head_fwd(
            source, fc1_weight, fc1_bias, bn_weight, bn_bias, running_mean, running_var, fc2_weight, fc2_bias, training,
            momentum, eps,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        features = source if source.dim() == 2 else features
        ctx.save_for_backward(logits, features, *saved, fc1_weight, bn_weight, bn_bias, fc2_weight)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.options = (x.shape[2] * x.shape[3] if x.dim() == 4 else 1, training, window)
        return decisions, logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x and the parameters; a map's gradient is one value per channel, expanded."""
        if all(grad is None for grad in grads):
            return (None,) * 14
        contiguous = [None if grad is None else grad.contiguous() for grad in grads]
        dx, dw1, db1, dgamma, dbeta, dw2, db2 = torch.ops.fastgate.gate_head_bwd(
            *contiguous, *ctx.saved_tensors, *ctx.options
        )
        dx = dx.to(ctx.dtype)  # before expanding: afterwards it would write a whole map
        if len(ctx.shape) == 4:
            dx = dx[:, :, None, None].expand(ctx.shape)
        gradients = (dx, None, dw1, db1, dgamma, dbeta, None, None, dw2, db2)
        wanted = zip(gradients, ctx.needs_input_grad, strict=False)
        return (*(gradient if needed else None for gradient, needed in wanted), *(None,) * 4)


@dataclass(frozen=True)
class HeadCall(Kind):
    """A kind of call, for :mod:`fastgate.ops.choices`; `means` is the source of the features.

    "map": the means of x are computed; "known": they are cached with x, for the kernel only; "pooled": x is the means.
    """

    operation: ClassVar[str] = "gate_head"

    samples: int
    channels: int
    height: int
    width: int
    hidden: int
    out: int
    dtype: str
    channels_last: bool
    means: str
    training: bool
    gradient: bool  # of x
    learns: bool  # gradients of the parameters

    @classmethod
    def of(
        cls, x: Tensor, means: Tensor | None, fc1_weight: Tensor, fc2_weight: Tensor | None, training: bool
    ) -> "HeadCall":
        """The kind of a call; x is [N, C, H, W] or pooled."""
        records = torch.is_grad_enabled()
        n, c, height, width = x.shape if x.dim() == 4 else (*x.shape, 1, 1)
        return cls(
            n, c, height, width, len(fc1_weight), 0 if fc2_weight is None else len(fc2_weight), inputs.dtype_name(x),
            inputs.is_channels_last(x), "pooled" if x.dim() == 2 else "map" if means is None else "known", training,
            records and x.requires_grad, records and fc1_weight.requires_grad,
        )  # fmt: skip

    def describe(self) -> str:
        """Such as "256x16x32x32 bfloat16, NHWC, 1 gate, means known, backward"."""
        words = [f"{inputs.sizes(self.samples, self.channels, self.height, self.width)} {self.dtype}"]
        words += ["NHWC" if self.channels_last else "NCHW", f"{self.out} gate{'s' if self.out > 1 else ''}"]
        words += [] if self.means == "map" else ["means known"]
        return ", ".join([*words, *(["backward"] if self.gradient or self.learns else [])])

    def candidates(self) -> tuple[str, ...]:
        """The fused kernel; with two samples, gradients through batch norm are only rounding and cannot be compared."""
        return () if self.training and self.samples < 3 else ("triton",)

    def make(self, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        """Features, parameters and gradients with no value near kinks of ReLU and windows, where rounding counts."""
        n, c, hidden, out = self.samples, self.channels, self.hidden, self.out
        make = inputs.Maker(device, generator, self.channels_last)
        shape = (n, c, self.height, self.width)
        x = make.normal((n, c)) if self.means == "pooled" else make.map(shape, self.dtype)
        values = {
            "fc1_weight": make.normal((hidden, c), c**-0.5),
            "fc1_bias": make.normal((hidden,)),
            "bn_weight": 1 + make.normal((hidden,), 0.1),
            "bn_bias": torch.zeros(hidden, device=device),
            "running_mean": make.normal((hidden,), 0.1),
            "running_var": 1 + make.normal((hidden,), 0.1).abs(),
            "fc2_weight": make.normal((out, hidden), hidden**-0.5),
            "fc2_bias": make.normal((out,), 0.1),
        }
        exact = {name: value.double() for name, value in values.items()}
        features = (x if x.dim() == 2 else x.mean((2, 3), dtype=torch.float32)).double()
        before = F.linear(features, exact["fc1_weight"], exact["fc1_bias"])
        statistics = (exact["running_mean"].clone(), exact["running_var"].clone())
        before = F.batch_norm(before, *statistics, exact["bn_weight"], None, self.training, 0.0)
        values["bn_bias"] = exact["bn_bias"] = -_widest_gap(before).float()
        logits = F.linear(F.relu(before + exact["bn_bias"]), exact["fc2_weight"], exact["fc2_bias"])
        at_edge = (logits.abs() - 1).abs() < 1e-3
        # statistics have no gradient, and that of a bias before a batch norm is zero up to rounding
        constant = ("running_mean", "running_var", *(["fc1_bias"] if self.training else []))
        return {
            "x": x.requires_grad_(self.gradient),
            "means": x.detach().mean((2, 3), dtype=torch.float32) if self.means == "known" else None,
            **{name: value.requires_grad_(self.learns and name not in constant) for name, value in values.items()},
            "grad_decisions": make.normal((n, out)).masked_fill(at_edge, 0),
            "grad_logits": make.normal((n, out)),
        }

    def run(self, candidate: str, values: dict[str, Any]) -> tuple[Tensor, ...]:
        """Logits, gradients, decisions minus those implied by the logits, running statistics."""
        values = dict(values)
        x, means, *grads = (values.pop(name) for name in ("x", "means", "grad_decisions", "grad_logits"))
        arguments = (*values.values(), self.training, 0.1, 1e-5, WINDOWS[0])
        if candidate == "triton":
            decisions, logits = GateHead.apply(x, means, *arguments)
        else:
            decisions, logits = gate_head_torch(x, *arguments)
        found = inputs.with_gradients([decisions, logits], grads, (x, *values.values()))
        statistics = (values["running_mean"], values["running_var"])
        return (*found[1:], found[0].detach() - (logits.detach() > 0).to(logits.dtype), *statistics)


def _widest_gap(values: Tensor) -> Tensor:
    """Midpoint of the widest gap between the middle values of each column of [N, M]."""
    n = len(values)
    if n < 2:
        return values[0] - 1
    middle = values.sort(0).values[n // 4 : n - n // 4]
    at = middle.diff(dim=0).argmax(0, keepdim=True)
    return ((middle[:-1] + middle[1:]) / 2).gather(0, at)[0]
