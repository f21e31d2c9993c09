"""Temporary eval mode that restores every module's own mode afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

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
