"""The gated convolution by open fraction: skipping kernels, the choice of `auto`, dense and pruned convolutions."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import CUDA, LOW_PRECISION, check_close
from bench.record_gates import read_gates
from fastgate.functional import gated_conv2d
from fastgate.ops.gated_conv import gated_conv2d_torch

MODES = ("forward", "dgrad", "wgrad")
# "pruned" has the open channels only, for any kind of gate: the limit for any way of skipping
PROVIDERS = ("fastgate", "auto", "dense", "compile", "pruned") if CUDA else ("auto", "dense", "pruned")


@dataclass(frozen=True)
class Convolution:
    """A convolution of a residual block, with as many outputs as inputs."""

    network: str
    stage: int
    batch: int
    channels: int
    side: int

    def __str__(self) -> str:
        """A readable test id."""
        return f"{self.network}-stage{self.stage}-batch{self.batch}"


_CIFAR = [(16, 32), (32, 16), (64, 8)]
_IMAGENET = [(64, 56), (128, 28), (256, 14), (512, 7)]
CONVOLUTIONS = [
    *(Convolution("resnet110", i, 256 if CUDA else 64, *sizes) for i, sizes in enumerate(_CIFAR, 1)),
    *(Convolution("resnet50", i, 64, *sizes) for i, sizes in enumerate(_IMAGENET, 1) if CUDA),
]
DTYPES = (LOW_PRECISION, torch.float32) if CUDA else (torch.float32,)
# the channels that a training run kept in the second block of each stage, for the whole batch
SETTLED = Path(__file__).parent / "results" / "training" / "cifar10-resnet20-channel" / "decisions.json"
# and the decisions of its live gates for each test image in another run (see `bench.record_gates`)
REAL = ("settled", "recorded")
RUNS = [
    (conv, dtype, kind, fraction, provider)
    for conv in CONVOLUTIONS
    for dtype in (DTYPES if conv.network == "resnet110" else DTYPES[:1])
    for kind in ("pairs", "batch")
    for provider in PROVIDERS
    # providers that cannot skip do not depend on the open fraction
    for fraction in ((0.5,) if provider in ("dense", "compile") else (1.0, 0.75, 0.5, 0.25, 0.0))
    if not (provider == "pruned" and (kind == "pairs" or fraction == 0.0))
] + [
    (conv, dtype, kind, None, provider)
    for conv in CONVOLUTIONS
    for dtype in DTYPES
    for kind in REAL
    for provider in PROVIDERS
    if conv.network == "resnet110"
]


def real_gate(conv: Convolution, kind: str) -> Tensor:
    """Decisions of a run on CIFAR-10, bool: settled for the batch [1, C], or recorded for real images [N, C]."""
    if kind == "settled":
        return torch.tensor([json.loads(SETTLED.read_text())["gates"][f"layer{conv.stage}.1.gate"]["open"]])
    images = read_gates()[0][conv.stage]
    return images[torch.arange(conv.batch) % len(images)]


def make_gate(conv: Convolution, kind: str, fraction: float | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A gate that opens exactly this fraction of the channels, drawn per sample or for the batch; or a real gate."""
    if fraction is None:
        return real_gate(conv, kind).to(device, dtype)
    rows = conv.batch if kind == "pairs" else 1
    rank = torch.rand(rows, conv.channels, device=device).argsort(1)
    return (rank < round(fraction * conv.channels)).to(dtype)


def open_share(conv: Convolution, kind: str, fraction: float | None) -> float:
    return float(real_gate(conv, kind).float().mean()) if fraction is None else fraction


def convolve(provider: str, x: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    if provider == "pruned":
        return F.conv2d(x, weight, None, 1, 1)
    impl = {"fastgate": "triton", "auto": "auto"}.get(provider, "torch")
    return gated_conv2d(x, weight, in_gate=gate, impl=impl)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("conv", "dtype", "kind", "fraction", "provider"), RUNS, ids=str)
def test_gated_conv(
    measure: Callable[..., None],
    device: torch.device,
    conv: Convolution,
    dtype: torch.dtype,
    kind: str,
    fraction: float | None,
    provider: str,
    mode: str,
) -> None:
    torch.backends.cudnn.benchmark = True
    share = open_share(conv, kind, fraction)
    open_channels = round(share * conv.channels)
    inputs = open_channels if provider == "pruned" else conv.channels
    function = partial(convolve, provider)
    if provider == "compile":
        torch._dynamo.config.recompile_limit = 1000
        function = torch.compile(partial(convolve, "dense"), dynamic=False)

    def make() -> Callable[[], Any]:
        layout = torch.channels_last
        x = torch.randn(conv.batch, inputs, conv.side, conv.side, device=device, dtype=dtype)
        x = x.to(memory_format=layout).requires_grad_(mode == "dgrad")
        weight = torch.randn(conv.channels, inputs, 3, 3, device=device, dtype=dtype) / (9 * inputs) ** 0.5
        weight = weight.to(memory_format=layout).requires_grad_(mode == "wgrad")
        gate = make_gate(conv, kind, fraction, dtype, device)
        if mode == "forward":
            return partial(function, x, weight, gate)
        # the forward is not timed; its graph serves every call
        y = function(x, weight, gate)
        dy = torch.randn_like(y)
        return partial(torch.autograd.grad, y, x if mode == "dgrad" else weight, dy, retain_graph=True)

    if provider != "pruned":
        validate(conv, dtype, kind, fraction, provider, device)
    # read what is open, write everything (forward) or what is open (the gradients of it)
    dense = conv.batch * conv.channels * conv.side**2 * dtype.itemsize
    measure(
        make, bytes_moved=int(dense * (1 + share)) + 9 * conv.channels**2 * dtype.itemsize, op="gated_conv",
        kind=kind, case=f"{conv}-{str(dtype).removeprefix('torch.')}", mode=mode, provider=provider,
        open_fraction=share,
    )  # fmt: skip


@cache
def validate(
    conv: Convolution, dtype: torch.dtype, kind: str, fraction: float | None, provider: str, device: torch.device
) -> None:
    """Check y and both gradients on a small batch."""
    batch = 8
    small = Convolution(conv.network, conv.stage, batch, conv.channels, conv.side)
    x = torch.randn(batch, conv.channels, conv.side, conv.side, device=device, dtype=dtype)
    weight = torch.randn(conv.channels, conv.channels, 3, 3, device=device, dtype=dtype) / (9 * conv.channels) ** 0.5
    gate = make_gate(small, kind, fraction, dtype, device)
    dy = torch.randn_like(x)

    def results(function: Callable[..., Tensor], as_dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [t.detach().to(as_dtype).requires_grad_() for t in (x, weight)]
        y = function(*leaves, gate.to(as_dtype))
        gradients = torch.autograd.grad(y, leaves, dy.to(as_dtype))
        return {"y": y.detach(), "dx": gradients[0], "dweight": gradients[1]}

    # PyTorch lets cuDNN use TF32 for fp32: 10 bits of mantissa, as in fp16
    precision = torch.float16 if dtype == torch.float32 and CUDA else dtype
    exact = results(lambda a, b, g: gated_conv2d_torch(a, b, g, None, 1, 1), torch.float64)
    check_close(results(partial(convolve, "dense" if provider == "compile" else provider), dtype), exact, precision)
