"""The search in a loop of one's own: the life of the gates, what is kept, and what is refused."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastgate as fg
from fastgate.pruning.config import Phase
from fastgate.pruning.decisions import GateDecision
from fastgate.pruning.search import GateSearch
from tests.votes import cast_votes

# with chosen votes (tests.votes) the gates of the first and the last stage are final after four epochs, all after six
EPOCHS = 7
EARLY = fg.SearchConfig(open_until=0.15, anneal_until=0.4, settle_at=0.8, commit_after=1)
SIZE = (3, 8, 8)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3),
}


@pytest.fixture
def votes(monkeypatch: pytest.MonkeyPatch) -> None:
    cast_votes(monkeypatch.setattr)


@pytest.fixture(scope="module")
def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (48,), generator=generator)
    return TensorDataset(torch.randn(48, *SIZE, generator=generator) + labels[:, None, None, None] / 2, labels)


class Loop:
    """The loop of the README."""

    def __init__(self, gating: str = "layer", kind: str = "sgd", config: fg.SearchConfig = EARLY) -> None:
        torch.manual_seed(0)
        self.model = fg.models.resnet(8, 4, gating=gating)
        self.optimizer = OPTIMIZERS[kind](fg.parameter_groups(self.model))
        self.search = fg.GateSearch(self.model, SIZE, self.optimizer, epochs=EPOCHS, config=config)

    def epochs(self, data: TensorDataset, start: int = 0) -> Iterator[list[str]]:
        """Train epoch by epoch; gives what became final at an epoch's start, at its end."""
        for epoch in range(start, EPOCHS):
            names = self.search.begin_epoch(epoch, DataLoader(data, 16))
            torch.manual_seed(epoch)  # of the order of the samples
            self.steps(DataLoader(data, 16, shuffle=True))
            yield names

    def steps(self, batches: DataLoader[Any]) -> None:
        self.model.train()
        for i, (x, y) in enumerate(batches):
            loss = nn.functional.cross_entropy(self.model(x), y) + self.search.loss(i / len(batches))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        parts = {"search": self.search, "model": self.model, "optimizer": self.optimizer}
        return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})

    def load(self, state: dict[str, Any]) -> "Loop":
        self.search.load_state_dict(state["search"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return self


@pytest.mark.parametrize("gating", ["layer", "channel", "both"])
@pytest.mark.parametrize("detached", [True, False])
def test_gate_losses_train_the_network_only_if_asked_to(gating: str, detached: bool) -> None:
    loop = Loop(gating, config=fg.SearchConfig(open_until=0, detach_gates=detached))
    loop.search.begin_epoch(0)
    loop.model.train()(torch.randn(4, *SIZE))
    loop.search.loss().backward()
    heads = {p for _, gate in fg.named_gates(loop.model) for p in gate.parameters()}
    reached = {p for p in loop.model.parameters() if p.grad is not None and p.grad.any()}
    assert reached & heads
    assert bool(reached - heads) is not detached


def tensors(state: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested states by their path."""
    if isinstance(state, dict):
        items = [(str(key), value) for key, value in state.items()]
    elif isinstance(state, list | tuple):
        items = [(str(i), value) for i, value in enumerate(state)]
    else:
        return {path: state}
    return {name: leaf for key, value in items for name, leaf in tensors(value, f"{path}/{key}").items()}


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    ours, theirs = tensors(first), tensors(second)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name], name


@pytest.mark.usefixtures("votes")
@pytest.mark.parametrize("gating", ["layer", "channel"])
def test_the_life_of_a_run(gating: str, data: TensorDataset) -> None:
    loop = Loop(gating)
    search, whole = loop.search, fg.macs(loop.model, SIZE)
    phases, finals, macs, ratios = [], [], [], []
    for names in loop.epochs(data):
        line = search.metrics()
        phases.append(line["phase"])
        finals.append(names)
        macs.append(fg.macs(loop.model, SIZE))
        ratios.append(line["open_ratio"])
        assert line["macs_training"] == macs[-1]
        assert list(line["gates"]) == list(search.gates)
    assert phases == ["open", "search", "search", "search", "search", "search", "settled"]
    assert ratios[0] == 1.0
    stages = [name.split(".", maxsplit=1)[0] for names in finals for name in names]
    if gating == "layer":
        assert stages == ["layer1", "layer3", "layer2"] and [len(names) for names in finals] == [0, 0, 0, 0, 2, 0, 1]
    # of two in five channels open, one stage's is what the target allows
    assert sorted(stages) == ["layer1", "layer2", "layer3"] and finals[:4] == [[]] * 4 and finals[4] and finals[6]
    assert macs[3] == whole > macs[4] == macs[5] >= macs[6]
    assert list(fg.named_gates(loop.model)) == []
    trained = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in loop.model.parameters()}
    near = max(int(cost) for cost in search.costs.values() for cost in cost) / 2 if gating == "layer" else 0.01 * whole
    assert abs(macs[-1] - 0.5 * whole) <= near
    assert {name: g.open.tolist() for name, g in search.decisions.items()} == {
        name: opened.tolist() for name, opened in search.final.items()
    }
    small = search.compact()
    assert fg.compare(loop.model, small, torch.randn(2, *SIZE)) == 0.0 and small is not loop.model


@pytest.mark.usefixtures("votes")
@pytest.mark.parametrize(("gating", "kind"), [("layer", "adamw"), ("channel", "sgd"), ("both", "adamw")])
def test_a_run_that_goes_on_ends_with_the_same_bits(gating: str, kind: str, data: TensorDataset) -> None:
    """From the end of every epoch, before and after commits: a network made anew takes the shape it had."""
    loop = Loop(gating, kind)
    saved = [loop.state() for _ in loop.epochs(data)]
    for epoch, state in enumerate(saved[:-1], 1):
        later = Loop(gating, kind).load(state)
        assert later.search.phase == (Phase.OPEN if epoch == 1 else Phase.SEARCH)
        for _ in later.epochs(data, epoch):
            pass
        assert_same(later.state(), saved[-1])


@pytest.mark.usefixtures("votes")
def test_channels_leave_with_their_layer(data: TensorDataset) -> None:
    loop = Loop("both")
    search, whole = loop.search, fg.macs(loop.model, SIZE)
    inside = {around: name for name, around in search.costs.within.items()}
    assert len(inside) == 3 and len(search.gates) == 6
    closed: list[str] = []
    for names in loop.epochs(data):
        closed += [name for name in names if name in inside and not bool(search.final[name])]
        # the channels of a closed layer are final with it, and closed
        assert all(not search.final[inside[name]].any() for name in closed)
        line = search.metrics()
        assert line["macs"] == pytest.approx(search.gate_macs.of(search._means()))
    assert closed[:1] == ["layer1.0.gate"] and list(fg.named_gates(loop.model)) == []
    assert fg.macs(loop.model, SIZE) == line["macs"] == pytest.approx(0.5 * whole, rel=0.01)
    assert search.metrics()["phase"] == "settled"
    assert fg.compare(loop.model, search.compact(), torch.randn(2, *SIZE)) == 0.0


def test_what_is_made_final_while_gates_are_held_open_leaves_the_others(data: TensorDataset) -> None:
    loop = Loop("both")
    loop.search.begin_epoch(0, DataLoader(data, 16))
    assert loop.search.phase is Phase.OPEN
    name = "layer3.0.conv2.gate"
    kept = torch.arange(loop.search.gates[name].gates) % 2 == 0
    loop.search.finalize({name: GateDecision(kept.double(), kept)})
    assert dict(fg.named_gates(loop.model)).keys() == loop.search.live.keys() and len(loop.search.live) == 5
    loop.steps(DataLoader(data, 16))
    later = Loop("both").load(loop.state())
    for each in (loop, later):
        for _ in each.epochs(data, 1):
            pass
    assert_same(loop.state(), later.state())
    assert loop.search.phase is Phase.SETTLED


@pytest.mark.usefixtures("votes")
def test_a_run_goes_on_in_the_middle_of_an_epoch(data: TensorDataset) -> None:
    first, second = (DataLoader(data, 16, sampler=order) for order in (range(32), range(32, 48)))

    def until(loop: Loop, epoch: int) -> None:
        for i in range(epoch + 1):
            loop.search.begin_epoch(i, first)
            loop.steps(first)

    whole, stopped = Loop("channel"), Loop("channel")
    until(whole, 4)
    until(stopped, 4)
    resumed = Loop("channel").load(stopped.state())
    assert resumed.search.begin_epoch(4, first) == []  # it has begun
    for loop in (whole, resumed):
        loop.steps(second)
        loop.search.begin_epoch(5, first)
    assert_same(whole.state(), resumed.state())


def test_what_a_state_belongs_to(data: TensorDataset) -> None:
    loop = Loop()
    next(loop.epochs(data))
    state = loop.search.state_dict()
    with pytest.raises(ValueError, match="expected a search that has not begun, got one in epoch 0"):
        loop.search.load_state_dict(state)
    other = Loop(config=fg.SearchConfig(target=0.6))
    with pytest.raises(ValueError, match="got another target, open_until, anneal_until, settle_at, commit_after"):
        other.search.load_state_dict(state)
    with pytest.raises(ValueError, match="same gates, got that of another network"):
        Loop("channel").search.load_state_dict(state)
    with pytest.raises(ValueError, match="version 1, got None"):
        Loop().search.load_state_dict({})
    del state["config"]["detach_gates"]  # as saved before there was such an option
    with pytest.raises(ValueError, match="got another detach_gates: detach_gates=False; create the search with these"):
        Loop().search.load_state_dict(state)
    before = Loop(config=replace(EARLY, detach_gates=False))
    before.search.load_state_dict(state)
    assert before.search.epoch == 0


def test_an_epoch_whose_decisions_fail_has_not_begun(data: TensorDataset) -> None:
    """In the middle of a run, and where gates that were held open are to be decided at once."""
    images, labels = data.tensors
    broken = DataLoader(TensorDataset(images * torch.nan, labels), 16)
    for open_until, epochs in ((0.0, 2), (0.3, 2)):
        config = fg.SearchConfig(open_until=open_until, anneal_until=0.3, settle_at=0.3, commit_after=None)
        loop = Loop(config=config)
        steps = loop.epochs(data)
        for _ in range(epochs):
            next(steps)
        before = loop.state()
        with pytest.raises(ValueError, match="expected logits without nan, got nan"):
            loop.search.begin_epoch(epochs, broken)
        assert_same(loop.state(), before)
        assert len(loop.search.begin_epoch(epochs, DataLoader(data, 16))) == 3
        assert loop.search.phase is Phase.SETTLED


def test_random_numbers_are_those_of_a_loop_without_a_search(data: TensorDataset) -> None:
    loop = Loop(config=fg.SearchConfig(open_until=0, anneal_until=0, settle_at=0))
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    assert len(loop.search.begin_epoch(0, DataLoader(data, 16, shuffle=True))) == 3
    assert torch.equal(torch.rand(3), wanted)


def test_statistics_are_refreshed_for_an_evaluation(data: TensorDataset) -> None:
    """While gates are live; before the network is put into eval mode."""
    loop = Loop(config=fg.SearchConfig(open_until=0.15, anneal_until=0.4, settle_at=0.5, commit_after=None))
    changed = []
    for _ in loop.epochs(data):
        before = loop.model.bn1.running_mean.clone()
        torch.manual_seed(3)
        loop.search.refresh(DataLoader(data, 16, shuffle=True))
        changed.append(not torch.equal(loop.model.bn1.running_mean, before))
        if changed[-1]:
            loop.model.eval()
            with pytest.raises(ValueError, match=r"expected it in training mode, got eval; refresh before model\.eval"):
                loop.search.refresh(DataLoader(data, 16))
    assert changed == [False, True, True, True, False, False, False]  # held open, live, settled


def test_gates_left_at_the_end_are_decided_by_compact(data: TensorDataset) -> None:
    config = fg.SearchConfig(open_until=0, anneal_until=0, settle_at=None, commit_after=None)
    loop = Loop("channel", config=config)
    for _ in loop.epochs(data):
        pass
    before = loop.state()
    with pytest.raises(ValueError, match="expected batches on which to decide 3 gates that are not final, got none"):
        loop.search.compact()
    small = loop.search.compact(DataLoader(data, 16))
    assert list(fg.named_gates(small)) == [] and len(loop.search.live) == 3
    assert fg.macs(small, SIZE) == pytest.approx(0.5 * loop.search.macs, rel=0.01)
    assert_same(loop.state()["model"], before["model"])


def test_final_gates_may_stay_in_the_network(data: TensorDataset) -> None:
    loop = Loop("channel", config=fg.SearchConfig(open_until=0, anneal_until=0, settle_at=0.5, compact_training=False))
    for _ in loop.epochs(data):
        pass
    assert fg.macs(loop.model, SIZE) == loop.search.macs == loop.search.macs_training
    assert all(gate.frozen for _, gate in fg.named_gates(loop.model)) and loop.search.phase is Phase.SETTLED
    assert fg.macs(loop.search.compact(), SIZE) == pytest.approx(0.5 * loop.search.macs, rel=0.01)


def test_the_loss_is_that_of_the_losses(data: TensorDataset) -> None:
    """In the search: the config's weights times the public losses, with gates that left the network as constants."""
    config = fg.SearchConfig(
        target=0.7, open_until=0, anneal_until=0.5, settle_at=None, polarization="0:1 -> 7:3", activation=0.25
    )
    loop = Loop(config=config)
    search = loop.search
    assert search.begin_epoch(0) == []
    closed = next(iter(search.gates))
    search.finalize(fg.Decisions({closed: GateDecision(torch.zeros(1), torch.zeros(1) == 1)}))
    x, _ = data[:16]
    loop.model.train()(x)
    value = search.loss(0.5)
    means = {name: gate.decisions.mean(0, keepdim=True) for name, gate in search.live.items()}
    joined = torch.stack([torch.zeros(()), *(mean.squeeze() for mean in means.values())])
    costs = torch.stack([cost.double() for cost in search.costs.values()]).squeeze()
    parameters = torch.cat(list(fg.gate_costs(Loop().model, SIZE, "params").values())).double()
    target = 1 - 0.3 * 0.5 / 3.5
    share = 1 - float((costs * (1 - joined)).sum()) / search.costs.total
    switchable = float(costs.sum()) / search.costs.total
    expected = (
        (1 + 2 * 0.5 / 7) * (joined * (1 - joined)).mean()
        + 0.25 * joined.mean()
        + 16 * ((share - target) / switchable) ** 2
        + 0.1 * (parameters * (1 - joined)).sum() / parameters.sum()
    )
    assert float(value) == pytest.approx(float(expected), rel=1e-5)  # sums in fp32
    value.backward()
    assert all(gate.fc2.bias.grad is not None for gate in search.live.values())


def test_an_optimizer_made_before_the_gates() -> None:
    model = torchvision.models.resnet18(num_classes=4)
    optimizer = torch.optim.AdamW(model.parameters())
    fg.attach(model, "layer")
    with pytest.raises(
        ValueError, match=r"got one without 48 tensors of the 8 gates; create it after fastgate\.attach"
    ):
        GateSearch(model, (3, 32, 32), optimizer, epochs=3)


def test_an_optimizer_that_holds_more(data: TensorDataset) -> None:
    """Of another part of the user's loop, say a loss with weights: they stay where they are."""
    loop = Loop("channel", config=fg.SearchConfig(open_until=0, anneal_until=0, settle_at=0.2))
    more = nn.Parameter(torch.ones(3))
    loop.optimizer.add_param_group({"params": [more], "lr": 0.5})
    more.grad = torch.ones(3)
    loop.optimizer.step()
    assert len(list(loop.epochs(data))) == EPOCHS and loop.search.phase is Phase.SETTLED
    assert loop.optimizer.param_groups[-1]["params"] == [more] and loop.optimizer.param_groups[-1]["lr"] == 0.5
    assert "momentum_buffer" in loop.optimizer.state[more]


def test_state_that_cannot_be_cut_is_found_before_the_search(data: TensorDataset) -> None:
    loop = Loop("channel")
    loop.optimizer = torch.optim.Adafactor(loop.model.parameters())
    loop.search = GateSearch(loop.model, SIZE, loop.optimizer, epochs=EPOCHS, config=EARLY)
    epochs = loop.epochs(data)
    next(epochs)
    with pytest.raises(ValueError, match=r"expected its state '\w+' of 'layer1\.0\.conv\d\.weight' to have the param"):
        next(epochs)
    layers = Loop("layer")  # whole layers leave, and their state with them
    layers.optimizer = torch.optim.Adafactor(layers.model.parameters())
    layers.search = GateSearch(layers.model, SIZE, layers.optimizer, epochs=EPOCHS, config=EARLY)
    assert len(list(layers.epochs(data))) == EPOCHS


def test_what_a_loop_may_not_leave_out(data: TensorDataset) -> None:
    loop = Loop()
    with pytest.raises(ValueError, match="expected begin_epoch before the first step"):
        loop.search.loss()
    with pytest.raises(ValueError, match="epoch: expected 0 or 0, got 2"):
        loop.search.begin_epoch(2)
    loop.search.begin_epoch(0)
    with pytest.raises(ValueError, match="epoch: expected 0 or 1, got 3"):
        loop.search.begin_epoch(3)
    loop.search.begin_epoch(1)
    with pytest.raises(ValueError, match="in epoch 1, got none"):
        loop.search.begin_epoch(2)
    with pytest.raises(ValueError, match="expected a step whose loss includes search"):
        loop.search.metrics()
    late = Loop(config=fg.SearchConfig(open_until=0, anneal_until=0, settle_at=0))
    with pytest.raises(ValueError, match="expected batches in epoch 0, in which the remaining gates are decided"):
        late.search.begin_epoch(0)
    assert late.search.begin_epoch(0, DataLoader(data, 16)) != []  # nothing had changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1.5}, "target: expected a fraction from 0 to 1, got 1.5"),
        ({"cost": "joules"}, "cost: expected one of macs, params, latency, got 'joules'"),
        ({"open_until": 0.5}, "expected increasing fractions of the epochs, got 0.5, 0.25, 0.4"),
        ({"commit_after": 0}, "commit_after: expected a positive integer or None, got 0"),
        ({"round_to": 2.5}, "round_to: expected a positive integer or None, got 2.5"),
        ({"budget": "much"}, "schedule: expected a number"),
    ],
)
def test_configurations_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fg.SearchConfig(**options)


def test_networks_that_are_refused() -> None:
    plain = fg.models.resnet(8, 4)
    with pytest.raises(ValueError, match="model: expected gates, got none; add them with"):
        GateSearch(plain, SIZE, torch.optim.SGD(plain.parameters()), epochs=3)
    gated = fg.models.resnet(8, 4, gating="layer")
    optimizer = torch.optim.SGD(gated.parameters())
    message = r"target: expected 0\.\d{4} to 1 of the network's cost \(the rest is not gated\), got 0\.01"
    with pytest.raises(ValueError, match=message):
        GateSearch(gated, SIZE, optimizer, epochs=3, config=fg.SearchConfig(target=0.01))
    with pytest.raises(ValueError, match="epochs: expected a positive number, got 0"):
        GateSearch(gated, SIZE, optimizer, epochs=0)
    with pytest.raises(ValueError, match=r"optimizer: expected parameters of this model, got \d+ others"):
        GateSearch(fg.models.resnet(8, 4, gating="layer"), SIZE, optimizer, epochs=3)


def test_a_network_that_is_called_otherwise(data: TensorDataset) -> None:
    """A mapping of keyword arguments, outputs in a mapping."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.resnet = fg.models.resnet(8, 4, gating="layer")

        def forward(self, *, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": self.resnet(pixel_values)}

    model = Net()
    optimizer = torch.optim.SGD(fg.parameter_groups(model), lr=0.1)
    config = fg.SearchConfig(open_until=0, anneal_until=0, settle_at=0.5)
    search = GateSearch(model, {"pixel_values": torch.zeros(1, *SIZE)}, optimizer, epochs=2, config=config)
    batches = [{"pixel_values": data[:16][0], "labels": data[:16][1]}]
    search.begin_epoch(0, batches)
    model(**batches[0])
    search.loss().backward()
    optimizer.step()
    assert len(search.begin_epoch(1, batches)) == 3 and search.difference == 0.0


@pytest.mark.parametrize("gating", ["layer", "channel"])
def test_gates_that_did_not_learn_the_target_are_said(gating: str, data: TensorDataset) -> None:
    """All are open, half of the MACs has to go: a warning says how much is closed against the samples."""
    model = fg.models.resnet(14, 4, gating=gating)
    optimizer = torch.optim.SGD(fg.parameter_groups(model, gate_lr=0.0), lr=0.1)
    config = fg.SearchConfig(open_until=0, anneal_until=0, settle_at=0.5)
    search = GateSearch(model, SIZE, optimizer, epochs=2, config=config)
    batches = [data[:16]]
    search.begin_epoch(0, batches)
    model(batches[0][0])
    search.loss().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"the gates did not learn the target: (4|5)\d% of the network's cost"):
        search.begin_epoch(1, batches)
    assert len(optimizer.param_groups) == 2


def test_compact_says_it_too(data: TensorDataset) -> None:
    """Where gates are decided at the very end."""
    model = fg.models.resnet(14, 4, gating="layer")
    optimizer = torch.optim.SGD(fg.parameter_groups(model, gate_lr=0.0), lr=0.1)
    config = fg.SearchConfig(open_until=0, anneal_until=0, settle_at=None)
    search = GateSearch(model, SIZE, optimizer, epochs=1, config=config)
    search.begin_epoch(0)
    with pytest.warns(UserWarning, match="the gates did not learn the target"):
        search.compact([data[:16]])
