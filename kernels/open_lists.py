"""Which channels (or samples) are open, as lists that kernels walk over without asking the host.

Built once per gate and shared by forward and backward.
"""

import torch
import triton
import triton.language as tl
from fastgate.kernels._launch import next_power_of_2
from torch import Tensor


@triton.jit
def _open_lists_kernel(list_ptr, count_ptr, gate_ptr, row_stride, column_stride, n_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    gate_row = gate_ptr + row * row_stride
    total = 0
    first = 0
    while first < n_columns:
        at = first + tl.arange(0, BLOCK)
        gate = tl.load(gate_row + at * column_stride, mask=at < n_columns, other=0.0)
        total += tl.sum((gate != 0).to(tl.int32), axis=0)
        first += BLOCK
    tl.store(count_ptr + row, total)
    next_open = 0
    next_closed = total
    first = 0
    while first < n_columns:
        at = first + tl.arange(0, BLOCK)
        inside = at < n_columns
        gate = tl.load(gate_row + at * column_stride, mask=inside, other=0.0)
        is_open = inside & (gate != 0)
        opened = tl.cumsum(is_open.to(tl.int32), axis=0)
        closed = tl.cumsum((inside & (gate == 0)).to(tl.int32), axis=0)
        place = tl.where(is_open, next_open + opened, next_closed + closed) - 1
        tl.store(list_ptr + row * n_columns + place, at, mask=inside)
        next_open += tl.sum(is_open.to(tl.int32), axis=0)
        next_closed += tl.sum((inside & (gate == 0)).to(tl.int32), axis=0)
        first += BLOCK


def open_lists(gate: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of a 0/1 gate [G, C]: its columns, the open ones first, each part ascending, and how many are open.

    Returns int32 [G, C] and int32 [G].
    """
    rows, columns = gate.shape
    indices = torch.empty((rows, columns), dtype=torch.int32, device=gate.device)
    count = torch.empty((rows,), dtype=torch.int32, device=gate.device)
    _open_lists_kernel[(rows,)](
        indices,
        count,
        gate,
        gate.stride(0),
        gate.stride(1),
        columns,
        BLOCK=next_power_of_2(columns, high=1024),
        num_warps=1 if columns <= 128 else 4,
    )
    return indices, count
