"""Inference by gating and fraction of open gates: the frozen gated network, which skips, and the compact one."""

from collections.abc import Callable

import pytest
import torch

import fastgate as fg


@pytest.mark.parametrize("form", ["frozen", "compact"])
@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("open_ratio", [1.0, 0.75, 0.5, 0.25])
@pytest.mark.parametrize("gating", ["layer", "channel"])
def test_inference(
    benchmark: Callable, device: torch.device, gating: str, open_ratio: float, batch: int, form: str
) -> None:
    torch.manual_seed(0)
    gated = fg.models.resnet20(gating=gating).to(device).to(memory_format=torch.channels_last).eval()
    gates = [gate for _, gate in fg.named_gates(gated)]
    # the same fraction everywhere: of the blocks, or of each block's channels
    total = len(gates) if gating == "layer" else None
    for i, gate in enumerate(gates):
        size = gate.gates if total is None else total
        rank = torch.arange(gate.gates) if total is None else torch.tensor([i])
        gate.freeze(rank * 7 % size < round(open_ratio * size))
    compacted = fg.compact(gated)
    x = torch.randn(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    assert fg.compare(gated, compacted, x) <= 1e-5 * max(1.0, gated(x).detach().abs().max().item())
    benchmark.extra_info["macs"] = fg.macs(compacted, (3, 32, 32))
    with torch.inference_mode():
        benchmark(compacted if form == "compact" else gated, x)
