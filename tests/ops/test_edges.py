"""Where operations end: nothing to compute, no memory, second derivatives, activation checkpoints, several devices."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgate.functional import gate_head, gated_conv2d, gated_residual
from fastgate.ops import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ["torch", "triton"]


def head_parameters(channels: int, **where: Any) -> dict[str, Tensor]:
    where = {"device": DEVICE, **where}
    return {
        "fc1_weight": torch.randn(8, channels, **where),
        "fc1_bias": torch.randn(8, **where),
        "bn_weight": torch.ones(8, **where),
        "bn_bias": torch.zeros(8, **where),
        "running_mean": torch.zeros(8, **where),
        "running_var": torch.ones(8, **where),
        "fc2_weight": torch.randn(2, 8, **where),
        "fc2_bias": torch.randn(2, **where),
    }


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "auto"])
@pytest.mark.parametrize("shape", [(0,), (0, 1), (0, 3), (0, 1, 1, 1), (0, 3, 1, 1)], ids=str)
def test_a_residual_of_no_samples(impl: str, shape: tuple[int, ...]) -> None:
    x, gate = (
        torch.zeros(0, 3, 4, 4, device=DEVICE).requires_grad_(),
        torch.zeros(shape, device=DEVICE).requires_grad_(),
    )
    y, pooled = gated_residual(x, x, gate, return_pooled=True, impl=impl)
    (y.sum() + pooled.sum()).backward()
    assert y.shape == (0, 3, 4, 4) and pooled.shape == (0, 3) and gate.grad.shape == shape


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "auto"])
def test_a_residual_of_no_channels(impl: str) -> None:
    x = torch.zeros(2, 0, 4, 4, device=DEVICE)
    for shape in ((2,), (2, 1), (2, 0), (2, 0, 1, 1)):
        assert gated_residual(x, x, torch.ones(shape, device=DEVICE), impl=impl).shape == x.shape


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "auto"])
@pytest.mark.parametrize("shape", [(0,), (0, 1), (0, 3), (1, 3), (3,), (0, 3, 1, 1)], ids=str)
def test_a_convolution_of_no_samples(impl: str, shape: tuple[int, ...]) -> None:
    x, weight = torch.zeros(0, 3, 4, 4, device=DEVICE), torch.randn(5, 3, 3, 3, device=DEVICE).requires_grad_()
    y = gated_conv2d(x, weight, in_gate=torch.ones(shape, device=DEVICE), impl=impl)
    y.sum().backward()
    assert y.shape == (0, 5, 4, 4) and not weight.grad.any()


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "auto"])
def test_a_head_of_no_samples_or_channels(impl: str) -> None:
    x = torch.zeros(0, 3, 4, 4, device=DEVICE)
    decisions, logits = gate_head(x, **head_parameters(3), training=False, impl=impl)
    assert decisions.shape == logits.shape == (0, 2)
    with pytest.raises(ValueError, match="x: expected at least 2 samples in training"):
        gate_head(x, **head_parameters(3), training=True, impl=impl)
    # of no channels its biases decide
    parameters = head_parameters(0)
    _, logits = gate_head(torch.zeros(4, 0, 2, 2, device=DEVICE), **parameters, training=False, impl=impl)
    hidden = torch.relu(parameters["fc1_bias"] / (1 + 1e-5) ** 0.5)
    wanted = parameters["fc2_weight"] @ hidden + parameters["fc2_bias"]
    torch.testing.assert_close(logits, wanted.expand(4, 2), rtol=1e-5, atol=1e-5)  # fp32 sums of 8


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "auto"])
def test_maps_without_pixels_have_no_means(impl: str) -> None:
    with pytest.raises(ValueError, match="x: expected at least one pixel, got"):
        gate_head(torch.zeros(2, 3, 0, 4, device=DEVICE), **head_parameters(3), training=False, impl=impl)


def test_meta_tensors_give_shapes() -> None:
    x = torch.zeros(2, 3, 4, 4, device="meta")
    decisions, _ = gate_head(x, **head_parameters(3, device="meta"), training=True)
    gate = torch.ones(2, 3, device="meta")
    y = gated_residual(x, x, gate)
    z = gated_conv2d(x, torch.zeros(5, 3, 3, 3, device="meta"), in_gate=gate)
    assert decisions.shape == (2, 2) and y.shape == x.shape and z.shape == (2, 5, 4, 4)
    assert decisions.is_meta and y.is_meta and z.is_meta


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_wider_gate_does_not_widen_the_result(impl: str) -> None:
    x = torch.randn(2, 4, 3, 3, device=DEVICE).half()
    gate = torch.ones(2, 4, device=DEVICE)
    assert gated_residual(x, x, gate, impl=impl).dtype == torch.float16
    weight = torch.randn(4, 4, 3, 3, device=DEVICE).half()
    assert gated_conv2d(x, weight, in_gate=gate, out_gate=gate, impl=impl).dtype == torch.float16


def operations() -> dict[str, Any]:
    parameters = head_parameters(4)
    weight = torch.randn(4, 4, 3, 3, device=DEVICE)
    gate = torch.tensor([1.0, 0, 1], device=DEVICE)
    return {
        "gate_head": lambda x, impl: gate_head(x, **parameters, training=True, window="identity", impl=impl)[1],
        "gated_residual": lambda x, impl: gated_residual(x, x, gate, impl=impl),
        "gated_conv2d": lambda x, impl: gated_conv2d(x, weight, in_gate=gate, impl=impl),
    }


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["gate_head", "gated_residual", "gated_conv2d"])
def test_activation_checkpoints(name: str, impl: str, use_reentrant: bool) -> None:
    operation = operations()[name]
    x = torch.randn(3, 4, 5, 5, device=DEVICE)
    grads = []
    for run in (lambda x: operation(x, impl), lambda x: checkpoint(operation, x, impl, use_reentrant=use_reentrant)):
        leaf = x.clone().requires_grad_()
        run(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_follows_a_residual_without_relu_may_work_in_place(impl: str) -> None:
    x, branch = (torch.randn(3, 4, 5, 5, device=DEVICE).requires_grad_() for _ in range(2))
    gate = torch.tensor([1.0, 0, 1], device=DEVICE).requires_grad_()
    found = torch.autograd.grad(gated_residual(x, branch, gate, relu=False, impl=impl).relu_().sum(), (x, branch, gate))
    wanted = torch.autograd.grad((x + gate[:, None, None, None] * branch).relu().sum(), (x, branch, gate))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # fp32 sums of 100


@pytest.mark.parametrize("upstream", ["constant", "depends"])
@pytest.mark.parametrize("name", ["gate_head", "gated_residual", "gated_conv2d"])
def test_a_second_derivative_of_a_kernel_is_an_error(name: str, upstream: str) -> None:
    operation = operations()[name]
    x = torch.randn(3, 4, 5, 5, device=DEVICE).requires_grad_()
    y = operation(x, "triton")
    total = y.sum() if upstream == "constant" else y.square().sum()
    (grad,) = torch.autograd.grad(total, x, create_graph=True)
    penalty = grad.square().sum() + x.sum()  # with the second term it would come out as something
    with pytest.raises(RuntimeError, match="fastgate's kernels have no second derivative; use impl='torch'"):
        penalty.backward()


@pytest.mark.parametrize("name", ["gate_head", "gated_residual", "gated_conv2d"])
def test_the_plain_path_has_second_derivatives(name: str) -> None:
    operation = operations()[name]
    x = torch.randn(3, 4, 5, 5, device=DEVICE).requires_grad_()
    (grad,) = torch.autograd.grad(operation(x, "torch").square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert second.isfinite().all() and second.any()


def test_a_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(Tensor):
        device = torch.device("cuda:1")  # type: ignore[assignment]

    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", asked.append)
    dispatch.device_guard((None, torch.zeros(1).as_subclass(Elsewhere), torch.zeros(1)))
    assert asked == [torch.device("cuda:1")]
    with dispatch.device_guard((True, torch.zeros(1))):
        assert len(asked) == 1
