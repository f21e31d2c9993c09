"""Means of a map over its pixels that travel with it, from the kernel that wrote it to the gate head that asks.

They are kept by the identity of the tensor object, so whatever makes another tensor of it (a hook, a copy, a view, a
cast, a recomputation) leaves them behind, and with the version at which they were true, so a change in place makes them
void.
As everywhere in autograd, a write through `.data` goes unseen. They are constants: the gradient of who uses them
belongs to the map itself, where hooks and `torch.autograd.grad` look for it.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastgate.ops.dispatch import transforms_active

_means: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # map -> (version, means)


def _out_of_sight(x: Tensor) -> bool:
    """Whether a change in place would go unseen, or what is looked up here would be left out of a recording."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(x) is not Tensor
        or x.is_inference()
        or transforms_active()
    )


def remember_means(x: Tensor, means: Tensor) -> None:
    """Let `means` [N, C] travel with x [N, C, H, W] as it is now."""
    if not _out_of_sight(x):
        _means[x] = (x._version, means.detach())


def known_means(x: Tensor) -> Tensor | None:
    """The means that travel with x, if x has not changed since."""
    if _out_of_sight(x):
        return None
    version, means = _means.get(x, (None, None))
    return means if version == x._version else None
