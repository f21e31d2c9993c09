"""Benchmark cases: block inputs of the library's target networks, dtypes, and providers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
MODES = ("forward", "forward+backward")
PROVIDERS = ("fastgate", "eager", "compile")

# sm_75 has no bf16 units
LOW_PRECISION = torch.bfloat16 if CUDA and torch.cuda.get_device_capability() >= (8, 0) else torch.float16


@dataclass(frozen=True)
class Case:
    """The input of a residual block, `[N, C, H, W]` in channels_last."""

    network: str
    stage: int
    shape: tuple[int, int, int, int]
    dtype: torch.dtype

    def __str__(self) -> str:
        """A readable test id."""
        return f"{self.network}-stage{self.stage}-batch{self.shape[0]}-{str(self.dtype).removeprefix('torch.')}"

    def random(self, device: torch.device, requires_grad: bool = True) -> Tensor:
        """Standard normal values, channels_last."""
        x = torch.randn(self.shape, device=device, dtype=self.dtype).to(memory_format=torch.channels_last)
        return x.requires_grad_(requires_grad)

    @property
    def bytes(self) -> int:
        """Size of one such tensor."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def _cases() -> Iterator[Case]:
    """ResNet-110 on CIFAR at batch 64 and 256, ResNet-50 on ImageNet at batch 64; on a CPU ResNet-110 at 64, fp32."""
    for stage, (channels, side) in enumerate([(16, 32), (32, 16), (64, 8)], 1):
        for batch in (64, 256) if CUDA else (64,):
            yield Case("resnet110", stage, (batch, channels, side, side), LOW_PRECISION if CUDA else torch.float32)
    if CUDA:
        yield Case("resnet110", 1, (256, 16, 32, 32), torch.float32)
        for stage, (channels, side) in enumerate([(256, 56), (512, 28), (1024, 14), (2048, 7)], 1):
            yield Case("resnet50", stage, (64, channels, side, side), LOW_PRECISION)


CASES = list(_cases())


def providers(case: Case) -> tuple[str, ...]:
    """The providers measured on a case. On a CPU, torch.compile only on the first stage: C++ compilation takes 15 s."""
    return PROVIDERS if CUDA or case.stage == 1 else ("fastgate", "eager")


def provided(provider: str, ours: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a provider: our kernel (on a CPU our plain path), PyTorch, or torch.compile."""
    if provider == "compile":
        torch._dynamo.config.recompile_limit = 1000  # one per shape; the default gives up after eight
        return torch.compile(plain, dynamic=False)
    return ours if provider == "fastgate" else plain


def check_close(got: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Check that every tensor is as close to its fp64 reference as its dtype allows: only correct results are timed."""
    for name, expected in exact.items():
        error = (got[name].double() - expected).norm() / expected.norm().clamp_min(1e-30)
        # rounding of every value, and of the sums over up to a few thousand of them
        allowed = 16 * torch.finfo(dtype).eps
        if not error <= allowed:
            raise AssertionError(f"{name}: relative error {error:.3g} against fp64, allowed {allowed:.3g}")
