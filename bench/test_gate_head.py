"""The gate head against what it is compared with in the end: a step without it."""

from collections.abc import Callable

import pytest
import torch

from fastgate import ChannelGate, LayerGate

# block inputs of ResNet-110 on CIFAR at batch 256
SHAPES = {"stage1": (256, 16, 32, 32), "stage2": (256, 32, 16, 16), "stage3": (256, 64, 8, 8)}


@pytest.mark.parametrize("kind", ["layer", "channel"])
@pytest.mark.parametrize("stage", SHAPES)
def test_forward_backward(benchmark: Callable, device: torch.device, stage: str, kind: str) -> None:
    shape = SHAPES[stage]
    gate = (LayerGate if kind == "layer" else ChannelGate)(shape[1]).to(device)
    x = torch.randn(shape, device=device).to(memory_format=torch.channels_last).requires_grad_()
    upstream = torch.randn(shape[0], gate.gates, 1, 1, device=device)

    def step() -> torch.Tensor:
        x.grad = None
        decisions = gate(x)
        decisions.backward(upstream)
        return decisions

    decisions = benchmark(step)
    assert decisions.unique().tolist() in ([0.0], [1.0], [0.0, 1.0])
    assert x.grad is not None and torch.isfinite(x.grad).all()
