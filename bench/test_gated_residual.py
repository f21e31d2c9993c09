"""The gated residual, y = relu(shortcut + gate * branch), at several open fractions, and the ungated one."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.cases import CASES, CUDA, MODES, Case, check_close, provided, providers
from fastgate.functional import gated_residual
from fastgate.ops.gated_residual import gated_residual_torch

# only the kernel's time can depend on the open fraction; without a gate there is nothing to close
RUNS = [
    (case, kind, open_fraction, provider)
    for case in CASES
    for kind in ("layer", "channel")
    for provider in providers(case)
    for open_fraction in ((1.0, 0.5, 0.0) if provider == "fastgate" else (0.5,))
] + [(case, "none", 1.0, "ungated") for case in CASES]


def ours(shortcut: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return gated_residual(shortcut, branch, gate, impl="triton" if CUDA else "auto")


def plain(shortcut: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return gated_residual_torch(shortcut, branch, gate, True)


def ungated(shortcut: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return torch.relu(shortcut + branch)


def inputs(case: Case, kind: str, open_fraction: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    n, c = case.shape[:2]
    sizes = (n, c, 1, 1) if kind == "channel" else (n, 1, 1, 1)
    gate = (torch.rand(sizes, device=device) < open_fraction).to(case.dtype).requires_grad_()
    return case.random(device), case.random(device), gate


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("case", "kind", "open_fraction", "provider"), RUNS, ids=str)
def test_gated_residual(
    measure: Callable[..., None],
    device: torch.device,
    case: Case,
    kind: str,
    open_fraction: float,
    mode: str,
    provider: str,
) -> None:
    function = ungated if provider == "ungated" else provided(provider, ours, plain)

    def step(shortcut: Tensor, branch: Tensor, gate: Tensor, upstream: Tensor) -> list[Tensor]:
        y = function(shortcut, branch, gate)
        if mode == "forward":
            return [y]
        wanted = [shortcut, branch] if provider == "ungated" else [shortcut, branch, gate]
        return [y, *torch.autograd.grad(y, wanted, upstream)]

    def make() -> Callable[[], Any]:
        return partial(step, *inputs(case, kind, open_fraction, device), case.random(device, requires_grad=False))

    if provider != "ungated":
        validate(case, kind, open_fraction, provider, device)
    # forward: shortcut, y, and of the branch what is open; backward: dy, y, dshortcut, dbranch, and branch for dgate
    read = 1.0 if provider == "ungated" else open_fraction
    maps = 2 + read + (0 if mode == "forward" else 4 if provider == "ungated" else 5)
    measure(
        make, bytes_moved=int(maps * case.bytes), op="gated_residual", kind=kind, case=str(case), mode=mode,
        provider=provider, open_fraction=open_fraction,
    )  # fmt: skip


@cache
def validate(case: Case, kind: str, open_fraction: float, provider: str, device: torch.device) -> None:
    """Check y and every gradient."""
    tensors = inputs(case, kind, open_fraction, device)
    upstream = case.random(device, requires_grad=False)

    def results(function: Callable[..., Any], dtype: torch.dtype | None) -> dict[str, Tensor]:
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
        y = function(*leaves)
        gradients = torch.autograd.grad(y, leaves, upstream.to(y.dtype))
        return {"y": y.detach(), **dict(zip(("dshortcut", "dbranch", "dgate"), gradients, strict=True))}

    check_close(results(provided(provider, ours, plain), None), results(plain, torch.float64), case.dtype)
