"""Cache of the pooled means of feature maps, from the kernel that wrote a map to the gate head that needs its means.

Means are stored by the identity of the tensor object, so any new tensor made from it (a hook, a copy, a view, a cast, a
recomputation) has none, and with the tensor's version, so an in-place change invalidates them. As everywhere in
autograd, a write through `.data` is not noticed. The means are constants: the gradient of their users goes to the map
itself, where hooks and `torch.autograd.grad` expect it.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastgate.ops.dispatch import transforms_active

_means: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # feature map -> (version, means)


def _out_of_sight(x: Tensor) -> bool:
    """Whether an in-place change would not be noticed, or a lookup would be missing from a recorded graph."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(x) is not Tensor
        or x.is_inference()
        or transforms_active()
    )


def remember_means(x: Tensor, means: Tensor) -> None:
    """Store the means [N, C] of the current x [N, C, H, W]."""
    if not _out_of_sight(x):
        _means[x] = (x._version, means.detach())


def detach(x: Tensor) -> Tensor:
    """x without its graph, and with its stored means."""
    means, x = known_means(x), x.detach()
    if means is not None:
        remember_means(x, means)
    return x


def known_means(x: Tensor) -> Tensor | None:
    """The stored means of x, if x has not changed since; otherwise None."""
    if _out_of_sight(x):
        return None
    version, means = _means.get(x, (None, None))
    return means if version == x._version else None
