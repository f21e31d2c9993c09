"""What every launcher needs: memory layout of the tensors, tile sizes, counters of finished programs."""

import os

import torch
import triton
from torch import Tensor

# Triton interprets kernels on the CPU where this was set before the kernels were defined
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_counters: dict[tuple[torch.device, int], Tensor] = {}


def is_channels_last(x: Tensor) -> bool:
    """Whether a dense [N, C, H, W] tensor has its channels innermost; NCHW wins where both are true."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def next_power_of_2(n: int, low: int = 1, high: int = 1 << 30) -> int:
    """The smallest power of two that is at least n, kept between low and high."""
    return max(low, min(high, triton.next_power_of_2(n)))


def plane_tile(channels: int, pixels: int) -> tuple[int, int]:
    """(channels, pixels) of a tile of about 4096 elements: up to 64 channels, so that few networks need several."""
    block_c = next_power_of_2(channels, high=64)
    block_p = next_power_of_2(pixels, high=4096 // block_c)
    return block_c, block_p


# zeros made before anything is captured, for captured launches: per device (the tensor, how many are given out)
_supplies: dict[torch.device, tuple[Tensor, int]] = {}
_SUPPLY = 1 << 18


def counter(device: torch.device, size: int = 1) -> Tensor:
    """int32 zeros [size or more] that programs of one launch count up and the last of them resets.

    One tensor per device and stream: launches on a stream follow each other, so they can share it. A captured launch
    gets its own for good, since its graph may run beside any stream or graph: from a supply that eager launches fill,
    which come first (compiling a kernel cannot be captured). Where it is empty, the graph fills zeros in each time.
    """
    if device.type != "cuda":
        return torch.zeros(size, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        return _from_supply(device, size)
    if device not in _supplies or _supplies[device][1] > _SUPPLY // 2:
        _supplies[device] = (torch.zeros(_SUPPLY, dtype=torch.int32, device=device), 0)
        torch.cuda.current_stream(device).synchronize()  # graphs may run on any stream
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters or _counters[key].numel() < size:
        _counters[key] = torch.zeros(size, dtype=torch.int32, device=device)
    return _counters[key]


def _from_supply(device: torch.device, size: int) -> Tensor:
    """Zeros that nobody else gets, from an address that is a multiple of 16: for others Triton compiles anew."""
    zeros, used = _supplies.get(device, (None, 0))
    if zeros is None or used + size > len(zeros):
        return torch.zeros(size, dtype=torch.int32, device=device)
    _supplies[device] = (zeros, used + (size + 3) // 4 * 4)
    return zeros[used : used + size]
