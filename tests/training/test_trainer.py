import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgate as fg
from fastgate.training.callbacks import Callback
from fastgate.training.data import Dataset, load_dataset
from fastgate.training.networks import build_network, evaluate, load_network, resolve_precision
from fastgate.training.recipe import Recipe, change, make_recipe
from fastgate.training.records import EpochRecord
from fastgate.training.trainer import Interrupted, NonFiniteLoss, Trainer
from tests.integrations.loops import make_data
from tests.training.runs import TINY, trainer_of


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_gates_are_open_then_live_then_frozen(digits: Dataset, tmp_path: Path) -> None:
    trainer = trainer_of(TINY, digits, tmp_path)
    states: list[set[bool]] = []
    train_epoch = trainer._train_epoch

    def watch(*arguments: Any) -> None:
        states.append({gate.frozen for gate in trainer.search.gates.values()})
        train_epoch(*arguments)

    trainer._train_epoch = watch  # type: ignore[method-assign]
    trainer.fit()
    # 4 epochs: open until 0.25, settled from 0.75
    assert states == [{True}, {False}, {False}, {True}]
    lines = metrics(tmp_path)
    assert lines[0]["open_ratio"] == 1.0 and lines[0]["macs"] == trainer.search.macs
    decided = fg.Decisions.from_json(tmp_path / "decisions.json")
    assert {name: gate.open.tolist() for name, gate in trainer.search.gates.items()} == {
        name: gate.open.tolist() for name, gate in decided.items()
    }
    assert lines[3]["gates"] == {name: gate.open.float().tolist() for name, gate in decided.items()}
    assert lines[3]["polarization"] == 0.0 and lines[3]["frozen"]


def test_metrics_of_an_epoch(digits: Dataset, tmp_path: Path) -> None:
    recipe = change(TINY, epochs=2, open_until=0.0, anneal_until=0.5, settle_at=None, activation="0.5")
    trainer = trainer_of(recipe, digits, tmp_path)
    trainer.fit()
    for line in metrics(tmp_path):
        train = line["train"]
        # the parts are means over steps, and the weights are constant: so is their sum, up to fp32 sums over 11 steps
        total = train["task"] + train["polarization"] + 0.5 * train["activation"] + 16 * train["budget"]
        total += 0.1 * train["capacity"]
        assert train["loss"] == pytest.approx(total, rel=1e-5)
        means = torch.cat([torch.tensor(mean) for mean in line["gates"].values()])
        assert line["open_ratio"] == pytest.approx(float(means.mean()), rel=1e-5)
        assert train["activation"] == pytest.approx(line["open_ratio"], rel=1e-5)
        closed = sum(float(trainer.search.costs[n][0]) * (1 - mean[0]) for n, mean in line["gates"].items())
        assert line["macs"] == pytest.approx(trainer.search.macs - closed, abs=1)
        assert line["eval"]["split"] == "test"
        assert line["seconds"]["train"] > 0 and line["seconds"]["eval"] > 0


def test_last_line_is_what_the_network_does(digits: Dataset, tmp_path: Path) -> None:
    trainer = trainer_of(change(TINY, epochs=1, open_until=0, anneal_until=0, settle_at=None), digits, tmp_path)
    trainer.fit()
    model, _ = load_network(tmp_path / "checkpoint.pt")
    model.eval().to(memory_format=torch.channels_last)  # as it trained: the same sums
    batches = digits.evaluation("test", 500, channels_last=True)
    with torch.no_grad():
        correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    assert metrics(tmp_path)[0]["eval"]["accuracy"] == pytest.approx(correct / 360)


def test_validation_images_take_the_place_of_the_test_set(tmp_path: Path) -> None:
    data = load_dataset("digits", validation=100)
    trainer = trainer_of(change(TINY, epochs=1, validation=100), data, tmp_path)
    trainer.fit()
    line = metrics(tmp_path)[0]
    assert line["eval"]["split"] == "validation"
    assert (line["eval"]["accuracy"] * 100) == pytest.approx(round(line["eval"]["accuracy"] * 100), abs=1e-9)


def test_gates_have_their_own_optimizer_group(digits: Dataset, tmp_path: Path) -> None:
    trainer = trainer_of(TINY, digits, tmp_path)
    network, gates = trainer.optimizer.param_groups
    assert (network["weight_decay"], gates["weight_decay"]) == (5e-4, 0.0)
    in_gates = {id(p) for gate in trainer.search.gates.values() for p in gate.parameters()}
    assert {id(p) for p in gates["params"]} == in_gates
    assert {id(p) for p in network["params"]} | in_gates == {id(p) for p in trainer.model.parameters()}


def pull(recipe: Recipe, bias: float, digits: Dataset, folder: Path) -> dict[str, float]:
    """The gradient of a first step at the last bias of every gate: what pulls it closed.

    All gates decide by this bias alone.
    """
    trainer = trainer_of(change(recipe, open_until=0.0, anneal_until=0.0, polarization="0"), digits, folder)
    with torch.no_grad():
        for gate in trainer.search.gates.values():
            gate.fc2.weight.zero_()
            gate.fc2.bias.fill_(bias)
    trainer.model.train()
    trainer.training_step(next(iter(trainer.train_loader)), trainer._schedule()[0])
    return {name: float(gate.fc2.bias.grad) for name, gate in trainer.search.gates.items()}


@pytest.mark.parametrize("bias", [0.5, -0.5])
def test_the_gates_follow_the_target(bias: float, digits: Dataset, tmp_path: Path) -> None:
    """Open ones are pulled closed and closed ones open, all of them, by a budget beside which the task is nothing."""
    pulls = pull(change(TINY, target=0.55, budget="1e4"), bias, digits, tmp_path)
    assert len(pulls) == 3 and all((each > 0) == (bias > 0) and abs(each) > 1 for each in pulls.values())


def test_capacity_decides_between_blocks_of_like_cost(digits: Dataset, tmp_path: Path) -> None:
    """Every gate is held open by its share of the parameters: the blocks of the first stage have the fewest."""
    recipe = change(TINY, network="resnet14", capacity="0", target=0.6)
    without = pull(recipe, 0.5, digits, tmp_path)
    held = {
        name: without[name] - strongly
        for name, strongly in pull(change(recipe, capacity="10"), 0.5, digits, tmp_path).items()
    }
    model = build_network(recipe, digits.image_size, 10)
    macs, parameters = (fg.gate_costs(model, digits.image_size, cost) for cost in ("macs", "params"))
    alike = [f"layer{block}.gate" for block in ("1.0", "1.1", "2.1", "3.1")]
    assert len({int(macs[name]) for name in alike}) == 1
    assert [int(parameters[name]) for name in alike] == sorted(int(parameters[name]) for name in alike)
    shares = [int(parameters[name]) / sum(int(count) for count in parameters.values()) for name in alike]
    slope = held["layer3.1.gate"] / shares[-1]
    assert slope > 1  # of ten, what the estimator's window lets pass
    # differences of fp32 gradients that are of order 10
    assert [held[name] for name in alike] == pytest.approx([slope * share for share in shares], abs=1e-4)


@pytest.mark.parametrize("settle_at", [0.75, None])
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 4, 5))])
@pytest.mark.parametrize("gating", ["layer", "channel"])
def test_the_compact_network_meets_the_target(
    gating: str, seed: int, settle_at: float | None, digits: Dataset, tmp_path: Path
) -> None:
    recipe = change(TINY, gating=gating, seed=seed, target=0.4 + 0.1 * (seed % 3), settle_at=settle_at)
    trainer = trainer_of(recipe, digits, tmp_path)
    trainer.fit()
    if settle_at is None:  # gates that lived to the end are decided then
        trainer.model = fg.compact(fg.freeze(trainer.model, trainer.search.decide(trainer.calibration)))
    got, wanted = fg.macs(trainer.model, digits.image_size), recipe.search.target * trainer.search.macs
    if gating == "channel":
        assert got == pytest.approx(wanted, rel=0.01)
    else:
        # half of the most expensive block: a whole block more or less would be further off, or not what samples asked
        assert abs(got - wanted) <= max(int(cost) for cost in trainer.search.costs.values()) / 2


def test_an_unreachable_target_names_the_range(digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"target: expected 0\.\d{4} to 1 .* got 0.01"):
        trainer_of(change(TINY, target=0.01), digits, tmp_path)


def test_a_non_finite_loss_stops_and_keeps_the_checkpoint(digits: Dataset, tmp_path: Path) -> None:
    trainer = trainer_of(TINY, digits, tmp_path)
    train_epoch = trainer._train_epoch

    def poison_second(*arguments: Any) -> None:
        if trainer.epoch == 1:
            with torch.no_grad():
                trainer.model.fc.weight.fill_(torch.inf)
        train_epoch(*arguments)

    trainer._train_epoch = poison_second  # type: ignore[method-assign]
    with pytest.raises(NonFiniteLoss, match=r"not finite in epoch 2 by step 1; the last good checkpoint is "):
        trainer.fit()
    model, _ = load_network(tmp_path / "checkpoint.pt")
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert [line["epoch"] for line in metrics(tmp_path)] == [1]


def test_evaluate_counts_every_image_once(digits: Dataset) -> None:
    # scores that do not hang on the size of a batch: ten of the pixels
    pick = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10, bias=False))
    torch.nn.init.eye_(pick[1].weight)
    whole = evaluate(pick, digits.evaluation("test", 360))
    parts = evaluate(pick, digits.evaluation("test", 7))
    assert whole["accuracy"] == parts["accuracy"]
    assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-5)  # fp32 sums of 360 terms


@pytest.mark.parametrize("gating", ["none", "layer", "channel"])
def test_networks_of_recipes(gating: str) -> None:
    recipe = make_recipe(network="resnet20", gating=gating, gate_input="flatten", position="after", gate_depth=1)
    model = build_network(recipe, (1, 8, 8), 7)
    assert model.fc.out_features == 7 and model.conv1.in_channels == 1
    gates = [gate for _, gate in fg.named_gates(model)]
    assert len(gates) == (0 if gating == "none" else 9)
    if gating == "channel":
        assert [gate.spatial_size for gate in gates] == [(8, 8)] * 3 + [(4, 4)] * 3 + [(2, 2)] * 3
        assert all(gate.depth == 1 for gate in gates)


def test_bf16_on_a_cpu_and_fp16_refused(digits: Dataset, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == torch.float32
    with pytest.raises(ValueError, match="fp16 training needs a GPU"):
        resolve_precision("fp16", cpu)
    trainer = trainer_of(change(TINY, precision="bf16", settle_at=None), digits, tmp_path)
    seen = set()
    trainer.model.layer1[0].conv1.register_forward_hook(lambda *arguments: seen.add(arguments[2].dtype))
    trainer.fit()
    assert seen == {torch.bfloat16}
    lines = metrics(tmp_path)
    assert lines[-1]["train"]["task"] < lines[0]["train"]["task"]  # it learns


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_training_on_a_gpu(precision: str, tmp_path: Path) -> None:
    data = load_dataset("digits", device="cuda")
    trainer = trainer_of(change(TINY, precision=precision, settle_at=None), data, tmp_path)
    trainer.fit()
    assert trainer.model.conv1.weight.is_cuda
    assert metrics(tmp_path)[-1]["eval"]["accuracy"] > 0.5


class Net(torch.nn.Module):
    """Called with keywords, with a loss of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.body = fg.models.resnet(8, 4, gating="channel", widths=(4, 8, 16))

    def forward(self, *, image: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.body(image)}


class Halving(Callback):
    """A scheduler of torch's, stepped by a callback; its state is kept in the checkpoint."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        self.rates: list[list[float]] = []

    def on_train_begin(self, trainer: Trainer) -> None:
        self.rates.append([float(group["lr"]) for group in trainer.optimizer.param_groups])

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state)


def own_trainer(folder: Path, kind: str) -> tuple[Trainer, Halving]:
    torch.manual_seed(0)
    model = Net()
    head = [p for name, p in model.named_parameters() if name.startswith("body.fc")]
    rest = [p for name, p in model.named_parameters() if not name.startswith("body.fc")]
    groups = [{"params": rest}, {"params": head, "lr": 0.004}]
    optimizer = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind](groups, lr=0.002)
    images, labels = make_data().tensors
    data = [{"image": x, "label": y} for x, y in zip(images, labels, strict=True)]
    loader = torch.utils.data.DataLoader(data, 16, shuffle=True)
    config = fg.SearchConfig(open_until=0.25, anneal_until=0.5, settle_at=0.75, commit_after=None)
    example = {"image": images[:1], "label": labels[:1]}
    search = fg.GateSearch(model, example, optimizer, epochs=4, config=config)
    halving = Halving(optimizer)
    trainer = Trainer(
        model,
        optimizer,
        loader,
        lambda outputs, batch: torch.nn.functional.cross_entropy(outputs["scores"], batch["label"]),
        epochs=4,
        search=search,
        evaluate=lambda network: {"parameters": sum(p.numel() for p in network.parameters())},
        callbacks=[halving],
        folder=folder,
    )
    return trainer, halving


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_network_a_loader_and_an_optimizer_of_ones_own(kind: str, tmp_path: Path) -> None:
    """Mappings of a DataLoader that shuffles by torch's random numbers; two groups with learning rates of their own."""
    whole, halving = own_trainer(tmp_path / "whole", kind)
    whole.fit()
    assert halving.rates == [pytest.approx([0.002 * 0.5**i, 0.004 * 0.5**i]) for i in range(4)]
    lines = metrics(tmp_path / "whole")
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.002 * 0.5**i for i in range(4)])
    assert [line["phase"] for line in lines] == ["open", "search", "search", "settled"]
    assert lines[0]["eval"]["parameters"] > lines[-1]["eval"]["parameters"]
    assert fg.macs(whole.model.body, (3, 8, 8)) == pytest.approx(0.5 * whole.search.macs, rel=0.01)

    first, _ = own_trainer(tmp_path / "parts", kind)  # stopped in the middle of an epoch of each kind, and resumed
    for epoch in (1, 3):
        trainer, _ = own_trainer(tmp_path / "parts", kind)
        trainer.restore()
        train_epoch = trainer._train_epoch

        def stop(interrupted: list[bool], trainer: Trainer = trainer, at: int = epoch, go: Any = train_epoch) -> None:
            class Asked(list[bool]):
                def __bool__(self) -> bool:
                    return (trainer.epoch, trainer.step) == (at, 2)

            go(Asked())

        trainer._train_epoch = stop  # type: ignore[method-assign]
        with pytest.raises(Interrupted):
            trainer.fit()
    first.restore()
    first.fit()
    ours, theirs = first.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics(tmp_path / "parts") == lines


def test_checkpoints_that_are_not_of_this_run(tmp_path: Path) -> None:
    trainer, _ = own_trainer(tmp_path, "sgd")
    state = trainer.state_dict()
    with pytest.raises(ValueError, match="expected one of this version, got one without epoch_random; start a new"):
        trainer.load_state_dict({name: value for name, value in state.items() if name != "epoch_random"})
    with pytest.raises(ValueError, match="expected one of a run with a search, got one without"):
        trainer.load_state_dict({**state, "search": None})


def test_gates_may_learn_at_a_rate_of_their_own(digits: Dataset, tmp_path: Path) -> None:
    """A multiple of the network's at every step; at none they stay as they begin."""
    trainer = trainer_of(change(TINY, epochs=1, open_until=0, gate_lr_factor=3.0), digits, tmp_path / "fast")
    trainer.fit()
    network, gates = (float(group["lr"]) for group in trainer.optimizer.param_groups)
    assert network > 0 and gates == pytest.approx(3 * network, rel=1e-6)

    still = trainer_of(change(TINY, epochs=1, open_until=0, gate_lr_factor=0.0), digits, tmp_path / "still")
    heads = {p for _, gate in fg.gates.named_gates(still.model) for p in gate.parameters()}
    before = {p: p.detach().clone() for p in still.model.parameters()}
    still.fit()
    assert {p for p, old in before.items() if torch.equal(p, old)} == heads
