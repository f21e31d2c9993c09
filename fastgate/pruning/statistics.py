"""Recomputes running statistics of batch norms, so that they match the current network while gates open and close."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastgate.modes import eval_mode
from fastgate.values import Forward, call, inputs_of, to_device_of


def refresh_statistics(model: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None) -> None:
    """Recompute the running statistics of a network's batch norms, including those of gate heads, over these batches.

    Each becomes the mean of the batch statistics under the current weights and decisions; nothing else in the model
    changes, and no random numbers are drawn. Batch norms that are in eval mode or do not run (heads of frozen gates)
    keep their statistics.

    Why: a gate that opens or closes immediately changes the input of every later layer, and running statistics lag
    behind. In evaluation this also shifts the inputs of later heads, so that they close gates that are open in training
    (digits, seed 3: accuracy 39 % instead of 83 % with fresh statistics: bench/results/search).

    Args:
        model: the network, in training mode.
        batches: the inputs, or tuples or lists whose first item is the inputs, see :func:`fastgate.decide`; as in
            training (shuffled, of the training batch size).
        forward: `(model, batch) -> anything`, for networks with another calling convention.

    Raises:
        ValueError: no batch norm in training mode, or no batches. In this case, or if a batch fails, nothing changes.
    """
    norms = _norms(model)
    if not norms:
        raise ValueError("model: expected batch norms in training mode, got none; call model.train() first")
    before = [(norm.momentum, {name: buffer.clone() for name, buffer in norm.named_buffers()}) for norm in norms]
    seen, whole = 0, False
    try:
        with torch.no_grad(), eval_mode(model), torch.compiler.set_stance("force_eager"):
            for norm in norms:
                norm.reset_running_stats()
                norm.train()
                norm.momentum = None  # the mean over all calls
            for batch in batches:
                call(model, to_device_of(model, inputs_of(batch, forward)), forward)
                seen += 1
        whole = True
    finally:
        for norm, (momentum, buffers) in zip(norms, before, strict=True):
            norm.momentum = momentum
            ran = whole and bool(norm.num_batches_tracked)
            for name, value in buffers.items():
                if not ran or name == "num_batches_tracked":
                    norm.get_buffer(name).copy_(value)
    if not seen:
        raise ValueError("batches: expected at least one, got none")


def has_statistics(model: nn.Module) -> bool:
    """Whether the model has batch norms whose statistics can be recomputed."""
    return bool(_norms(model))


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
