"""Random inputs for the kinds of calls that :mod:`fastgate.ops.choices` measures, and shared helpers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def dtype_name(tensor: Tensor) -> str:
    """Name of the dtype, such as "float16"."""
    return str(tensor.dtype).removeprefix("torch.")


def sizes(*numbers: int) -> str:
    """Sizes as text, such as "256x16x32x32"."""
    return "x".join(map(str, numbers))


def is_channels_last(x: Tensor) -> bool:
    """Whether a dense [N, C, H, W] tensor is channels_last; False if it is also contiguous."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


class Maker(NamedTuple):
    """Creates random tensors on a device."""

    device: torch.device
    generator: torch.Generator
    channels_last: bool

    def normal(self, shape: Sequence[int], scale: float = 1.0) -> Tensor:
        """Normally distributed, in fp32, with standard deviation `scale`."""
        return torch.randn(*shape, device=self.device, generator=self.generator) * scale

    def map(self, shape: Sequence[int], dtype: str) -> Tensor:
        """Feature maps [N, C, H, W] with different means over H and W, or weights, in the layout of the call."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        x = self.normal(shape) + self.normal((*shape[:2], 1, 1))
        return x.to(getattr(torch, dtype)).contiguous(memory_format=layout)

    def gate(self, shape: Sequence[int], dtype: str) -> Tensor:
        """A random gate, half open."""
        opened = torch.rand(*shape, device=self.device, generator=self.generator) < 0.5
        return opened.to(getattr(torch, dtype))


def with_gradients(
    results: Sequence[Tensor | None], grads: Sequence[Tensor | None], arguments: Sequence[Any]
) -> tuple[Tensor, ...]:
    """The results, followed by the gradients of the arguments that require grad."""
    pairs = [(y, dy) for y, dy in zip(results, grads, strict=True) if y is not None]
    wanted = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    found = [y for y, _ in pairs]
    if wanted:
        found += torch.autograd.grad(found, wanted, [dy for _, dy in pairs])
    return tuple(found)
