"""Selection of the implementation of an operation: `impl="auto" | "triton" | "torch"`."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "triton", "torch")

HAS_TRITON = importlib.util.find_spec("triton") is not None

T = TypeVar("T")

_library = torch.library.Library("fastgate", "FRAGMENT")


def requested_impl(impl: str) -> tuple[str, str]:
    """(requested implementation, source of the request): `FASTGATE_IMPL` overrides `impl="auto"`.

    Raises:
        ValueError: an unknown name.
    """
    source = "impl"
    if impl == "auto" and os.environ.get("FASTGATE_IMPL"):
        impl, source = os.environ["FASTGATE_IMPL"], "the environment variable FASTGATE_IMPL"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{source}: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    return impl, source


def resolve_impl(impl: str, operation: str, obstacle: Callable[[], str | None], choose: Callable[[], T]) -> T | str:
    """The implementation of this call: "triton", "torch", or the result of `choose`.

    `FASTGATE_IMPL` overrides `impl="auto"`. An explicit request that cannot be honoured raises.

    Args:
        impl: the requested implementation.
        operation: name for messages.
        obstacle: returns the reason why the operation's kernel does not support this call, or None.
        choose: returns the choice of "auto", from measurements, if there is no obstacle; otherwise PyTorch is used.

    Raises:
        ValueError: an unknown name, or `"triton"` for a call that it does not support.
    """
    impl, source = requested_impl(impl)
    if impl == "torch" or (impl == "auto" and torch.compiler.is_compiling()):
        return "torch"  # a compiler can fuse these operations
    reason = obstacle()
    if impl == "auto":
        return "torch" if reason is not None else choose()
    if reason is not None:
        raise ValueError(f"{operation}: {source} requests 'triton', but {reason}; use 'auto' or 'torch'")
    return "triton"


def transforms_active() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, ...) is active, so that values may not be readable."""
    return bool(torch._C._are_functorch_transforms_active())


def escaped(tensor: Tensor) -> bool:
    """Whether a tensor is left over from a `torch.func` transform that has ended."""
    return not transforms_active() and bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def tensor_obstacle(*tensors: Tensor | None) -> str | None:
    """Why Triton kernels cannot read these tensors, or None."""
    if transforms_active():
        return "its kernels do not support torch.func transforms"
    if not HAS_TRITON:
        return "Triton is not installed"
    for tensor in tensors:
        if tensor is None:
            continue
        if not (tensor.is_cuda or (tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")):
            return f"its kernels run on CUDA (or under TRITON_INTERPRET=1 on a CPU), and a tensor is on {tensor.device}"
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"its kernels take float16, bfloat16 and float32, and a tensor is {tensor.dtype}"
        if tensor.dim() == 4 and not (
            tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
        ):
            return f"its kernels read dense NCHW or channels_last tensors, and one has strides {tensor.stride()}"
    return None


class _NoSecondDerivative(torch.autograd.Function):
    """Identity on gradients that raises when it is differentiated."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, what: str, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.what = what
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(f"{ctx.what} to differentiate gradients")


def once_differentiable(
    backward: Callable[..., Any],
    what: str = "fastgate's kernels have no second derivative; use impl='torch'",
) -> Callable[..., Any]:
    """Decorator for a backward without a derivative: differentiating its result raises an error with `what`.

    PyTorch's decorator of the same name does not raise if the incoming gradient is a constant; results that depend on
    saved tensors are then silently treated as constants too.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        return _NoSecondDerivative.apply(torch.zeros((), requires_grad=True), what, *found)

    return wrapper


def device_guard(arguments: tuple[Any, ...]) -> AbstractContextManager[Any]:
    """Context in which the first tensor's GPU is current, as Triton launches on the current GPU."""
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def register(name: str, schema: str, module: str, fake: Callable[..., Any]) -> None:
    """Register a dispatcher operation `fastgate::name`, for CUDA and for Triton's interpreter on the CPU, once.

    Args:
        name: name of the operation.
        schema: its arguments and results.
        module: module of `fastgate.kernels` with a launcher of the same name; imported at the first call.
        fake: returns results of the right shapes, dtypes and layouts.
    """
    if hasattr(torch.ops.fastgate, name):
        return  # a reloaded module: the first registration stays

    def launch(*arguments: Any) -> Any:
        with device_guard(arguments):
            return getattr(importlib.import_module(f"fastgate.kernels.{module}"), name)(*arguments)

    _library.define(name + schema)
    _library.impl(name, launch, "CUDA")
    _library.impl(name, launch, "CPU")
    torch.library.register_fake(f"fastgate::{name}", fake, lib=_library)
