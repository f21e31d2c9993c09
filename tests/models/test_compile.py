"""Gated networks under torch.compile(fullgraph=True) and, on a GPU, in a CUDA graph: the same numbers as eager."""

import pytest
import torch
from torch import Tensor, nn

from fastgate import losses, models

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def gated_pair(gating: str, impl: str) -> tuple[nn.Module, nn.Module]:
    """Two networks with the same weights."""
    pair = [models.resnet(8, gating=gating, impl=impl).to(DEVICE) for _ in range(2)]
    pair[1].load_state_dict(pair[0].state_dict())
    return pair[0], pair[1]


def step(forward: nn.Module, network: nn.Module, x: Tensor) -> Tensor:
    y = forward(x)
    means = losses.gate_means(network)
    loss = y.square().mean() + losses.polarization(means) + losses.budget(means, 0.5)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize(
    ("impl", "gating"),
    [
        ("torch", "layer"),
        ("torch", "channel"),
        ("triton", "layer"),
        pytest.param("triton", "channel", marks=pytest.mark.slow),  # 20 s in the interpreter
    ],
)
@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow] if DEVICE == "cuda" else [pytest.mark.gpu])],
)
def test_one_graph_and_the_same_gradients(backend: str, impl: str, gating: str) -> None:
    torch._dynamo.reset()
    network, eager = gated_pair(gating, impl)
    x = torch.randn(4, 3, 8, 8, device=DEVICE)
    compiled = torch.compile(network, backend=backend, fullgraph=True)
    torch.testing.assert_close(step(compiled, network, x), step(eager, eager, x))
    for (name, got), expected in zip(network.named_parameters(), eager.parameters(), strict=True):
        # fp32 sums in another order through 8 layers of batch norm
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for (name, got), expected in zip(network.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(got, expected, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_inductor_compiles_a_gated_network_in_one_graph() -> None:
    # on a CPU one network is enough: generated C++ takes 15 s or more to compile for each
    torch._dynamo.reset()
    network, eager = gated_pair("layer", "torch")
    x = torch.randn(4, 3, 8, 8, device=DEVICE)
    torch.testing.assert_close(
        step(torch.compile(network, fullgraph=True), network, x), step(eager, eager, x), atol=1e-5, rtol=1e-4
    )


@pytest.mark.gpu
@pytest.mark.parametrize("gating", ["layer", "channel"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_captured_step_replays_the_eager_one(impl: str, gating: str) -> None:
    network, eager = gated_pair(gating, impl)
    batches = [torch.randn(4, 3, 8, 8, device="cuda") for _ in range(3)]
    x = batches[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(network, network, x)  # warm-up: compiles kernels, chooses algorithms
    torch.cuda.current_stream().wait_stream(stream)
    step(eager, eager, x)
    network.zero_grad(set_to_none=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(network, network, x)
    for batch in batches:  # several replays: the counters of finished programs reset themselves
        x.copy_(batch)
        network.zero_grad(set_to_none=False)
        eager.zero_grad()
        graph.replay()
        torch.testing.assert_close(loss, step(eager, eager, batch))
        for (name, got), expected in zip(network.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(got.grad, expected.grad, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
