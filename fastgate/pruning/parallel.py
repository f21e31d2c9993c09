"""Pruning inside `DistributedDataParallel`, whose gradient buckets belong to the parameters at its creation."""

import gc
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastgate.models.hooks import move_hooks


class StaleWrapper(RuntimeError):
    """A wrapper of a network that was pruned after wrapping: it would not average the gradients of new parameters."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Unwrap a network from `DistributedDataParallel`, `nn.DataParallel` and `torch.compile`."""
    while True:
        if isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def wrappers_of(model: nn.Module) -> list[DistributedDataParallel]:
    """All wrappers in this process that contain the network, directly or inside another network."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    found = [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]
    return [each for each in found if any(part is model for part in each.modules())]


def mark_stale(wrapper: DistributedDataParallel) -> None:
    """Make the wrapper's next forward raise; otherwise the processes would silently diverge."""
    if getattr(wrapper, "_fastgate_stale", None) is None:
        wrapper._fastgate_stale = wrapper.register_forward_pre_hook(_refuse, prepend=True)  # type: ignore[assignment]


def _refuse(wrapper: nn.Module, inputs: Any) -> None:
    raise StaleWrapper(
        "DistributedDataParallel: expected a wrapper of the current network, got one created before the network was "
        "pruned, which would not average the gradients of new parameters; wrap the network again after "
        "begin_epoch has returned names or commit was called, for example "
        "model = DistributedDataParallel(model.module), or "
        "model = accelerator.prepare(accelerator.unwrap_model(model))"
    )


def renew(wrapper: DistributedDataParallel) -> None:
    """Reinitialize a wrapper in place, with its settings, for the current parameters of its network.

    All processes must call it. It serves trainers that keep the wrapper where it cannot be replaced.
    """
    settings = {
        "device_ids": wrapper.device_ids,
        "output_device": wrapper.output_device,
        "dim": wrapper.dim,
        "process_group": wrapper.process_group,
        "bucket_cap_mb": wrapper.bucket_bytes_cap / 2**20,
        "find_unused_parameters": wrapper.find_unused_parameters,
        "gradient_as_bucket_view": wrapper.gradient_as_bucket_view,
        "static_graph": wrapper.static_graph,
    }
    broadcast_buffers, training, synchronizes = (
        wrapper.broadcast_buffers,
        wrapper.training,
        wrapper.require_backward_grad_sync,
    )
    if (stale := getattr(wrapper, "_fastgate_stale", None)) is not None:
        stale.remove()
    hooks = nn.Module()
    move_hooks(wrapper, hooks)
    communication = list(wrapper._comm_hooks)
    wrapper.__init__(wrapper.module, **settings)  # type: ignore[misc]
    wrapper.broadcast_buffers, wrapper.training = broadcast_buffers, training
    wrapper.require_backward_grad_sync = synchronizes
    move_hooks(hooks, wrapper)
    for hook, state in communication:
        wrapper.register_comm_hook(state, hook)
