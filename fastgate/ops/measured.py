"""Which way of computing a gated convolution was measured fastest on this device.

`measured.json` holds, per device and shape, microseconds of the dense convolution and of the ways to skip, at several
open fractions. `python -m bench.choices` measures the device it runs on and writes its entry. Where there is no entry
a rule decides: gather on a CPU where the convolution is not tiny, and nothing else, since there is no measurement that
speaks for it.
"""

import json
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from fastgate.env import cpu_name

TABLE = Path(__file__).with_name("measured.json")

# taking and putting back what is open costs about this share of a dense convolution (0.06 to 0.12 on an AMD EPYC)
_WORTH_GATHERING = 0.9
# below this many multiply-adds (about a millisecond on two cores) asking what is open takes longer than it saves
_WORTH_ASKING = 1e8
# a path is left only for one that was measured faster than this share of its time
_MARGIN = 0.95


@dataclass(frozen=True)
class Call:
    """What a measurement was made for. `gates` is "batch" (one for all samples), "samples" or "pairs"."""

    gates: str
    dtype: str
    training: bool
    kernel: int
    stride: int
    batch: int
    in_channels: int
    out_channels: int
    pixels: int  # of the input map

    @property
    def multiply_adds(self) -> float:
        """Of the dense convolution."""
        size = self.batch * self.pixels * self.in_channels * self.out_channels
        return size * self.kernel**2 / self.stride**2

    def likeness(self, row: dict[str, Any]) -> float:
        """Distance of a row's sizes from these, in doublings; infinite where it is another kind of call."""
        if any(row[name] != getattr(self, name) for name in ("gates", "dtype", "training", "kernel", "stride")):
            return math.inf
        sizes = ("batch", "in_channels", "out_channels", "pixels")
        return sum(abs(math.log2(row[name] / getattr(self, name))) for name in sizes)


def device_key(device: torch.device) -> str:
    """The name under which a device's measurements are kept."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def choose(device: torch.device, call: Call, open_fraction: float | None) -> str:
    """ "dense", "gathered" or "triton".

    Args:
        device: where the call runs.
        call: its kind and sizes; the nearest measured one speaks for it, up to two doublings away in all.
        open_fraction: share of the multiply-adds that is open, None where only the device knows: then what is chosen
            must pay with everything open.
    """
    row = _nearest(device_key(device), call)
    if row is None:
        pays = open_fraction is not None and open_fraction <= _WORTH_GATHERING and call.gates != "pairs"
        return "gathered" if device.type == "cpu" and pays and call.multiply_adds >= _WORTH_ASKING else "dense"
    best, least = "dense", _MARGIN * float(row["us"]["dense"])
    for path, times in row["us"].items():
        if path == "dense" or (path == "gathered" and open_fraction is None):
            continue
        us = _interpolate(times, 1.0 if open_fraction is None else open_fraction)
        if us < least:
            best, least = path, us
    return best


@cache
def read_table() -> dict[str, Any]:
    """Device name -> {"conditions": ..., "rows": [...]}."""
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


@lru_cache(maxsize=4096)
def _nearest(key: str, call: Call) -> dict[str, Any] | None:
    rows = read_table().get(key, {"rows": []})["rows"]
    near = min(rows, key=call.likeness, default=None)
    return near if near is not None and call.likeness(near) <= 2 else None


def _interpolate(times: dict[str, float], fraction: float) -> float:
    """Linear between the measured fractions, constant outside."""
    points = sorted((float(at), us) for at, us in times.items())
    for (low, before), (high, after) in pairwise(points):
        if fraction <= high:
            share = max(0.0, fraction - low) / (high - low)
            return before + share * (after - before)
    return points[-1][1]
