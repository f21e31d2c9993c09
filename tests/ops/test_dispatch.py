"""Registering operations, and saying why a kernel cannot serve."""

import importlib

import pytest
import torch

from fastgate.functional import gated_residual
from fastgate.ops import dispatch
from fastgate.ops import gated_residual as operation


def test_registering_an_operation_twice_keeps_the_first() -> None:
    before = torch.ops.fastgate.gated_residual_fwd.default
    importlib.reload(operation)
    assert torch.ops.fastgate.gated_residual_fwd.default is before
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(gated_residual(x, x, torch.ones(2), impl="triton"), 2 * x)


def test_a_device_without_kernels_takes_the_plain_path_or_says_so() -> None:
    x, gate = torch.rand(2, 3, 4, 4, device="meta"), torch.ones(2, device="meta")
    assert gated_residual(x, x, gate).shape == x.shape
    with pytest.raises(ValueError, match=r"requests 'triton', but its kernels run on CUDA .* a tensor is on meta"):
        gated_residual(x, x, gate, impl="triton")


def test_without_triton_the_kernels_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    x = torch.rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match="Triton is not installed"):
        gated_residual(x, x, torch.ones(2), impl="triton")
    assert torch.equal(gated_residual(x, x, torch.ones(2)), 2 * x)


def test_fp64_takes_the_plain_path_or_says_so() -> None:
    x, gate = torch.rand(2, 3, 4, 4, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    assert torch.equal(gated_residual(x, x, gate), 2 * x)
    with pytest.raises(ValueError, match=r"a tensor is torch\.float64"):
        gated_residual(x, x, gate, impl="triton")
