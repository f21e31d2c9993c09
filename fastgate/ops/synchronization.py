"""Batch statistics over the samples of all processes, so that k processes compute what one does with all samples.

Inside :func:`synchronized` every batch norm in training takes its statistics over all processes (`torch.nn`'s own
synchronised batch norm needs CUDA), and so does what asks :func:`processes`: the gate losses and the estimators.
Every process has as many samples as the others.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

_processes: ContextVar[int] = ContextVar("processes", default=1)


def processes() -> int:
    """Over how many processes batch statistics are taken here: 1 outside of :func:`synchronized`."""
    return _processes.get()


def statistics_obstacle() -> str | None:
    """Why a kernel that takes batch statistics itself cannot serve here, or None."""
    if processes() == 1:
        return None
    return f"its kernel takes batch statistics of one process, and they are taken over {processes()}"


@contextmanager
def synchronized() -> Iterator[None]:
    """Take batch statistics over all processes of `torch.distributed`'s default group; with one nothing changes.

    All processes do the same work inside, and backward too, as each of its steps may wait for the others.
    """
    count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if count == 1:
        yield
        return
    token = _processes.set(count)
    try:
        with _SynchronizedBatchNorms():
            yield
    finally:
        _processes.reset(token)


def all_mean(x: Tensor) -> Tensor:
    """The mean of x over the processes, with gradient; the same shape."""
    if processes() == 1:
        return x
    mean: Tensor = _AllMean.apply(x)
    return mean


def rand_like(x: Tensor) -> Tensor:
    """Uniform numbers for this process' samples x `[N, ...]`: its rows of what one process would draw for all samples.

    The random state stays the same in all processes.
    """
    if processes() == 1:
        return torch.rand_like(x)
    n = len(x)
    whole = torch.rand(processes() * n, *x.shape[1:], dtype=x.dtype, device=x.device)
    return whole[dist.get_rank() * n :][:n]


class _AllMean(torch.autograd.Function):
    """Mean over processes. Every process' loss depends on it, so backward gathers the gradients of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mean = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(mean)
        return mean.div_(dist.get_world_size())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _AllMean.forward(ctx, grads[0])


class _SynchronizedBatchNorms(TorchFunctionMode):
    """While active, `F.batch_norm` is :func:`_batch_norm`: networks need not be converted, nor converted back."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` with the statistics of all processes."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    y: Tensor = _BatchNorm.apply(x, running_mean, running_var, weight, bias, momentum, eps)
    return y


class _BatchNorm(torch.autograd.Function):
    """Batch norm in training, one exchange forward (mean, variance) and one backward (two sums) per channel.

    Between the exchanges it is batch norm with constant statistics, for which PyTorch's own kernels serve.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        channels, count = x.shape[1], dist.get_world_size()
        samples = count * x.numel() // channels
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        # PyTorch's own statistics; torch.var_mean takes ten times as long on channels_last maps (two EPYC cores)
        mean, var = torch.ops.aten.batch_norm_update_stats(exact, None, None, momentum)
        gathered = mean.new_empty(count * 2, channels)
        dist.all_gather_into_tensor(gathered, torch.stack((mean, var)))
        means, variances = gathered[::2], gathered[1::2]
        mean = means.mean(0)
        var = (variances + (means - mean) ** 2).mean(0)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((var * (samples / (samples - 1))).to(running_var), momentum)
        ctx.save_for_backward(x, mean, var, weight)
        ctx.samples, ctx.eps, ctx.biased = samples, eps, bias is not None
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, var, weight = ctx.saved_tensors
        _, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
        )
        sums = torch.stack((d_weight, d_bias))  # of grad * normalised x, and of grad
        dist.all_reduce(sums)
        sums = sums / ctx.samples
        # dx = scale * (grad - mean grad - normalised x * mean(grad * normalised x)), affine in grad and x
        deviation = torch.rsqrt(var + ctx.eps)
        scale = deviation if weight is None else deviation * weight
        slope = -scale * deviation * sums[0]
        shape = (1, -1, *(1,) * (x.dim() - 2))
        dx = torch.addcmul((-scale * sums[1] - slope * mean).view(shape), x, slope.view(shape))
        dx = dx.addcmul_(grads[0], scale.view(shape)).to(x.dtype)
        return dx, None, None, None if weight is None else d_weight, d_bias if ctx.biased else None, None, None
