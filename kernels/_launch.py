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


def plane_tile(channels: int, pixels: int, channels_last: bool) -> tuple[int, int]:
    """(channels, pixels) of a tile of about 4096 elements, long in the direction that is contiguous in memory."""
    block_c = next_power_of_2(channels, high=64 if channels_last else 16)
    block_p = next_power_of_2(pixels, high=4096 // block_c)
    return block_c, block_p


def counter(device: torch.device, size: int = 1) -> Tensor:
    """int32 zeros [size or more] that programs of one launch count up and the last of them resets.

    One tensor per device and stream: launches on a stream follow each other, so they can share it. While a CUDA graph
    is captured a new one is made, since zeros filled in then are only filled when the graph runs.
    """
    if device.type != "cuda":
        return torch.zeros(size, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters or _counters[key].numel() < size:
        _counters[key] = torch.zeros(size, dtype=torch.int32, device=device)
    return _counters[key]
