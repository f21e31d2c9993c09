"""Temporary changes of state that are undone afterwards: eval mode, random numbers."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put the models into eval mode and restore each module's own mode on exit (a frozen batch norm stays in eval).

    `model.train(was_training)` would overwrite the modes of the children.
    """
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def random_state_kept(device: torch.device | None) -> AbstractContextManager[None]:
    """Restore PyTorch's random number generators of the CPU and of this device on exit."""
    kept: AbstractContextManager[None] = torch.random.fork_rng(
        [] if device is None or device.type != "cuda" else [device]
    )
    return kept
