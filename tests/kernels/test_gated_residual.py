"""The kernel in Triton's interpreter (on a GPU: as compiled) against the fp64 meaning."""

import pytest
import torch
from torch import Tensor

from fastgate.functional import gated_residual
from tests.kernels.compare import assert_close_to_oracle, poisoned_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SHAPES = [
    pytest.param((3, 5, 3, 3), id="odd-everything"),
    pytest.param((2, 1, 7, 5), id="one-channel"),
    pytest.param((1, 17, 1, 1), id="one-pixel-one-sample"),
    pytest.param((2, 70, 4, 6), id="several-blocks-of-channels"),
    pytest.param((2, 3, 40, 41), id="several-tiles-of-pixels"),
]


def run(
    impl: str, tensors: dict[str, Tensor], upstream: dict[str, Tensor], dtype: torch.dtype, relu: bool, pool: bool
) -> dict[str, Tensor | None]:
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    y, pooled = gated_residual(*leaves.values(), relu=relu, return_pooled=True, impl=impl)
    loss = (y * upstream["y"].to(dtype)).sum()
    if pool:
        loss = loss + (pooled * upstream["pooled"].to(pooled.dtype)).sum()
    loss.backward()
    return {"y": y.detach(), "pooled": pooled.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("per_channel", "relu", "pool", "layouts"),
    [
        pytest.param(False, True, True, (0, 0), id="layer-nchw"),
        pytest.param(True, True, False, (1, 1), id="channel-channels-last"),
        pytest.param(False, False, True, (1, 0), id="layer-mixed-layouts-no-relu"),
        pytest.param(True, True, True, (0, 1), id="channel-mixed-layouts"),
    ],
)
def test_equals_its_meaning(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    per_channel: bool,
    relu: bool,
    pool: bool,
    layouts: tuple[int, int],
) -> None:
    formats = [torch.channels_last if last else torch.contiguous_format for last in layouts]
    # rounded to the dtype first: all three paths see the same numbers
    tensors = {
        "shortcut": torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=formats[0]),
        "branch": torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=formats[1]),
        "gate": (torch.rand(shape[: 2 if per_channel else 1], device=DEVICE) < 0.5).to(dtype),
    }
    upstream = {
        "y": torch.randn(shape, device=DEVICE).to(dtype),
        "pooled": torch.randn(shape[:2], device=DEVICE).to(dtype),
    }
    with poisoned_memory():
        kernel = run("triton", tensors, upstream, dtype, relu, pool)
    plain = run("torch", tensors, upstream, dtype, relu, pool)
    oracle = run("torch", tensors, upstream, torch.float64, relu, pool)
    assert_close_to_oracle(kernel, plain, oracle)


@pytest.mark.parametrize("per_channel", [False, True], ids=["layer", "channel"])
def test_a_closed_branch_is_not_read(per_channel: bool) -> None:
    shape = (4, 6, 3, 5)
    shortcut, branch = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE)
    gate = (torch.rand(shape[: 2 if per_channel else 1], device=DEVICE) < 0.5).float()
    expected = torch.relu(shortcut + gate.reshape(4, -1, 1, 1) * branch)
    branch[(gate == 0).nonzero(as_tuple=True)] = torch.nan
    assert torch.isnan(branch).any()
    assert torch.equal(gated_residual(shortcut, branch, gate, impl="triton"), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
def test_expanded_gradients(layout: torch.memory_format) -> None:
    # a sum's gradient has stride 0 everywhere, which the kernel does not address
    gradients = {}
    tensors = [torch.randn(2, 5, 3, 4, device=DEVICE).contiguous(memory_format=layout) for _ in range(2)]
    for impl in ("triton", "torch"):
        shortcut, branch = (tensor.clone().requires_grad_() for tensor in tensors)
        y, pooled = gated_residual(
            shortcut, branch, torch.tensor([1.0, 0.0], device=DEVICE), return_pooled=True, impl=impl
        )
        (y.sum() + 3 * pooled.sum()).backward()
        gradients[impl] = (shortcut.grad, branch.grad)
    for got, expected in zip(gradients["triton"], gradients["torch"], strict=True):
        torch.testing.assert_close(got, expected)


def test_integers_are_exact() -> None:
    shape = (3, 20, 4, 4)
    shortcut, branch = (torch.randint(-8, 8, shape, device=DEVICE).half() for _ in range(2))
    gate = (torch.rand(shape[:2], device=DEVICE) < 0.5).half()
    got = gated_residual(shortcut, branch, gate, impl="triton")
    assert torch.equal(got, gated_residual(shortcut, branch, gate, impl="torch"))


def test_opcheck() -> None:
    shortcut, branch = (torch.randn(2, 3, 2, 2, device=DEVICE) for _ in range(2))
    gate = torch.ones(2, device=DEVICE)
    torch.library.opcheck(torch.ops.fastgate.gated_residual_fwd.default, (shortcut, branch, gate, True, True))
    torch.library.opcheck(
        torch.ops.fastgate.gated_residual_bwd.default,
        (branch, shortcut[:, :, 0, 0].contiguous(), shortcut, branch, gate, True, True),
    )


def test_what_the_kernel_cannot_serve_is_refused() -> None:
    x, gate = torch.randn(2, 3, 4, 4, device=DEVICE), torch.ones(2, device=DEVICE)
    with pytest.raises(ValueError, match=r"requests 'triton', but its kernels take float16, bfloat16 and float32"):
        gated_residual(x.double(), x.double(), gate.double(), impl="triton")
    with pytest.raises(ValueError, match="dense NCHW or channels_last"):
        gated_residual(x[:, :, ::2], x[:, :, ::2], gate, impl="triton")


def test_the_gradient_behind_a_nan_is_that_of_pytorchs_relu() -> None:
    shortcut, branch = (torch.randn(2, 3, 2, 2, device=DEVICE) for _ in range(2))
    shortcut[0, 1, 0, 0] = torch.nan
    found = []
    for impl in ("triton", "torch"):
        leaves = [tensor.clone().requires_grad_() for tensor in (shortcut, branch)]
        y = gated_residual(*leaves, torch.ones(2, device=DEVICE), impl=impl)
        found.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected) and expected[0, 1, 0, 0] == 1
