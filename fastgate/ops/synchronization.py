"""Batch statistics over all processes, so that k processes compute the same as one process with all samples.

Inside :func:`synchronized`, every batch norm in training uses statistics over all processes (`torch.nn`'s own
synchronized batch norm needs CUDA), and so do the gate losses and the estimators. Batch norms weight processes by their
number of samples; the losses assume equal numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastgate.ops.dispatch import once_differentiable

_processes: ContextVar[int] = ContextVar("processes", default=1)
_batch_norms: ContextVar[bool] = ContextVar("batch_norms", default=True)
_group: ContextVar[dist.ProcessGroup | None] = ContextVar("group", default=None)


def processes() -> int:
    """Number of processes over which gate losses average: 1 outside :func:`synchronized`."""
    return _processes.get()


def batch_norm_processes() -> int:
    """Number of processes over which batch norms compute statistics."""
    return processes() if _batch_norms.get() else 1


def statistics_obstacle() -> str | None:
    """Why a kernel that computes batch statistics itself cannot be used, or None."""
    if batch_norm_processes() == 1:
        return None
    return f"its kernel supports batch statistics of one process, and these are over {batch_norm_processes()}"


@contextmanager
def synchronized(group: dist.ProcessGroup | None = None, *, batch_norms: bool = True) -> Iterator[None]:
    """Compute batch statistics over all processes of a group; with a single process nothing changes.

    All processes must run the same forward and backward inside, since each step may wait for the others.

    Args:
        group: a `torch.distributed` group; None: the default group.
        batch_norms: also synchronize `F.batch_norm`, by a `TorchFunctionMode`; otherwise only gate losses and
            estimators.
    """
    count = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    if count == 1:
        yield
        return
    tokens = _processes.set(count), _batch_norms.set(batch_norms), _group.set(group)
    try:
        with _SynchronizedBatchNorms() if batch_norms else nullcontext():
            yield
    finally:
        _processes.reset(tokens[0])
        _batch_norms.reset(tokens[1])
        _group.reset(tokens[2])


def all_mean(x: Tensor) -> Tensor:
    """Mean of x over the processes, with gradient; same shape."""
    if processes() == 1:
        return x
    mean: Tensor = _AllMean.apply(x)
    return mean


def rand_like(x: Tensor) -> Tensor:
    """Uniform random numbers like x `[N, ...]`: this process's rows of what one process would draw for all samples.

    The random number generators of all processes stay in the same state.
    """
    if processes() == 1:
        return torch.rand_like(x)
    n = len(x)
    whole = torch.rand(processes() * n, *x.shape[1:], dtype=x.dtype, device=x.device)
    return whole[dist.get_rank(_group.get()) * n :][:n]


class _AllMean(torch.autograd.Function):
    """Mean over processes. Every process's loss depends on it, so backward averages the gradients of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.group = _group.get()
        return _mean_over(ctx.group, x)

    @staticmethod
    @torch.autograd.function.once_differentiable  # saves no tensors: a constant gradient gives a constant result
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _mean_over(ctx.group, grads[0])


def _mean_over(group: dist.ProcessGroup | None, x: Tensor) -> Tensor:
    mean = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(mean, group=group)
    return mean.div_(dist.get_world_size(group))


class _SynchronizedBatchNorms(TorchFunctionMode):
    """Replaces `F.batch_norm` by :func:`_batch_norm` while active, so that networks need not be converted."""

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
    """`F.batch_norm` with statistics over all processes."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    y: Tensor = _BatchNorm.apply(x, running_mean, running_var, weight, bias, momentum, eps)
    return y


class _BatchNorm(torch.autograd.Function):
    """Batch norm in training, with one exchange forward (mean, variance, samples) and one backward (two sums).

    Between the exchanges it is batch norm with constant statistics, computed by PyTorch's own kernels.
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
        channels, group = x.shape[1], _group.get()
        processes = dist.get_world_size(group)
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        # PyTorch's own statistics; torch.var_mean takes ten times as long on channels_last maps (two EPYC cores)
        mean, var = torch.ops.aten.batch_norm_update_stats(exact, None, None, momentum)
        samples = torch.full_like(mean, x.numel() // channels)
        gathered = mean.new_empty(processes * 3, channels)
        dist.all_gather_into_tensor(gathered, torch.stack((mean, var, samples)), group=group)
        means, variances, samples = gathered.view(processes, 3, channels).unbind(1)
        total = samples.sum(0)
        shares = samples / total
        mean = (means * shares).sum(0)
        var = ((variances + (means - mean) ** 2) * shares).sum(0)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((var * (total / (total - 1))).to(running_var), momentum)
        ctx.save_for_backward(x, mean, var, weight, total)
        ctx.group, ctx.eps, ctx.biased = group, eps, bias is not None
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @partial(
        once_differentiable,
        what="batch norms over several processes have no second derivative; train on one process",
    )
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, var, weight, total = ctx.saved_tensors
        _, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
        )
        sums = torch.stack((d_weight, d_bias))  # of grad * normalised x, and of grad
        dist.all_reduce(sums, group=ctx.group)
        sums = sums / total
        # dx = scale * (grad - mean grad - normalised x * mean(grad * normalised x)), affine in grad and x
        deviation = torch.rsqrt(var + ctx.eps)
        scale = deviation if weight is None else deviation * weight
        slope = -scale * deviation * sums[0]
        shape = (1, -1, *(1,) * (x.dim() - 2))
        dx = torch.addcmul((-scale * sums[1] - slope * mean).view(shape), x, slope.view(shape))
        dx = dx.addcmul_(grads[0], scale.view(shape)).to(x.dtype)
        return dx, None, None, None if weight is None else d_weight, d_bias if ctx.biased else None, None, None
