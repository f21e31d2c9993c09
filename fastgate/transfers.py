"""Reading a small tensor of an accelerator on the host without waiting for the device."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class TensorState(NamedTuple):
    """The state of a tensor when it was read, identified by the tensor and its version."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorState":
        """The tensor's current state; tensors of inference mode have no versions."""
        return cls(tensor, -1 if tensor.is_inference() else tensor._version)

    def is_that_of(self, tensor: Tensor) -> bool:
        """Whether the tensor is still the same and in this state."""
        return self.tensor is tensor and self.version == TensorState.of(tensor).version


class Transfer(NamedTuple):
    """The values of a tensor in transfer to the host."""

    state: TensorState
    values: Tensor
    arrived: Callable[[], bool]


def is_on_host(tensor: Tensor) -> bool:
    """Whether its values can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def is_capturing() -> bool:
    """Whether the current stream is being captured in a CUDA graph, which forbids transfers and synchronization."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def send_to_host(tensor: Tensor) -> Transfer | None:
    """Start an asynchronous copy to the host; None if not on CUDA."""
    if not tensor.is_cuda:
        return None
    values, event = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return Transfer(TensorState.of(tensor), values, event.query)
