"""Helpers for the processes of a run (`torch.distributed`): rank, main-process work, and reductions.

With a single process, every function does the trivial thing without using `torch.distributed`. Initializing the process
group is left to :mod:`fastgate.training.distributed` or to the user's own trainer. Synchronization inside a network is
in :mod:`fastgate.ops.synchronization`.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def count() -> int:
    """The number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """Whether this is the main process, which writes files and prints."""
    return rank() == 0


def from_main(make: Callable[[], T]) -> T:
    """Call `make` in the main process only and return its result in all; an exception is raised in all."""
    if count() == 1:
        return make()
    made: list[Any] = [None, None]
    if is_main():
        try:
            made[0] = make()
        except Exception as error:
            made[1] = error
    dist.broadcast_object_list(made)
    if made[1] is not None:
        raise made[1]
    result: T = made[0]
    return result


def wait() -> None:
    """Wait until all processes have reached this point."""
    any_process(False)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return bool(all_sum(torch.tensor(float(flag))))


def all_sum(x: Tensor) -> Tensor:
    """Sum of x over the processes, without gradient, on x's device."""
    if count() == 1:
        return x
    exchanged = x.to(_exchange_device(x), copy=True)
    dist.all_reduce(exchanged)
    return exchanged.to(x.device)


def _exchange_device(x: Tensor) -> torch.device:
    """Device on which the processes can exchange x: a group with only NCCL supports only GPUs."""
    if f"{x.device.type}:" in dist.get_backend_config():
        return x.device
    return torch.device("cuda", torch.cuda.current_device())


def average(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean over the processes of each named float tensor, of any shape."""
    if count() == 1 or not values:
        return dict(values)
    flat = all_sum(torch.cat([value.reshape(-1) for value in values.values()])) / count()
    parts = flat.split([value.numel() for value in values.values()])
    return {name: part.reshape(value.shape) for (name, value), part in zip(values.items(), parts, strict=True)}


def gather(value: T) -> list[T]:
    """The values of all processes, in rank order; plain objects."""
    values: list[Any] = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value)
    return values


def share_buffers(model: nn.Module) -> None:
    """Broadcast the main process's buffers, such as running statistics of batch norms, to all processes."""
    for buffer in model.buffers() if count() > 1 else ():
        received = buffer.to(_exchange_device(buffer), copy=True, memory_format=torch.contiguous_format)
        dist.broadcast(received, 0)
        buffer.copy_(received)
