"""Running statistics of batch norms that are those of the network as it is, while gates open and close."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastgate.modes import eval_mode
from fastgate.values import Forward, call, to_device_of


def refresh_statistics(model: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None) -> None:
    """Take the running statistics of a network's batch norms, gate heads' among them, anew over these batches.

    Each becomes the mean over the batches of what one batch gives, with weights and decisions as they are now; nothing
    else of the model changes, and no random number is drawn. Batch norms in eval mode stay as they are, as do those
    that do not run (the heads of frozen gates).

    Why: a gate that opens or closes changes at once what every later layer sees, and running statistics lag behind. In
    evaluation that also shifts what later heads see, so that they close what is open in training (digits, seed 3:
    39 % where 83 % were right with fresh statistics: bench/results/search).

    Args:
        model: the network, in training mode.
        batches: the inputs, or tuples or lists whose first item is the inputs, see :func:`fastgate.decide`; as they
            come in training (shuffled, of a training step's size).
        forward: `(model, batch) -> anything`, for networks that are called otherwise.

    Raises:
        ValueError: no batch norm in training mode, or no batch. Then, and where a batch fails, all stays as it was.
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
                inputs = batch[0] if forward is None and isinstance(batch, tuple | list) else batch
                call(model, to_device_of(model, inputs), forward)
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
    """Whether there is anything to take anew."""
    return bool(_norms(model))


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
