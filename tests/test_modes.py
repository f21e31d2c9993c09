from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastgate as fg
from fastgate.modes import eval_mode


def mixed_network() -> nn.Module:
    """A network in training with parts held in eval mode, as in fine-tuning: batch norms, and one whole stage."""
    model = fg.models.resnet(8, gating="channel").train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model.layer2.eval()
    model.layer2[0].conv1.train()  # in training under a parent in eval
    return model


def modes(*models: nn.Module) -> list[dict[str, bool]]:
    return [{name: module.training for name, module in model.named_modules()} for model in models]


def test_every_module_gets_its_own_mode_back() -> None:
    model, other = mixed_network(), nn.Sequential(nn.Dropout(), nn.ReLU().eval())
    before = modes(model, other)
    assert set(before[0].values()) == {True, False}
    with eval_mode(model, other):
        assert not any(module.training for m in (model, other) for module in m.modules())
    assert modes(model, other) == before


def test_modes_come_back_after_an_exception() -> None:
    model = mixed_network()
    before = modes(model)
    with pytest.raises(OSError, match="disk gone"), eval_mode(model):
        raise OSError("disk gone")
    assert modes(model) == before


def test_modes_come_back_when_a_model_cannot_be_put_into_eval_mode() -> None:
    class Stubborn(nn.Module):
        def train(self, mode: bool = True) -> nn.Module:
            raise RuntimeError("no eval mode")

    model = mixed_network()
    before = modes(model)
    with pytest.raises(RuntimeError, match="no eval mode"), eval_mode(model, Stubborn()):
        pass
    assert modes(model) == before


def test_an_overridden_train_does_not_decide_what_comes_back() -> None:
    class HoldsNorm(nn.Module):
        """The idiom of fine-tuning: train() leaves the batch norm in eval mode."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.norm.eval()
            return self

    model = HoldsNorm().train()
    model.norm.train()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())


def test_parts_of_one_network_and_one_network_twice() -> None:
    model = mixed_network()
    before = modes(model)
    with eval_mode(model, model.layer1, model):
        assert not any(module.training for module in model.modules())
    assert modes(model) == before


def test_nesting_restores_level_by_level() -> None:
    model = mixed_network()
    before = modes(model)
    with eval_mode(model.layer1):
        partly = modes(model)
        with eval_mode(model):
            assert not any(module.training for module in model.modules())
        assert modes(model) == partly
        assert not any(module.training for module in model.layer1.modules()) and model.training
    assert modes(model) == before


IMAGES = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: fg.macs(model, (3, 8, 8)),
        lambda model: fg.flops(model, (3, 8, 8)),
        lambda model: fg.gate_costs(model, (3, 8, 8)),
        lambda model: fg.decide(model, [IMAGES]),
        lambda model: fg.compare(model, model, IMAGES),
    ],
    ids=["macs", "flops", "gate_costs", "decide", "compare"],
)
def test_what_evaluates_a_network_leaves_its_modes(use: Callable[[nn.Module], object]) -> None:
    model = mixed_network()
    before = modes(model)
    use(model)
    assert modes(model) == before


@pytest.mark.parametrize(
    "misuse",
    [
        lambda model: fg.macs(model, (1, 8, 8)),
        lambda model: fg.decide(model, [torch.zeros(2, 1, 8, 8)]),
        lambda model: fg.compare(model, nn.Linear(8, 5), IMAGES),
    ],
    ids=["macs", "decide", "compare"],
)
def test_what_fails_to_evaluate_a_network_leaves_its_modes(misuse: Callable[[nn.Module], object]) -> None:
    model = mixed_network()
    before = modes(model)
    with pytest.raises(ValueError, match="expected"):
        misuse(model)
    assert modes(model) == before
