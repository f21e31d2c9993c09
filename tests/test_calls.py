"""What gate losses and decisions count: every call of a gate in a step, every row of each, and nothing else."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastgate as fg
from fastgate.losses import gate_means


class Network(nn.Module):
    """A stem, a layer gate that opens for images brighter than the batch, and a sum over what it leaves open."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 1)
        self.gate = fg.LayerGate(2, window="identity", init_logit=0.0)
        sign = torch.tensor([1.0, -1.0]).repeat(8)  # logit = relu(z) - relu(-z) = z, the standardised brightness
        with torch.no_grad():
            self.stem.weight.fill_(1)
            self.gate.fc1.weight.copy_(sign[:, None].expand(16, 2))
            self.gate.fc2.weight.copy_(sign / 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return (y * self.gate(y)).sum()


def images(n: int) -> Tensor:
    return torch.randn(n, 1, 4, 4) + torch.randn(n, 1, 1, 1)


@pytest.fixture
def model() -> Network:
    return Network()


def test_all_calls_of_a_step_count_by_their_rows(model: Network) -> None:
    """A siamese network."""
    calls = []
    loss = torch.zeros(())
    for n in (3, 8):
        loss = loss + model(images(n))
        calls.append(model.gate.decisions)
    wanted = torch.cat(calls).mean()
    assert 0 < wanted < 1 and calls[0].mean() != calls[1].mean()
    assert torch.equal(fg.activation(model), wanted)
    # a second loss of the step is about the same calls
    assert fg.budget(model, 0.25).item() == pytest.approx((wanted.item() - 0.25) ** 2, rel=1e-6)
    weights = [model.stem.weight, *model.gate.parameters()]
    gradients = torch.autograd.grad(fg.activation(model), weights, retain_graph=True)
    by_hand = torch.autograd.grad(wanted, weights)
    for ours, theirs in zip(gradients, by_hand, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_next_step_counts_its_own_calls(model: Network) -> None:
    for n in (3, 8):
        loss = model(images(n)) + fg.activation(model)
        assert fg.activation(model) == model.gate.decisions.mean()
        loss.backward()


def test_accumulated_losses_add_up_before_one_backward(model: Network) -> None:
    total = torch.zeros(())
    for n in (3, 8, 5):
        total = total + model(images(n)) + fg.activation(model)
        assert fg.activation(model) == model.gate.decisions.mean()
    total.backward()


def test_a_backward_without_gate_losses_ends_the_step(model: Network) -> None:
    """As while gates are not to learn yet; a graph that is kept for another backward is still of this step."""
    model(images(3)).backward()
    model(images(8)).backward(retain_graph=True)
    assert fg.activation(model) == model.gate.decisions.mean()


def test_forwards_that_are_dropped_cost_nothing_and_do_not_count(model: Network) -> None:
    first = model(images(3))
    (node,) = model.gate.calls._nodes
    assert node() is not None
    del first
    loss = model(images(8))
    gc.collect()
    assert node() is None  # and with it the graph
    assert fg.activation(model) == model.gate.decisions.mean()
    loss.backward()


def test_forwards_without_gradients_do_not_count_in_training(model: Network) -> None:
    loss = model(images(3))
    wanted = model.gate.decisions.mean()
    with torch.no_grad():
        model(images(8))
    assert fg.activation(model) == wanted
    (loss + fg.activation(model)).backward()


def test_evaluation_between_forward_and_loss_changes_nothing(model: Network) -> None:
    loss = model(images(8))
    wanted = fg.activation(model)
    fg.decide(model, [images(5)])
    assert torch.equal(fg.activation(model), wanted)
    (loss + fg.activation(model)).backward()
    model.eval()
    model(images(5))
    assert fg.activation(model) == model.gate.decisions.mean()  # of the last forward


def no_grad(model: Network) -> None:
    with torch.no_grad():
        model(images(8))


def decide(model: Network) -> None:
    fg.decide(model, [images(8)])


def after_training(model: Network) -> None:
    model(images(8)).backward()
    decide(model)


def reentrant(model: Network) -> None:
    checkpoint(model, images(8).requires_grad_(), use_reentrant=True)


@pytest.mark.parametrize("forward", [no_grad, decide, after_training, reentrant], ids=lambda f: f.__name__)
def test_decisions_that_train_nothing_are_an_error(model: Network, forward: Callable[[Network], None]) -> None:
    forward(model)
    for loss in (fg.activation, fg.polarization, lambda model: fg.budget(model, 0.5)):
        with pytest.raises(ValueError, match=r"gate 'gate': expected decisions with a graph, .*use_reentrant=False"):
            loss(model)
    with torch.no_grad():  # to look at them is no training
        assert 0 <= fg.activation(model) <= 1
    model.gate.freeze(torch.tensor(True))
    no_grad(model)
    assert fg.activation(model) == 1  # a constant, as it should be


def test_decisions_of_an_earlier_step_are_an_error(model: Network) -> None:
    (model(images(8)) + fg.activation(model)).backward()
    with pytest.raises(
        ValueError, match=r"gate 'gate': .* an earlier forward whose graph has been freed; run the model's"
    ):
        fg.activation(model)


def test_a_head_that_does_not_learn_may_have_no_graph(model: Network) -> None:
    model.requires_grad_(False)
    model(images(8))
    assert fg.activation(model) == model.gate.decisions.mean()


def test_checkpointing_without_reentrance_counts_each_call_once(model: Network) -> None:
    plain = Network()
    plain.load_state_dict(model.state_dict())
    for _ in range(2):  # the repetition in backward is not of the next step
        x = [images(3), images(8)]
        for network, run in ((plain, lambda n, x: n(x)), (model, lambda n, x: checkpoint(n, x, use_reentrant=False))):
            loss = sum(run(network, batch) for batch in x) + 10 * fg.activation(network)
            network.zero_grad()
            loss.backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)


def test_looking_at_the_calls_does_not_run_a_checkpointed_forward_again(model: Network) -> None:
    forwards = []
    model.stem.register_forward_hook(lambda *_: forwards.append(1))
    loss = checkpoint(model, images(8), use_reentrant=False) + fg.activation(model)
    assert len(forwards) == 1
    loss.backward()
    assert len(forwards) == 2


def test_replicas_count_together(model: Network) -> None:
    """As `nn.DataParallel` makes them on several GPUs: shallow copies with the parameters' graph."""
    replicas = []
    for _ in range(2):
        replica = model._replicate_for_data_parallel()
        gate, stem = model.gate._replicate_for_data_parallel(), model.stem._replicate_for_data_parallel()
        for module, source in ((gate, model.gate), (stem, model.stem)):
            module._parameters = dict(source._parameters)
        for name in ("fc1", "bn", "fc2"):
            gate._modules[name] = model.gate._modules[name]
        replica._modules = {"stem": stem, "gate": gate}
        replicas.append(replica)
    loss = sum(replica(images(n)) for replica, n in zip(replicas, (3, 8), strict=True))
    means = torch.cat([replica.gate.decisions for replica in replicas]).mean()
    assert model.gate.decisions is None
    assert torch.equal(fg.activation(model), means)
    (loss + fg.activation(model)).backward()
    assert model.gate.fc2.bias.grad is not None


def test_means_and_costs_of_half_precision_are_weighed_in_float32() -> None:
    """A network of 2^20 MACs is more than fp16 holds."""
    model = Network().half()
    model(images(8).half())
    means = gate_means(model)
    assert means["gate"].dtype == torch.float32
    costs = {"gate": torch.tensor([1 << 20])}
    assert fg.budget(model, 0.0, costs, total=1 << 20).item() == pytest.approx(means["gate"].item() ** 2)
    assert fg.losses.capacity(model, costs).item() == pytest.approx(1 - means["gate"].item())


class Clips(nn.Module):
    """Clips `[N, T, C, H, W]`, folded to `[N * T, C, H, W]`, and the first frame of each once more."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = fg.LayerGate(1, init_logit=None)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.flatten(0, 1)
        return frames * self.gate(frames), self.gate(x[:, 0])


def test_decide_counts_every_call_and_every_row() -> None:
    model, seen = Clips().eval(), []
    clips = [torch.randn(4, 5, 1, 3, 3), torch.randn(2, 5, 1, 3, 3)]
    for batch in clips:
        frames, firsts = batch.flatten(0, 1), batch[:, 0]
        with torch.no_grad():
            seen += [model.gate(frames).flatten(), model.gate(firsts).flatten()]
    decisions = fg.decide(model, clips)
    assert 0 < torch.cat(seen).mean() < 1
    assert decisions["gate"].mean.tolist() == [pytest.approx(float(torch.cat(seen).double().mean()), abs=1e-15)]
    assert decisions.samples == 6 and decisions["gate"].rows == 36
    again = fg.Decisions.from_json(decisions.to_json())
    assert again == decisions and again["gate"].rows == 36


def test_decide_names_a_gate_whose_logits_are_nan() -> None:
    model, x = Clips(), torch.randn(4, 5, 1, 3, 3)
    x[1, 2] = torch.nan
    with pytest.raises(ValueError, match="gate 'gate': expected logits without nan, got nan for some samples"):
        fg.decide(model, [x])


def test_decide_asks_a_compiled_network() -> None:
    """Compiled before there was a hook on its gates."""
    model, x = Clips().eval(), torch.randn(4, 5, 1, 3, 3)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    assert fg.decide(compiled, [x])["_orig_mod.gate"] == fg.decide(model, [x])["gate"]
    assert not model.gate._forward_hooks
