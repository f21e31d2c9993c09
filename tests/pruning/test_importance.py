"""What is closed where samples hold more open than the target allows: that on which the outputs depend least."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastgate as fg
from fastgate.pruning.costs import Costs, gate_costs
from fastgate.pruning.importance import layer_importance
from fastgate.pruning.targets import meet_target
from tests.helpers import assert_same_state, state_copy
from tests.pruning.test_targets import layer_costs, layers, opened, sum_open

SIZE = (3, 8, 8)
GATES = ["layer1.0.gate", "layer2.0.gate", "layer3.0.gate"]


class Pair(nn.Module):
    """Nested outputs; with `found`, one whose length hangs on the values, as that of detections does."""

    def __init__(self, body: nn.Module, found: bool) -> None:
        super().__init__()
        self.body, self.found = body, found

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.body(x)
        return {"scores": [y, y.argmax(1)], "found": y[y > 0] if self.found else y.mean(1)}


def network(scales: list[float], **options: Any) -> fg.models.ResNet:
    """A ResNet-8 that every sample holds open, whose branches are this large."""
    torch.manual_seed(0)
    model = fg.models.resnet(8, gating="layer", **options)
    for block, scale in zip((model.layer1[0], model.layer2[0], model.layer3[0]), scales, strict=True):
        nn.init.constant_(block.bn2.weight, scale)
        nn.init.zeros_(block.gate.fc2.weight)
        nn.init.ones_(block.gate.fc2.bias)
    return model


def measure(model: nn.Module, target: float, **options: Any) -> tuple[dict[str, float], Costs]:
    images = torch.randn(16, *SIZE, generator=torch.Generator().manual_seed(1))
    costs = gate_costs(model, SIZE)
    found = layer_importance(model, fg.decide(model, [images]), images, costs, target, costs.total, **options)
    return {name: float(value) for name, value in found.items()}, costs


def test_importance_is_the_relative_change_of_the_outputs() -> None:
    model = network([0.0, 1.0, 0.2]).train()
    state = state_copy(model)
    found, _ = measure(model, 0.5)
    assert list(found) == GATES and found["layer1.0.gate"] == 0.0 < found["layer3.0.gate"] < found["layer2.0.gate"]
    assert_same_state(model, state)
    assert model.training and not any(gate.frozen for _, gate in fg.named_gates(model))
    # the same by hand
    images = torch.randn(16, *SIZE, generator=torch.Generator().manual_seed(1))
    model.eval()
    with torch.no_grad():
        y = model(images)
        model.layer2[0].gate.freeze(torch.tensor([False]))
        closed = model(images)
    assert found["layer2.0.gate"] == pytest.approx(float(((closed - y) ** 2).sum() / (y**2).sum()), rel=1e-5)


def test_it_is_measured_only_where_samples_are_overruled() -> None:
    model = network([1.0, 1.0, 1.0])
    assert measure(model, 1.0)[0] == {} == measure(model, 0.9)[0]  # within half a block
    assert list(measure(model, 0.5, held={"layer2.0.gate"})[0]) == [GATES[0], GATES[2]]
    model.layer1[0].gate.freeze(torch.tensor([False]))
    assert list(measure(model, 0.3)[0]) == GATES[1:]
    torch.manual_seed(0)
    assert measure(fg.models.resnet(8, gating="channel"), 0.5)[0] == {}


def test_nested_outputs_and_outputs_of_other_shapes() -> None:
    whole = network([0.5, 1.0, 0.2])
    alone, nested = measure(whole, 0.5)[0], measure(Pair(whole, found=False), 0.5)[0]
    # the scores alone, and with their means
    assert all(nested[f"body.{name}"] > value for name, value in alone.items())
    values = measure(Pair(whole, found=True), 0.5)[0].values()
    assert any(math.isnan(value) for value in values)


@pytest.mark.parametrize("least", range(3))
def test_the_least_important_block_is_closed(least: int) -> None:
    """Every sample holds all three open: votes say nothing, so that the last one would be closed."""
    scales = [1.0, 1.0, 1.0]
    scales[least] = 1e-3
    model, images = network(scales), torch.randn(16, *SIZE)
    closed = [i == least for i in range(3)]
    assert [not bool(g.open) for g in fg.decide(model, [images], target=0.75).values()] == closed
    optimizer = torch.optim.SGD(fg.parameter_groups(model), lr=0.1)
    search = fg.GateSearch(model, SIZE, optimizer, epochs=2, config=fg.SearchConfig(target=0.75))
    with pytest.warns(UserWarning, match="did not learn the target"):
        search.compact([images])
    assert [not bool(g.open) for g in search.decide([images]).values()] == closed


def importance(values: list[float]) -> dict[str, Tensor]:
    return {f"block{i}": torch.tensor(value, dtype=torch.float64) for i, value in enumerate(values)}


@pytest.mark.parametrize(
    ("means", "values", "expected"),
    [
        pytest.param([0.96, 0.99, 1.0, 0.0], [0.7, 0.1, 0.5, math.nan], [1, 0, 1, 0], id="not-by-the-votes"),
        pytest.param([0.96, 0.99, 1.0, 0.0], [0.7, 0.5, 0.1, math.nan], [1, 1, 0, 0], id="not-even-if-all-agree"),
        pytest.param([0.96, 0.99, 1.0, 0.0], [0.7, math.nan, 0.1, 0.0], [0, 1, 1, 0], id="unknown"),
        pytest.param([0.96, 0.99, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0, 1, 1, 0], id="nothing-matters"),
        pytest.param([0.96, 0.99, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0], [1, 0, 1, 0], id="two-do-not-matter"),
    ],
)
def test_importance_takes_the_place_of_votes(means: list[float], values: list[float], expected: list[int]) -> None:
    # 100 MACs without gates and four blocks of 100: 3 of 5 are 2 blocks
    met = meet_target(layers(means), layer_costs([100] * 4), 0.6, 500, importance=importance(values))
    assert opened(met) == expected


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 10), st.integers(1, 1000)), min_size=1, max_size=12),
    st.floats(0, 1),
)
def test_the_target_is_met_as_with_votes(gates: list[tuple[float, float, int]], target: float) -> None:
    means, values, sizes = (list(column) for column in zip(*gates, strict=True))
    costs, total = layer_costs(sizes), sum(sizes)
    by_votes = meet_target(layers(means), costs, target, total)
    by_importance = meet_target(layers(means), costs, target, total, importance=importance(values))
    tolerance = sum(sizes) / len(sizes) / 2
    misses = [abs(sum_open(met, costs) - target * total) for met in (by_votes, by_importance)]
    assert misses[1] <= max(misses[0], tolerance) + 1e-6 * total
