"""The lists of what is open, in Triton's interpreter (on a GPU: as compiled)."""

import pytest
import torch
from fastgate.kernels.open_lists import open_lists
from torch import Tensor

from tests.kernels.compare import poisoned_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_gate(*shape: int) -> Tensor:
    return (torch.rand(shape) < 0.5).float()


@pytest.mark.parametrize(
    "gate",
    [
        pytest.param(random_gate(3, 17), id="odd"),
        pytest.param(torch.ones(2, 5), id="all-open"),
        pytest.param(torch.zeros(2, 5), id="all-closed"),
        pytest.param(torch.tensor([[1.0], [0.0]]), id="one-column"),
        pytest.param(torch.tensor([[0.0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 1, 0]]), id="first-and-last"),
        pytest.param(random_gate(2, 2500), id="several-blocks-of-1024"),
        pytest.param(random_gate(70, 3).t(), id="transposed"),  # the samples of every channel
        pytest.param(torch.ones(1, 1).expand(7, 1).t(), id="expanded"),  # one switch for all samples
        pytest.param(torch.zeros(2, 0), id="no-columns"),
        pytest.param(random_gate(3, 17).half(), id="fp16"),
        pytest.param(random_gate(3, 17).bfloat16(), id="bf16"),
    ],
)
def test_lists_are_the_open_columns_then_the_closed_ones(gate: Tensor) -> None:
    gate = gate.to(DEVICE)
    if gate.numel() > 2 * 5 and not bool(gate.all()):
        assert bool(gate.any()), "a draw with nothing open would show little"
    with poisoned_memory():
        lists, counts = open_lists(gate)
    assert lists.dtype == counts.dtype == torch.int32
    for row, columns, count in zip(gate, lists, counts, strict=True):
        opened, closed = row.nonzero().flatten(), (row == 0).nonzero().flatten()
        assert count == len(opened)
        assert columns.tolist() == [*opened.tolist(), *closed.tolist()]


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed: bool) -> None:
    gate = random_gate(3, 5).to(DEVICE)
    torch.library.opcheck(torch.ops.fastgate.open_lists.default, (gate.t() if transposed else gate,))
