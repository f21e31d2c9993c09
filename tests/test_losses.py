import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastgate as fg
from fastgate.pruning.costs import Costs
from tests.helpers import freeze_at_random


def layer_gate(decisions: list[float], **options: object) -> fg.LayerGate:
    """A layer gate in fp64 that has just made these decisions, its logits (+-0.5) the leaves of the graph."""
    gate = fg.LayerGate(1, **options).double()
    gate.logits = (torch.tensor(decisions, dtype=torch.float64) - 0.5).requires_grad_()
    gate.decisions = fg.estimators.straight_through(gate.logits, "identity")
    return gate


def channel_gate(decisions: list[list[float]]) -> fg.ChannelGate:
    """Likewise; decisions by sample, then channel."""
    gate = fg.ChannelGate(len(decisions[0])).double()
    gate.logits = (torch.tensor(decisions, dtype=torch.float64) - 0.5).requires_grad_()
    gate.decisions = fg.estimators.straight_through(gate.logits, "identity")
    return gate


def gradients(loss: Tensor, gates: list) -> list[list]:
    return [
        gradient.tolist() for gradient in torch.autograd.grad(loss, [gate.logits for gate in gates], retain_graph=True)
    ]


def test_polarization_of_layer_gates() -> None:
    # means 1/4, 1 and 1/2 of four samples; g (1 - g) = 3/16, 0, 1/4; over three gates 7/48
    gates = [layer_gate([1, 0, 0, 0]), layer_gate([1, 1, 1, 1]), layer_gate([1, 1, 0, 0])]
    loss = fg.polarization(gates)
    assert loss.shape == () and loss.item() == pytest.approx(7 / 48, rel=1e-12)
    # (1 - 2 g) / (L B) for every sample of a gate
    wanted = [[(1 - 2 * g) / 12] * 4 for g in (1 / 4, 1, 1 / 2)]
    assert gradients(loss, gates) == [pytest.approx(row, rel=1e-12) for row in wanted]


def test_activation_of_layer_gates() -> None:
    gates = [layer_gate([1, 0, 0, 0]), layer_gate([1, 1, 1, 1])]
    loss = fg.activation(gates)
    assert loss.item() == (1 / 4 + 1) / 2
    assert gradients(loss, gates) == [[1 / 8] * 4] * 2


def test_channels_are_averaged_within_their_gate_first() -> None:
    # a gate of three channels with means 1, 1/2, 0 and one of a single channel with mean 1/2: both gates count alike
    gates = [channel_gate([[1, 1, 0], [1, 0, 0]]), channel_gate([[1], [0]])]
    polarization, activation = fg.polarization(gates), fg.activation(gates)
    assert polarization.item() == pytest.approx((1 / 4 / 3 + 1 / 4) / 2, rel=1e-12)
    assert activation.item() == 1 / 2
    wide, narrow = gradients(activation, gates)
    assert wide == [pytest.approx([1 / 12] * 3, rel=1e-12)] * 2
    assert narrow == [[1 / 4]] * 2
    wide, narrow = gradients(polarization, gates)
    # (1 - 2 g) / (L B C)
    assert wide == [pytest.approx([-1 / 12, 0, 1 / 12], rel=1e-12)] * 2
    assert narrow == [[0]] * 2


def test_budget_without_costs_weighs_every_channel_alike() -> None:
    # a gate with 3 channels and one with 1: of 4 channels the means sum to 1 + 1/2 + 0 + 1/2
    gates = [channel_gate([[1, 1, 0], [1, 0, 0]]), channel_gate([[1], [0]])]
    loss = fg.budget(gates, 0.25)
    assert loss.item() == pytest.approx((2 / 4 - 0.25) ** 2, rel=1e-12)
    wide, narrow = gradients(loss, gates)
    # 2 (fraction - target) / (channels B)
    assert wide == [pytest.approx([2 * 0.25 / 8] * 3, rel=1e-12)] * 2
    assert narrow == [pytest.approx([2 * 0.25 / 8], rel=1e-12)] * 2


def test_budget_of_a_scheduled_target_and_costs_on_the_device() -> None:
    """What a captured step passes is the loss of plain numbers."""
    model = fg.models.resnet20(gating="channel")
    model(torch.randn(8, 3, 32, 32))
    costs = fg.gate_costs(model, (3, 32, 32))
    plain = fg.budget(model, 0.3, costs)
    scheduled = fg.budget(model, torch.tensor(0.3), costs.to("cpu", torch.float32))
    assert scheduled.dtype == torch.float32 and scheduled.requires_grad
    assert scheduled.item() == pytest.approx(plain.item(), rel=1e-5)  # fp32 beside fp64 arithmetic on the target
    assert torch.equal(fg.budget(model, 0.3, dict(costs), total=fg.macs(model, (3, 32, 32))), plain)


def test_budget_is_a_share_of_the_whole_network() -> None:
    gates = [layer_gate([1, 0, 0, 0]), layer_gate([1, 1, 1, 0])]
    costs = Costs({"0": torch.tensor([300]), "1": torch.tensor([100])}, 500)
    # of 500, 100 are not gated: 100 + 300 * 1/4 + 100 * 3/4 = 250; distances are measured in the 400 that are
    for target in (0.2, 0.4, 0.5, 1.0):
        wanted = ((250 / 500 - target) * 500 / 400) ** 2
        for loss in (fg.budget(gates, target, costs), fg.budget(gates, target, dict(costs), total=500)):
            assert loss.item() == pytest.approx(wanted, rel=1e-12, abs=1e-15)
    first, second = gradients(fg.budget(gates, 0.6, costs), gates)
    # 2 (share - target) * total / switchable * cost / (switchable B): below the target it asks for more open gates
    assert first == pytest.approx([2 * -0.1 * 500 / 400 * 300 / 1600] * 4, rel=1e-12)
    assert second == pytest.approx([2 * -0.1 * 500 / 400 * 100 / 1600] * 4, rel=1e-12)


def test_budget_of_a_network_that_is_as_small_as_asked_is_nothing() -> None:
    """The share that the loss sees is the one that the compact network has."""
    model = fg.models.resnet(8, gating="channel")
    size = (3, 8, 8)
    costs = fg.gate_costs(model, size)
    freeze_at_random(model, "one")
    model(torch.randn(2, *size))
    share = fg.macs(fg.compact(model), size) / costs.total
    assert fg.budget(model, share, costs).item() == pytest.approx(0.0, abs=1e-12)
    assert fg.budget(model, share + 0.1, costs).item() == pytest.approx(
        (0.1 * costs.total / costs.switchable) ** 2, rel=1e-4
    )


def test_budget_needs_to_know_the_whole_network() -> None:
    gates = [layer_gate([1, 0])]
    with pytest.raises(ValueError, match=r"total: expected the cost of the whole network.*total=fastgate\.macs"):
        fg.budget(gates, 0.5, {"0": torch.tensor([300])})
    with pytest.raises(ValueError, match="total: expected at least 300, the sum of the gates' costs, got 299"):
        fg.budget(gates, 0.5, {"0": torch.tensor([300])}, total=299)


def test_a_target_below_what_is_not_gated_is_refused() -> None:
    gates, costs = [layer_gate([1, 0])], Costs({"0": torch.tensor([200])}, 300)
    assert fg.budget(gates, 100 / 300, costs).item() == pytest.approx(0.25)
    with pytest.raises(ValueError, match=r"target: expected 0\.3334 to 1 of the network's cost .*, got 0.3"):
        fg.budget(gates, 0.3, costs)
    # a tensor is taken as it is: -0.05 of what is gated
    assert fg.budget(gates, torch.tensor(0.3), costs).item() == pytest.approx((0.5 + 0.05) ** 2)


def test_capacity_is_the_share_of_parameters_given_up() -> None:
    gates = [layer_gate([1, 0, 0, 0]), layer_gate([1, 1, 1, 0])]
    parameters = {"0": torch.tensor([100]), "1": torch.tensor([300])}
    # 1 - (100 * 1/4 + 300 * 3/4) / 400
    loss = fg.losses.capacity(gates, parameters)
    assert loss.item() == pytest.approx(1 - 0.625, rel=1e-12)
    assert torch.equal(loss, fg.losses.capacity(gates, parameters, total=400))
    # -parameters / (total B): the gate of more parameters is held open more
    assert gradients(loss, gates) == [[-1 / 16] * 4, [-3 / 16] * 4]


def test_a_model_and_its_gates_give_the_same() -> None:
    model = fg.models.resnet(8, gating="channel", window="identity")
    model(torch.randn(6, 3, 8, 8))
    gates = [gate for _, gate in fg.named_gates(model)]
    costs = fg.gate_costs(model, (3, 8, 8))
    numbered = {str(i): cost for i, cost in enumerate(costs.values())}
    assert torch.equal(fg.polarization(model), fg.polarization(gates))
    assert torch.equal(fg.activation(model), fg.activation(iter(gates)))
    assert torch.equal(fg.budget(model, 0.5, costs), fg.budget(gates, 0.5, numbered, total=costs.total))


def test_the_losses_reach_every_parameter_of_every_head() -> None:
    model = fg.models.resnet(8, gating="layer")
    scores = model(torch.randn(6, 3, 8, 8))
    (scores.mean() + fg.polarization(model) + fg.activation(model) + fg.budget(model, 0.3)).backward()
    for name, gate in fg.named_gates(model):
        # the last bias gets the plain sum of what passes the window; all start inside it
        assert gate.fc2.bias.grad.abs().sum() > 0, name
        assert all(p.grad is not None for p in gate.parameters())


def test_frozen_gates_count_and_carry_no_gradient() -> None:
    gates = nn.ModuleList([fg.LayerGate(3), fg.LayerGate(3)])
    gates[0].freeze(torch.tensor([False]))
    x = torch.randn(8, 3, 4, 4)
    for gate in gates:
        gate(x)
    live = gates[1].decisions.mean()
    assert fg.activation(gates).item() == pytest.approx(live.item() / 2)
    assert fg.polarization(gates).item() == pytest.approx((live * (1 - live)).item() / 2)
    fg.activation(gates).backward()
    assert gates[0].fc2.bias.grad is None


class CountedOperations(TorchDispatchMode):
    """Counts what computes, forward and backward: everything but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **kwargs or {})


def count_operations(gates: int) -> int:
    made = [layer_gate([1, 0, 1]) for _ in range(gates)]
    costs = {str(i): torch.ones(1, dtype=torch.float64) for i in range(gates)}
    decisions = [gate.decisions for gate in made]
    with CountedOperations() as counted:
        means = fg.losses.gate_means(made)
        loss = fg.polarization(means) + fg.activation(means) + fg.budget(means, 0.5, costs, total=gates)
        torch.autograd.grad(loss, decisions)
    return counted.count


def test_more_layer_gates_are_not_more_operations() -> None:
    """A step of ResNet-110 has 54 of them: at some microseconds each, operations per gate would outweigh its blocks."""
    assert count_operations(54) == count_operations(3)


def test_gates_that_saw_different_numbers_of_samples() -> None:
    gates = [layer_gate([1, 0, 0, 0]), layer_gate([1, 0])]
    assert fg.activation(gates).item() == (1 / 4 + 1 / 2) / 2
    assert fg.polarization(gates).item() == pytest.approx((3 / 16 + 1 / 4) / 2, rel=1e-12)


def test_no_gates_is_an_error() -> None:
    for loss in (fg.polarization, fg.activation, lambda gates: fg.budget(gates, 0.5)):
        with pytest.raises(ValueError, match=r"expected a model with gates, got none; .*attach"):
            loss(fg.models.resnet(8))
        with pytest.raises(ValueError, match="got none"):
            loss([])


def test_a_gate_that_has_not_run_is_named() -> None:
    with pytest.raises(ValueError, match=r"gate 'layer1\.0\.gate' has no decisions yet; run the model's forward"):
        fg.polarization(fg.models.resnet(8, gating="layer"))


@pytest.mark.parametrize("target", [-0.01, 1.01, float("nan")])
def test_a_target_is_a_fraction(target: float) -> None:
    with pytest.raises(ValueError, match="target: expected a fraction between 0 and 1, got"):
        fg.budget([layer_gate([1])], target)


def test_costs_of_other_gates_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"costs: expected the gates 0, got layer1\.0\.gate, or gates of other sizes; .*gate_costs"
    ):
        fg.budget([layer_gate([1])], 0.5, {"layer1.0.gate": torch.tensor([1])})
    with pytest.raises(
        ValueError, match=r"costs: expected the gates 0, got layer1\.0\.gate, or gates of other sizes; .*gate_costs"
    ):
        fg.losses.capacity([layer_gate([1])], {"layer1.0.gate": torch.tensor([1])})
    with pytest.raises(ValueError, match="costs: expected the gates 0, got 0, or gates of other sizes"):
        fg.losses.capacity([channel_gate([[1, 0]])], {"0": torch.tensor([1])})


masks = st.integers(1, 6).flatmap(
    lambda n: st.lists(
        st.integers(1, 5).flatmap(
            lambda c: st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=c, max_size=c), min_size=n, max_size=n)
        ),
        min_size=1,
        max_size=4,
    )
)


@given(masks, st.floats(0, 1), st.data())
def test_all_losses_of_any_decisions(decisions: list, target: float, data: st.DataObject) -> None:
    """decisions: by gate, sample, channel."""
    gates = [channel_gate(rows) for rows in decisions]
    means = [[sum(column) / len(rows) for column in zip(*rows, strict=True)] for rows in decisions]
    costs = [data.draw(st.integers(1, 10**9)) for _ in gates]
    polar = [sum(g * (1 - g) for g in gate) / len(gate) for gate in means]
    active = [sum(gate) / len(gate) for gate in means]
    used = sum(cost * sum(gate) for cost, gate in zip(costs, means, strict=True))
    total = sum(cost * len(gate) for cost, gate in zip(costs, means, strict=True))
    by_name = Costs({str(i): torch.full((len(means[i]),), cost) for i, cost in enumerate(costs)}, total)
    # fp64 sums of a few dozen terms of unit order
    assert fg.polarization(gates).item() == pytest.approx(sum(polar) / len(polar), rel=1e-12, abs=1e-15)
    assert fg.activation(gates).item() == pytest.approx(sum(active) / len(active), rel=1e-12)
    assert fg.budget(gates, target, by_name).item() == pytest.approx((used / total - target) ** 2, rel=1e-9, abs=1e-12)
    assert 0 <= fg.polarization(gates).item() <= 0.25


# gates that are final


def test_final_gates_are_constants_beside_the_live_ones() -> None:
    """A loss over a run is the same with the final gates in the network, frozen, and without them."""
    run = {"a": layer_gate([1, 0, 0, 0]), "b": channel_gate([[1, 0], [1, 1]]), "c": layer_gate([1, 1, 1, 0])}
    costs = {"a": torch.tensor([30]), "b": torch.tensor([20, 20]), "c": torch.tensor([50])}
    final = {"b": torch.tensor([True, False])}
    run["b"].freeze(final["b"])
    run["b"].decisions = final["b"].double().expand(2, 2)
    left = {name: gate for name, gate in run.items() if name != "b"}
    for loss in (
        fg.polarization,
        fg.activation,
        lambda gates, **options: fg.budget(gates, 0.4, costs, total=150, **options),
        lambda gates, **options: fg.losses.capacity(gates, costs, **options),
        lambda gates, **options: fg.budget(gates, 0.4, **options),
    ):
        with_all, with_left = loss(run.items()), loss(left.items(), final=final)
        assert with_left.item() == pytest.approx(with_all.item(), rel=1e-12)
        assert gradients(with_left, left.values()) == [
            pytest.approx(row, rel=1e-12) for row in gradients(with_all, left.values())
        ]
        # frozen or gone is the same
        assert loss(run.items(), final=final).item() == pytest.approx(with_all.item(), rel=1e-12)


def test_no_final_gates_change_nothing() -> None:
    model = fg.models.resnet(8, gating="channel")
    model(torch.randn(6, 3, 8, 8))
    costs = fg.gate_costs(model, (3, 8, 8))
    for loss in (fg.polarization, fg.activation, lambda model, **options: fg.budget(model, 0.5, costs, **options)):
        assert torch.equal(loss(model), loss(model, final={}))


@pytest.mark.parametrize("gone", [["0"], ["3", "1"], ["0", "1", "2", "3", "4"]], ids=str)
def test_sums_do_not_depend_on_which_gates_have_left(gone: list[str]) -> None:
    torch.manual_seed(3)
    means = {str(i): torch.rand(7) for i in range(5)}
    costs = {name: torch.rand(7) for name in means}
    whole = fg.losses.gate_means(means)
    final = {name: means[name] for name in gone}
    live = {name: mean for name, mean in means.items() if name not in gone}
    joined = fg.losses.gate_means(live, final=final, order=means)
    assert list(joined) == list(means) and torch.equal(joined.joined, whole.joined)
    assert torch.equal(fg.losses.capacity(live, costs, final=final), fg.losses.capacity(means, costs))
    assert torch.equal(fg.budget(live, 0.9, costs, total=99, final=final), fg.budget(means, 0.9, costs, total=99))


def test_an_order_of_other_gates_is_refused() -> None:
    means = {"a": torch.rand(1), "b": torch.rand(1)}
    with pytest.raises(ValueError, match=r"order: expected the gates a, b, got a, c; name all .* final="):
        fg.losses.gate_means(means, order=["a", "c"])
    assert list(fg.losses.gate_means(means, order=["b", "a"])) == ["b", "a"]


def test_a_network_whose_gates_have_all_left() -> None:
    plain, final = fg.models.resnet(8), {"a": torch.tensor([True]), "b": torch.tensor([False])}
    assert fg.activation(plain, final=final).item() == 0.5
    assert fg.polarization(plain, final=final).item() == 0.0
    assert not fg.budget(plain, 0.5, final=final).requires_grad
