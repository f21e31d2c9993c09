import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fastgate as fg
from fastgate.models import ResidualBlock
from fastgate.pruning.commitment import commit
from tests.helpers import GATINGS, PlainBlock, draw_masks, gated_resnet, gating_ids, randomize_batch_norm

NETWORKS: dict[str, Callable[[tuple[str, str]], nn.Module]] = {
    "resnet14": lambda gating: gated_resnet(14, gating),
    "resnet14-pad": lambda gating: gated_resnet(14, gating, "pad"),
    "torchvision-resnet18": lambda gating: fg.attach(
        randomize_batch_norm(torchvision.models.resnet18(num_classes=10)).eval(), *gating
    ),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-3, amsgrad=True),
}


def build_optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    """Gate heads in a group of their own, as in the trainer."""
    heads = [p for name, p in model.named_parameters() if ".gate." in name]
    rest = [p for name, p in model.named_parameters() if ".gate." not in name]
    return OPTIMIZERS[kind]([{"params": rest}, {"params": heads, "weight_decay": 0.0}])


def freeze_some(model: nn.Module) -> set[str]:
    """Freeze two of three gates, closed, mixed and open ones among them; returns the names of the live ones."""
    masks = draw_masks(model, "random")
    live = set()
    for i, (name, gate) in enumerate(fg.named_gates(model)):
        mask = (torch.zeros(gate.gates) == 1, masks[name], torch.ones(gate.gates) == 1)[(i // 2) % 3]
        if i % 3 == 2:
            live.add(name)
        else:
            gate.freeze(mask)
    return live


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, 16, 16, generator=generator, dtype=dtype)
    y = torch.randint(10, (6,), generator=generator)
    loss = nn.functional.cross_entropy(model.train()(x), y)
    if live := [gate for _, gate in fg.named_gates(model) if not gate.frozen]:
        loss = loss + fg.polarization(live)  # a mean over gates: of the same ones before and after
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and every tensor of the optimizer's state, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                found[f"{name}:{key}"] = value
    return found


@pytest.mark.parametrize(
    ("network", "kind"),
    [
        ("resnet14", "sgd"),
        ("resnet14", "adam"),
        ("resnet14-pad", "sgd"),
        pytest.param("resnet14-pad", "adam", marks=pytest.mark.slow),
        ("torchvision-resnet18", "sgd"),
        pytest.param("torchvision-resnet18", "adam", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_training_goes_on_as_that_of_the_frozen_network(network: str, gating: tuple[str, str], kind: str) -> None:
    model = NETWORKS[network](gating).double()
    optimizer = build_optimizer(kind, model)
    for seed in range(2):
        train_step(model, optimizer, seed, torch.float64)
    live = freeze_some(model)
    frozen = copy.deepcopy(model)
    theirs = build_optimizer(kind, frozen)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    groups = optimizer.param_groups

    assert commit(model, optimizer) is model
    assert dict(fg.named_gates(model)).keys() == live
    assert optimizer.param_groups[0] is groups[0] and len(optimizer.param_groups) == 2
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.parameters()}
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    assert fg.compare(frozen, model, x) <= (0.0 if gating[0] == "layer" else 1e-12)

    # fp64: what differs after two more steps is rounding, of sums that are orders below
    before = {name: value.clone() for name, value in by_name(model, optimizer).items()}
    for seed in range(2, 4):
        train_step(model, optimizer, seed, torch.float64)
        train_step(frozen, theirs, seed, torch.float64)
    assert fg.compare(frozen, model, x) < 1e-7
    whole = by_name(frozen, theirs)
    commit(frozen, theirs)  # the same now as then
    ours, expected = by_name(model, optimizer), by_name(frozen, theirs)
    assert {key.rpartition(":")[2] for key in ours if ":" in key} >= (
        {"momentum_buffer"} if kind == "sgd" else {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"}
    )
    assert ours.keys() == expected.keys() < whole.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9, msg=name)
    assert any(value.shape != whole[name].shape for name, value in ours.items()) == (gating[0] == "channel")
    heads = [name for name in ours if ".gate.fc" in name and ":" not in name]
    assert heads and any(not torch.equal(ours[name], before[name]) for name in heads)  # live gates learn


@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_momentum_is_sliced_and_not_reset(gating: tuple[str, str]) -> None:
    """Every state tensor becomes what the same cut makes of its parameter: here both hold the same numbers."""
    model = gated_resnet(14, gating)
    optimizer = build_optimizer("sgd", model)
    train_step(model, optimizer, 0, torch.float32)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = parameter.detach().clone()
    freeze_some(model)
    commit(model, optimizer)
    for name, parameter in model.named_parameters():
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], parameter), name
        assert optimizer.state[parameter]["momentum_buffer"].stride() == parameter.stride()


@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_with_every_gate_frozen_it_is_compaction(gating: tuple[str, str]) -> None:
    model = gated_resnet(14, gating).to(memory_format=torch.channels_last)
    optimizer = build_optimizer("adam", model)
    train_step(model, optimizer, 0, torch.float32)
    fg.freeze(model, fg.decide(model, [torch.randn(4, 3, 16, 16)]))
    small = fg.compact(model)
    commit(model, optimizer)
    ours, theirs = model.state_dict(), small.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert optimizer.param_groups[1]["params"] == []
    train_step(model, optimizer, 1, torch.float32)  # an empty group does no harm


def test_commits_one_after_the_other_are_one_commit() -> None:
    model = gated_resnet(20, ("channel", "middle"))
    other = copy.deepcopy(model)
    masks = draw_masks(model, "mixed")
    for network, order in ((model, [[0, 1, 2, 3, 4, 5, 6, 7, 8]]), (other, [[7, 2], [0, 1, 3], [8, 4, 5, 6]])):
        optimizer = build_optimizer("sgd", network)
        gates = list(fg.named_gates(network))
        for part in order:
            for i in part:
                gates[i][1].freeze(masks[gates[i][0]])
            commit(network, optimizer)
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_keep_their_memory_format() -> None:
    model = gated_resnet(8, ("channel", "middle")).to(memory_format=torch.channels_last)
    optimizer = build_optimizer("sgd", model)
    for _, gate in fg.named_gates(model):
        gate.freeze(torch.arange(gate.gates) % 2 == 0)
    commit(model, optimizer)
    block = model.layer1[0]
    assert block.conv1.weight.shape == (8, 16, 3, 3) and block.conv2.weight.shape == (16, 8, 3, 3)
    for conv in (block.conv1, block.conv2):
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_network_that_is_one_closed_block() -> None:
    model = fg.attach(PlainBlock(4), "layer").eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.gate.freeze(torch.tensor([False]))
    x = torch.randn(2, 4, 5, 5)
    wanted = model(x)
    rest = commit(model, optimizer)
    assert not isinstance(rest, ResidualBlock) and torch.equal(rest(x), wanted)
    assert optimizer.param_groups[0]["params"] == []


def test_what_cannot_be_committed_changes_nothing() -> None:
    model = gated_resnet(8, ("channel", "middle"))
    with pytest.raises(ValueError, match=r"optimizer: expected parameters of this model, got \d+ others"):
        commit(model, build_optimizer("sgd", copy.deepcopy(model)))

    # a state that has another shape than its parameter, as of Adafactor
    optimizer = build_optimizer("sgd", model)
    optimizer.state[model.layer1[0].conv1.weight]["row"] = torch.zeros(16)
    next(fg.named_gates(model))[1].freeze(torch.arange(16) < 4)
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"its state 'row' of 'layer1.0.conv1.weight' to have the parameter's shape"):
        commit(model, optimizer)
    assert list(model.state_dict()) == list(before) and model.layer1[0].conv1.weight.shape[0] == 16

    # a block that cannot be cut, behind one that can
    net = fg.attach(nn.Sequential(PlainBlock(4), PlainBlock(4)), "channel")
    net[1].bn1 = nn.GroupNorm(2, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _, gate in fg.named_gates(net):
        gate.freeze(torch.tensor([True, False, True, True]))
    with pytest.raises(ValueError, match="cannot cut the channels of GroupNorm"):
        commit(net, optimizer)
    assert net[0].conv1.weight.shape[0] == 4 and len(list(fg.named_gates(net))) == 2
