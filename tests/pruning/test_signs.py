"""A closed block's ReLU is dropped only where its input is proven non-negative on this very network."""

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fastgate as fg
from fastgate.pruning.signs import given_nonnegative


def signed_pool(model: nn.Module) -> None:
    model.maxpool = nn.Conv2d(64, 64, 3, 2, 1)


def norm_behind_the_pool(model: nn.Module) -> None:
    model.maxpool = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(64))


def leaky_stem(model: nn.Module) -> None:
    model.relu = nn.LeakyReLU()


def hooked_pool(model: nn.Module) -> None:
    model.maxpool.register_forward_hook(lambda module, inputs, output: output - 1)


class Lowered(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) - 1


def subclass_of_relu(model: nn.Module) -> None:
    model.relu = Lowered()


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.view(-1).sub_(1)
        return x


def change_in_place(model: nn.Module) -> None:
    model.maxpool = nn.Sequential(model.maxpool, InPlace(), nn.Identity())


CHANGES = [signed_pool, norm_behind_the_pool, leaky_stem, hooked_pool, subclass_of_relu, change_in_place]


def closed(model: nn.Module) -> nn.Module:
    for _, gate in fg.named_gates(model):
        gate.freeze(torch.zeros(gate.gates, dtype=torch.bool))
    return model.eval()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("after", [False, True], ids=["before-attach", "after-attach"])
def test_a_relu_that_is_needed_stays(change: Callable[[nn.Module], None], after: bool) -> None:
    model = torchvision.models.resnet18()
    if not after:
        change(model)
    fg.attach(model, "layer")
    if after:
        change(model)
    small = fg.compact(closed(model))
    assert fg.compare(model, small, torch.randn(2, 3, 64, 64)) == 0.0
    assert isinstance(small.layer1[0], nn.Sequential)


def test_a_relu_behind_a_relu_goes() -> None:
    for model in (torchvision.models.resnet18(), fg.models.resnet20()):
        fg.attach(model, "layer")
        assert len(given_nonnegative(model)) == len(list(fg.named_gates(model)))
        small = fg.compact(closed(model))
        assert type(small.layer1[0]) is nn.Identity
        assert fg.compare(model, small, torch.randn(2, 3, 64, 64)) == 0.0


def test_a_forward_that_cannot_be_traced_proves_nothing() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = fg.models.resnet(8, gating="layer")

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x if x.sum() > 0 else -x)

    model = Odd()
    assert given_nonnegative(model) == set()
    assert fg.compare(closed(model), fg.compact(model), torch.randn(2, 3, 8, 8)) == 0.0
