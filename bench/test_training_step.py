"""A training step of a gated network and of the ungated one, in turns: ResNet-20 on a CPU, ResNet-110 on a GPU."""

import statistics
from typing import Any

import torch
import torch.nn.functional as F

import fastgate as fg
from bench.cases import CUDA, LOW_PRECISION
from bench.conftest import device_clock
from bench.timing import Call
from fastgate.losses import gate_means

BATCH = 256  # that of the CIFAR recipes
ROUNDS = 20


def training_step(depth: int, gating: str | None, device: torch.device) -> Call:
    """One step of SGD with the gate losses, on a GPU under autocast and captured in a CUDA graph."""
    torch.manual_seed(0)
    options: dict[str, Any] = {} if gating is None else {"impl": "triton" if CUDA else "auto"}
    network = fg.models.resnet(depth, gating=gating, **options).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(BATCH, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, LOW_PRECISION, enabled=CUDA):
            loss = F.cross_entropy(network(images), labels)
        if gating is not None:
            means = gate_means(network)
            loss = loss + fg.polarization(means) + fg.budget(means, 0.5)
        loss.backward()
        optimizer.step()

    if not CUDA:
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def test_training_step(benchmark: Any, device: torch.device) -> None:
    depth = 110 if CUDA else 20
    steps = {gating or "ungated": training_step(depth, gating, device) for gating in (None, "layer", "channel")}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range((ROUNDS if benchmark.enabled else 1) + 2):
        for name, step in steps.items():
            start = device_clock()
            step()
            if turn >= 2:  # the first two warm up
                seconds[name].append(device_clock() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    benchmark.extra_info.update(
        op="training_step", case=f"resnet{depth}-batch{BATCH}", milliseconds={k: 1e3 * v for k, v in medians.items()}
    )
    # within a round the machine is the same for all
    benchmark.extra_info["ratio"] = {
        name: statistics.median(a / b for a, b in zip(values, seconds["ungated"], strict=True))
        for name, values in seconds.items()
    }
    benchmark.pedantic(steps["layer"], rounds=3)
