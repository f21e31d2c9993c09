"""Helpers for all launchers: memory layout of tensors, tile sizes, counters of finished programs."""

import os

import torch
import triton
from torch import Tensor

# Triton interprets kernels on the CPU if this was set before the kernels were defined
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_counters: dict[tuple[torch.device, int], Tensor] = {}


def is_channels_last(x: Tensor) -> bool:
    """Whether a dense [N, C, H, W] tensor is channels_last; False if it is also contiguous."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def next_power_of_2(n: int, low: int = 1, high: int = 1 << 30) -> int:
    """The smallest power of two that is at least n, clamped to [low, high]."""
    return max(low, min(high, triton.next_power_of_2(n)))


def plane_tile(channels: int, pixels: int) -> tuple[int, int]:
    """(channels, pixels) of a tile of about 4096 elements; up to 64 channels, which suffices for most networks."""
    block_c = next_power_of_2(channels, high=64)
    block_p = next_power_of_2(pixels, high=4096 // block_c)
    return block_c, block_p


# zeros allocated before any capture, for captured launches: device -> (tensor, number of elements handed out)
_supplies: dict[torch.device, tuple[Tensor, int]] = {}
_SUPPLY = 1 << 18


def counter(device: torch.device, size: int = 1) -> Tensor:
    """int32 zeros [size or more] that the programs of a launch increment and the last one resets.

    There is one tensor per device and stream, since launches on a stream run in order. A captured launch gets its own
    permanently, since its graph may run concurrently with any stream or graph. It comes from a supply that is filled by
    eager launches, which always come first (compiling a kernel cannot be captured). If the supply is empty, the graph
    zeroes a new tensor on every replay.
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
    """Unshared zeros at an address that is a multiple of 16, as Triton would recompile for other alignments."""
    zeros, used = _supplies.get(device, (None, 0))
    if zeros is None or used + size > len(zeros):
        return torch.zeros(size, dtype=torch.int32, device=device)
    _supplies[device] = (zeros, used + (size + 3) // 4 * 4)
    return zeros[used : used + size]
