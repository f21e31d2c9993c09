"""Random inputs of the kinds of calls that :mod:`fastgate.ops.choices` measures, and what they have in common."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def dtype_name(tensor: Tensor) -> str:
    """Such as "float16"."""
    return str(tensor.dtype).removeprefix("torch.")


def sizes(*numbers: int) -> str:
    """Such as "256x16x32x32"."""
    return "x".join(map(str, numbers))


def is_channels_last(x: Tensor) -> bool:
    """Whether a dense [N, C, H, W] tensor has its channels innermost; NCHW wins where both are true."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


class Maker(NamedTuple):
    """Makes tensors on a device from a generator."""

    device: torch.device
    generator: torch.Generator
    channels_last: bool

    def normal(self, shape: Sequence[int], scale: float = 1.0) -> Tensor:
        """fp32, of a standard deviation."""
        return torch.randn(*shape, device=self.device, generator=self.generator) * scale

    def map(self, shape: Sequence[int], dtype: str) -> Tensor:
        """[N, C, H, W] whose means over H and W differ, or weights, in the layout of the call."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        x = self.normal(shape) + self.normal((*shape[:2], 1, 1))
        return x.to(getattr(torch, dtype)).contiguous(memory_format=layout)

    def gate(self, shape: Sequence[int], dtype: str) -> Tensor:
        """Half open, at random."""
        opened = torch.rand(*shape, device=self.device, generator=self.generator) < 0.5
        return opened.to(getattr(torch, dtype))


def with_gradients(
    results: Sequence[Tensor | None], grads: Sequence[Tensor | None], arguments: Sequence[Any]
) -> tuple[Tensor, ...]:
    """The results, then the gradients of the arguments that require them."""
    pairs = [(y, dy) for y, dy in zip(results, grads, strict=True) if y is not None]
    wanted = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    found = [y for y, _ in pairs]
    if wanted:
        found += torch.autograd.grad(found, wanted, [dy for _, dy in pairs])
    return tuple(found)
