"""`torch.func` on gated networks: functional_call, grad, vmap and jvp, on the plain path."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import fastgate as fg
from tests.helpers import freeze_at_random

KINDS = ["layer", "channel"]


def build(gating: str, frozen: bool) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    model = fg.models.resnet(8, gating=gating, window="identity", init_logit=None).double().eval()
    if frozen:
        freeze_at_random(model)
    return model, dict(model.named_parameters()), dict(model.named_buffers())


@pytest.mark.parametrize("gating", KINDS)
@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_gradients_per_sample(gating: str, frozen: bool) -> None:
    model, parameters, buffers = build(gating, frozen)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, (parameters, buffers), (image[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        wanted = torch.autograd.grad(
            loss(parameters, image), list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        for name, gradient in zip(parameters, wanted, strict=True):
            # fp64, sums in another order
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("gating", KINDS)
def test_gate_losses_inside_a_transform(gating: str) -> None:
    model, parameters, buffers = build(gating, frozen=False)
    model.train()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        state = {name: buffer.clone() for name, buffer in buffers.items()}  # batch norms write theirs in place
        scores = functional_call(model, (parameters, state), (x,))
        return scores.square().sum() + fg.budget(model, 0.2) + fg.polarization(model)

    found = grad(loss)(parameters)
    wanted = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for name, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


def test_decisions_left_from_a_transform_are_no_losses() -> None:
    model, _, _ = build("layer", frozen=False)
    vmap(lambda image: model(image[None]))(torch.randn(4, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"gate 'layer1\.0\.gate': .* an earlier forward whose graph has been freed"):
        fg.activation(model)


@pytest.mark.parametrize("gating", KINDS)
def test_a_frozen_network_has_forward_derivatives(gating: str) -> None:
    model, _, _ = build(gating, frozen=True)
    x, direction = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    _, slope = jvp(model, (x,), (direction,))
    step = 1e-6
    ahead, behind = (model(x + sign * step * direction) for sign in (1, -1))
    # central differences: the error is of order step^2, plus 1e-16 / step
    torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)


def test_the_kernels_are_not_for_transforms() -> None:
    model = fg.models.resnet(8, gating="layer", impl="triton").eval()
    with pytest.raises(ValueError, match=r"requests 'triton', but its kernels do not support torch\.func transforms"):
        vmap(lambda image: model(image[None]))(torch.randn(2, 3, 8, 8))
