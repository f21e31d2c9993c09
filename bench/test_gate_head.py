"""The gate head: pool, two dense layers with batch norm between them, threshold; and its gradients."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.cases import CASES, CUDA, MODES, Case, check_close, provided, providers
from fastgate import ChannelGate, LayerGate
from fastgate.functional import gate_head
from fastgate.gates import Gate
from fastgate.ops.gate_head import gate_head_torch

# the paper's flattened head is for CIFAR: at 224 pixels its first layer has millions of weights
RUNS = [(case, kind, provider) for case in CASES for kind in ("layer", "channel") for provider in providers(case)]


def gate_for(kind: str, case: Case, device: torch.device) -> Gate:
    channels, size = case.shape[1], (case.shape[2], case.shape[3])
    if kind == "layer":
        return LayerGate(channels).to(device)
    return ChannelGate(channels, spatial_size=size if kind == "flattened" else None).to(device)


def head_arguments(gate: Gate) -> tuple[Tensor | None, ...]:
    bn = gate.bn
    first = (gate.fc1.weight, gate.fc1.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    return (*first, gate.fc2.weight, gate.fc2.bias)


def ours(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return gate_head(x, *arguments, training=True, window="restoring", impl="triton" if CUDA else "auto")


def plain(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return gate_head_torch(x, *arguments, True, 0.1, 1e-5, "restoring")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("case", "kind", "provider"), RUNS, ids=str)
def test_gate_head(
    measure: Callable[..., None], device: torch.device, case: Case, kind: str, mode: str, provider: str
) -> None:
    gate = gate_for(kind, case, device)
    arguments = head_arguments(gate)
    leaves = [tensor for tensor in arguments if tensor is not None and tensor.requires_grad]
    function = provided(provider, ours, plain)

    def step(function: Callable[..., Any], x: Tensor, upstream: Tensor) -> list[Tensor]:
        decisions, logits = function(x, *arguments)
        if mode == "forward":
            return [decisions, logits]
        return [decisions, logits, *torch.autograd.grad(decisions, [x, *leaves], upstream)]

    def make() -> Callable[[], Any]:
        upstream = torch.randn(case.shape[0], gate.gates, device=device)
        return partial(step, function, case.random(device), upstream)

    validate(case, kind, provider, device)
    # x once; its gradient is a row per sample for a pooled head, a map for a flattened one
    maps = 1 if mode == "forward" or kind != "flattened" else 3
    weights = 4 * gate.fc1.weight.numel() * (1 if mode == "forward" else 3)
    measure(
        make, bytes_moved=maps * case.bytes + weights, op="gate_head", kind=kind, case=str(case), mode=mode,
        provider=provider,
    )  # fmt: skip


@cache
def validate(case: Case, kind: str, provider: str, device: torch.device) -> None:
    """Check the logits and their gradients with respect to all inputs, which no threshold affects."""
    gate = gate_for(kind, case, device)
    arguments = [None if t is None else t.detach() for t in head_arguments(gate)]
    x, upstream = case.random(device), torch.randn(case.shape[0], gate.gates, device=device)

    def results(function: Callable[..., Any], dtype: torch.dtype | None) -> dict[str, Tensor]:
        cast = [None if t is None else t.clone().to(dtype or t.dtype) for t in arguments]
        inputs = {"x": x.detach().to(dtype or x.dtype), "fc1": cast[0], "fc2": cast[6]}
        for tensor in inputs.values():
            tensor.requires_grad_()
        _, logits = function(inputs["x"], *cast)
        gradients = torch.autograd.grad(logits, list(inputs.values()), upstream.to(logits.dtype))
        return {"logits": logits.detach(), **{f"d{name}": g for name, g in zip(inputs, gradients, strict=True)}}

    check_close(results(provided(provider, ours, plain), None), results(plain, torch.float64), case.dtype)
