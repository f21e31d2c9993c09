"""The gated residual beside the plain one, y = relu(shortcut + branch)."""

from collections.abc import Callable

import pytest
import torch

from bench.test_gate_head import SHAPES
from fastgate.functional import gated_residual


@pytest.mark.parametrize("gating", ["none", "layer", "channel"])
@pytest.mark.parametrize("stage", SHAPES)
def test_forward_backward(benchmark: Callable, device: torch.device, stage: str, gating: str) -> None:
    n, c, h, w = SHAPES[stage]
    shortcut, branch, upstream = (
        torch.randn(n, c, h, w, device=device).to(memory_format=torch.channels_last) for _ in range(3)
    )
    shortcut.requires_grad_()
    branch.requires_grad_()
    gate = (torch.rand(n, 1 if gating == "layer" else c, 1, 1, device=device) < 0.5).float()

    def step() -> torch.Tensor:
        shortcut.grad = branch.grad = None
        y = torch.relu(shortcut + branch) if gating == "none" else gated_residual(shortcut, branch, gate)
        y.backward(upstream)
        return y

    y = benchmark(step)
    expected = torch.relu(shortcut + branch * (1 if gating == "none" else gate))
    assert torch.equal(y, expected)
