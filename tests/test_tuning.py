"""Choosing kernels ahead of time, with a stand-in for the GPU's clock; kernels run in Triton's interpreter."""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastgate as fg
from fastgate.ops import choices
from fastgate.ops.gated_conv import ConvCall
from fastgate.ops.gated_residual import ResidualCall
from tests.models.test_attachment import NETWORKS


class Clock:
    """The kernels' calls, the second to be timed of each kind, take `factor` times what PyTorch's take."""

    def __init__(self) -> None:
        self.timed, self.factor = 0, 0.5

    def __call__(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], dict[str, float]]:
        self.timed += 1
        us = 10.0 if self.timed % 2 else 10.0 * self.factor
        return lambda: {"eager": us, "captured": 2 * us}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(choices, "make_timer", lambda device: clock)
    monkeypatch.setattr(choices, "_memory", choices._Memory())
    monkeypatch.setenv("FASTGATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTGATE_TUNE", "on")
    yield clock


def network(gating: str) -> nn.Module:
    torch.manual_seed(0)
    return fg.models.resnet(8, 10, widths=(4, 6, 8), gating=gating)


def test_all_that_a_network_calls_is_measured(clock: Clock) -> None:
    model, x = network("layer"), torch.randn(4, 3, 6, 6)
    tuned = fg.tune(model, x)
    assert {kind.operation for kind, _ in tuned} == {"gate_head", "gated_residual"}
    assert all(set(choice.chosen.values()) == {"triton"} and choice.refused == {} for _, choice in tuned)
    timed = clock.timed
    assert timed == 2 * choices.kept() >= 2 * len(tuned)
    # both modes; means of a residual reach the next head
    assert {kind.training for kind, _ in tuned if kind.operation == "gate_head"} == {True, False}
    assert "known" in {kind.means for kind, _ in tuned if kind.operation == "gate_head"}
    assert fg.tune(model, x) == tuned
    model.train()(x).sum().backward()  # nothing is measured that was not tuned
    with torch.no_grad():
        model.eval()(x)
    assert clock.timed == timed


def test_each_direction_of_a_convolution_is_measured(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ConvCall.run  # the kernels themselves are run in tests/ops/test_choices.py
    monkeypatch.setattr(ConvCall, "run", lambda kind, candidate, values: run(kind, "torch", values))
    clock.factor = 2.0
    tuned = fg.tune(network("channel"), torch.randn(4, 3, 6, 6))
    assert {kind.operation for kind, _ in tuned} == {"gate_head", "gated_conv2d"}
    directions = {kind.direction for kind, _ in tuned if kind.operation == "gated_conv2d"}
    assert directions == {"forward", "dgrad", "wgrad"}
    assert all(set(choice.chosen.values()) == {"torch"} for _, choice in tuned)


def test_the_network_stays_as_it_is(clock: Clock) -> None:
    model, x = network("layer").train(), torch.randn(4, 3, 6, 6)
    state, images, numbers = copy.deepcopy(model.state_dict()), x.clone(), torch.get_rng_state()
    with torch.no_grad():
        fg.tune(model, x)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(x, images) and torch.equal(torch.get_rng_state(), numbers)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_a_network_of_ones_own_with_its_inputs(clock: Clock) -> None:
    model = fg.attach(NETWORKS["torchvision-resnet18"](), "layer")
    seen = []

    def progress(kinds: Sequence[Any]) -> Sequence[Any]:
        seen.extend(kinds)
        return kinds

    x = torch.randn(2, 3, 16, 16)
    tuned = fg.tune(model, {"x": x}, modes=["eval"], progress=progress)
    assert tuned != [] and set(seen) >= {kind for kind, _ in tuned}
    assert not any(kind.training for kind, _ in tuned if kind.operation == "gate_head")
    assert fg.tune(model, x, modes=["eval"], forward=lambda network, images: network(images)) == tuned


def test_autocast_is_the_callers(clock: Clock) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        tuned = fg.tune(network("layer"), torch.randn(4, 3, 6, 6), modes=["train"])
    assert {kind.branch_dtype for kind, _ in tuned if isinstance(kind, ResidualCall)} == {"bfloat16"}


def test_bad_modes_and_devices_where_rules_decide() -> None:
    model, x = network("layer"), torch.randn(4, 3, 6, 6)
    with pytest.raises(ValueError, match="modes: expected 'train' and 'eval', got 'test'"):
        fg.tune(model, x, modes=["test"])
    if not torch.cuda.is_available():
        assert fg.tune(model, x) == []
