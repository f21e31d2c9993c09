from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastgate.functional import gated_residual


@dataclass(frozen=True)
class Case:
    n: int
    channels: int
    height: int
    width: int
    per_channel: bool
    dims: int  # of the gate: 1, 2 or 4

    def gate_shape(self) -> tuple[int, ...]:
        gates = self.channels if self.per_channel else 1
        return {1: (self.n,), 2: (self.n, gates), 4: (self.n, gates, 1, 1)}[self.dims]

    def __str__(self) -> str:
        gate = "x".join(map(str, self.gate_shape()))
        return f"{self.n}x{self.channels}x{self.height}x{self.width}-gate{gate}"


CASES = [
    Case(4, 3, 5, 7, False, 1),  # a layer gate's decisions
    Case(4, 3, 5, 7, False, 4),  # a layer gate's output
    Case(4, 3, 5, 7, True, 2),  # a channel gate's decisions
    Case(4, 3, 5, 7, True, 4),  # a channel gate's output
    Case(3, 3, 3, 3, True, 2),  # as many samples as channels: [N] and [C] must not be mixed up
    Case(3, 3, 3, 3, False, 1),
    Case(2, 1, 1, 1, True, 4),  # one channel of one pixel
    Case(1, 17, 1, 1, False, 4),  # one sample, odd channels
]


def make_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    shape = (case.n, case.channels, case.height, case.width)
    shortcut = torch.randn(shape, dtype=torch.float64).requires_grad_()
    branch = torch.randn(shape, dtype=torch.float64).requires_grad_()
    gate = torch.randint(0, 2, case.gate_shape()).double()
    gate.view(-1)[0] = 1  # at least one open, so that the branch has a gradient
    return shortcut, branch, gate.requires_grad_()


def gate_of(case: Case, gate: Tensor, n: int, c: int) -> float:
    return float(gate.reshape(case.n, -1)[n, c if case.per_channel else 0])


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_every_gradient_match_the_formula(case: Case, relu: bool) -> None:
    shortcut, branch, gate = make_inputs(case)
    grad = torch.randn_like(shortcut)
    y = gated_residual(shortcut, branch, gate, relu=relu)
    y.backward(grad)

    # y = relu(s + g b): dy/ds = [y > 0], dy/db = g [y > 0], dy/dg = sum over what g multiplies of b [y > 0]
    wanted = torch.empty_like(shortcut)
    grad_shortcut, grad_branch = torch.zeros_like(shortcut), torch.zeros_like(branch)
    grad_gate = torch.zeros(case.n, case.channels if case.per_channel else 1, dtype=torch.float64)
    with torch.no_grad():
        for n in range(case.n):
            for c in range(case.channels):
                g = gate_of(case, gate, n, c)
                total = shortcut[n, c] + g * branch[n, c]
                passes = (total > 0).double() if relu else torch.ones_like(total)
                wanted[n, c] = total * passes
                grad_shortcut[n, c] = grad[n, c] * passes
                grad_branch[n, c] = grad[n, c] * passes * g
                grad_gate[n, c if case.per_channel else 0] += (grad[n, c] * passes * branch[n, c]).sum()

    assert torch.equal(y, wanted)
    assert torch.equal(shortcut.grad, grad_shortcut)
    assert torch.equal(branch.grad, grad_branch)
    # fp64 sums of at most 105 products in another order
    torch.testing.assert_close(gate.grad.reshape(case.n, -1), grad_gate, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case: Case, relu: bool) -> None:
    shortcut, branch, gate = make_inputs(case)
    # the kink of the ReLU is no place for finite differences: with these draws every sum stays further away than 1e-6
    total = shortcut + gate.reshape(case.n, -1, 1, 1) * branch
    assert total.abs().min() > 1e-4
    assert torch.autograd.gradcheck(lambda s, b, g: gated_residual(s, b, g, relu=relu), (shortcut, branch, gate))
    assert torch.autograd.gradgradcheck(lambda s, b, g: gated_residual(s, b, g, relu=relu), (shortcut, branch, gate))


def test_all_closed_is_the_shortcut_and_all_open_the_sum() -> None:
    shortcut, branch = torch.rand(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    # a shortcut that is >= 0, as behind a ReLU, comes through unchanged
    assert torch.equal(gated_residual(shortcut, branch, torch.zeros(4)), shortcut)
    assert torch.equal(gated_residual(shortcut, branch, torch.ones(4)), torch.relu(shortcut + branch))


def test_channels_last_is_the_same_and_stays_channels_last() -> None:
    shortcut, branch, gate = torch.randn(4, 3, 5, 7), torch.randn(4, 3, 5, 7), torch.tensor([1.0, 0, 1, 0])
    plain = gated_residual(shortcut, branch, gate)
    last = gated_residual(*(t.to(memory_format=torch.channels_last) for t in (shortcut, branch)), gate)
    assert torch.equal(plain, last)
    assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    tensor = torch.ones(2, 3, 4, 4, dtype=dtype)
    y = gated_residual(tensor, tensor, torch.tensor([1.0, 0.0]).to(dtype))
    assert y.dtype == dtype
    assert y.flatten(1)[:, 0].tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            ((4, 3, 5, 5), (4, 3, 5, 6), (4,)),
            r"expected the same \[N, C, H, W\], got \[4, 3, 5, 5\] and \[4, 3, 5, 6\]",
        ),
        (((4, 3, 5, 5), (1, 3, 5, 5), (4,)), r"expected the same .* got \[4, 3, 5, 5\] and \[1, 3, 5, 5\]"),
        (((4, 3), (4, 3), (4,)), r"expected the same \[N, C, H, W\], got \[4, 3\] and \[4, 3\]"),
        (((4, 3, 5, 5), (4, 3, 5, 5), (3,)), r"gate: expected \[4\], .*\[4, 3, 1, 1\], got \[3\]"),
        (((4, 3, 5, 5), (4, 3, 5, 5), (4, 2)), r"gate: expected .* got \[4, 2\]"),
        (((4, 3, 5, 5), (4, 3, 5, 5), (4, 3, 5, 5)), r"gate: expected .* got \[4, 3, 5, 5\]"),
        (((4, 3, 5, 5), (4, 3, 5, 5), (1, 3, 1, 1)), r"gate: expected .* got \[1, 3, 1, 1\]"),
        (((4, 3, 5, 5), (4, 3, 5, 5), ()), r"gate: expected .* got \[\]"),
    ],
)
def test_bad_shapes_say_expected_and_got(shapes: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_residual(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("on_meta", [0, 1, 2], ids=["shortcut", "branch", "gate"])
def test_mixed_devices_are_refused(on_meta: int) -> None:
    tensors = [torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), torch.zeros(2)]
    tensors[on_meta] = tensors[on_meta].to("meta")
    devices = ", ".join(str(tensor.device) for tensor in tensors)
    with pytest.raises(ValueError, match=f"shortcut, branch, gate: expected one device, got {devices}"):
        gated_residual(*tensors)


def test_an_explicit_triton_request_that_cannot_be_honoured_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tensor, gate = torch.zeros(2, 3, 4, 4), torch.zeros(2)
    with pytest.raises(ValueError, match=r"gated_residual: impl requests 'triton'.*use 'auto' or 'torch'"):
        gated_residual(tensor, tensor, gate, impl="triton")
    with pytest.raises(ValueError, match="impl: expected one of auto, triton, torch, got 'fused'"):
        gated_residual(tensor, tensor, gate, impl="fused")
    monkeypatch.setenv("FASTGATE_IMPL", "triton")
    with pytest.raises(ValueError, match="environment variable FASTGATE_IMPL requests 'triton'"):
        gated_residual(tensor, tensor, gate)
    assert torch.equal(gated_residual(tensor, tensor, gate, impl="torch"), tensor)
