"""What may help a network that prunes itself, in a loop of one's own: `python -m bench.tries --data-root CIFAR`.

ResNet-20, 10,000 images of CIFAR-10 averaged down to 16x16, to half of the MACs with layer gates; accuracy on 10,000
validation images. Runs are added to the file; those it holds are not repeated.

Other decisions, for a network that starts from weights (trained on the same classes, in twice the epochs): at random
before the first epoch; or after it, closing one block after the other, always the one whose closing raises the loss
least for the MACs that it saves.

Distillation (Hinton et al., https://arxiv.org/abs/1503.02531; temperature 4, nine tenths of the weight), in which the
teacher sees one batch in `every`. Teachers: the initial weights, which also teach a plain network of the same MACs from
scratch; the network with all gates open, in the same step; a copy of it from the epoch in which the gates are decided.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastgate as fg
from fastgate.env import describe_environment
from fastgate.files import write_atomically
from fastgate.gates import named_gates
from fastgate.pruning.decisions import Decisions, GateDecision
from fastgate.pruning.equality import hold_open
from fastgate.training.controls import draw_decisions
from fastgate.training.data import Dataset, load_dataset
from fastgate.training.networks import evaluate

OUTPUT = Path(__file__).parent / "results" / "search" / "tries.json"
TEMPERATURE, WEIGHT = 4.0, 0.9
BATCH, RATE = 128, 0.1
TEACHER_EPOCHS, EPOCHS = 20, 10
TARGET, BATCHES = 0.5, 10
WHOLE_BLOCKS = 0.54  # what the search leaves for this target, as blocks are closed as a whole
HALF = (12, 32, 56)  # widths of the plain ResNet-14 with half the MACs, as in bench.worth

# what is trained, its teacher (or who decides), and how often the teacher is asked
WAYS: dict[str, tuple[str, str, int]] = {
    "weights": ("weights", "none", 0),
    "weights, decided at random": ("weights", "random", 0),
    "weights, decided by the loss": ("weights", "loss", 0),
    "weights, taught by them, every 4": ("weights", "weights", 4),
    "weights, taught by them, every 1": ("weights", "weights", 1),
    "smaller": ("smaller", "none", 0),
    "smaller, taught by the weights, every 4": ("smaller", "weights", 4),
    "smaller, taught by the weights, every 1": ("smaller", "weights", 1),
    "scratch": ("scratch", "none", 0),
    "scratch, taught by the open network, every 4": ("scratch", "open", 4),
    "scratch, taught by the network when decided, every 4": ("scratch", "decided", 4),
}


def distillation(outputs: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the labels, and divergence from the teacher at a higher temperature."""
    soft = F.kl_div(
        F.log_softmax(outputs / TEMPERATURE, 1), F.log_softmax(taught / TEMPERATURE, 1), log_target=True,
        reduction="batchmean",
    )  # fmt: skip
    return (1 - WEIGHT) * F.cross_entropy(outputs, labels) + WEIGHT * TEMPERATURE**2 * soft


@contextmanager
def all_open(model: nn.Module) -> Iterator[None]:
    """Every live gate held open, and no batch norm updates its statistics."""
    live = [gate for _, gate in named_gates(model) if not gate.frozen]
    momenta = {norm: norm.momentum for norm in model.modules() if isinstance(norm, _BatchNorm)}
    hold_open(model)
    for norm in momenta:
        norm.momentum = 0.0
    try:
        with torch.no_grad():
            yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for gate in live:
            gate.unfreeze()


def decide_at_random(search: fg.GateSearch, seed: int) -> Decisions:
    """Decisions that meet the target, of random gates."""
    ones = {name: torch.ones(gate.gates, dtype=torch.bool) for name, gate in search.gates.items()}
    opened = Decisions({name: GateDecision(one.double(), one) for name, one in ones.items()})
    return draw_decisions(opened, search.costs, round(WHOLE_BLOCKS * search.macs), search.macs, seed)


@torch.no_grad()
def decide_by_loss(model: nn.Module, search: fg.GateSearch, data: Dataset) -> Decisions:
    """Close one block after the other, the one whose closing raises the loss least for its MACs, down to the target."""
    batches = list(islice(data.training(BATCH, seed=0, channels_last=True).start_at(0), BATCHES))
    open_gates = dict(search.gates)
    decided: dict[str, Tensor] = {name: torch.ones(1, dtype=torch.bool) for name in open_gates}

    def loss() -> float:
        with all_open(model):  # keeps the batch norms' statistics
            return sum(float(F.cross_entropy(model(x), y)) for x, y in batches)

    before, left = loss(), float(search.macs)
    while left > TARGET * search.macs:
        tried = {}
        for name, gate in open_gates.items():
            gate.freeze(torch.zeros(1, dtype=torch.bool))
            tried[name] = loss()
            gate.freeze(torch.ones(1, dtype=torch.bool))
        name = min(tried, key=lambda name: (tried[name] - before) / float(search.costs[name]))
        if TARGET * search.macs - (left - float(search.costs[name])) > left - TARGET * search.macs:
            break  # farther from the target than without
        before, left = tried[name], left - float(search.costs[name])
        decided[name] = torch.zeros(1, dtype=torch.bool)
        open_gates.pop(name).freeze(decided[name])
    return Decisions({name: GateDecision(opened.double(), opened) for name, opened in decided.items()})


def train(way: str, data: Dataset, seed: int, weights: nn.Module | None) -> tuple[nn.Module, dict[str, Any]]:
    """Train one way; returns the compact network, and its accuracy, MACs and MACs of training."""
    what, teaches, every = WAYS.get(way, ("smaller", "none", 0))
    torch.manual_seed(seed)
    size = data.image_size
    model: nn.Module
    if way == "teacher":
        model = fg.models.resnet20(data.num_classes)
    elif what == "smaller":
        model = fg.models.ResNet(14, data.num_classes, widths=HALF)
    else:
        model = copy.deepcopy(weights) if what == "weights" and weights is not None else fg.models.resnet20()
        fg.attach(model, "layer")
    model.to(memory_format=torch.channels_last)
    epochs = EPOCHS if what in ("weights", "smaller") and way != "teacher" else TEACHER_EPOCHS
    optimizer = torch.optim.SGD(fg.parameter_groups(model), lr=RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loader = data.training(BATCH, seed=seed, channels_last=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    early = fg.SearchConfig(open_until=0, anneal_until=0.1, settle_at=0.15)
    if teaches == "loss":
        early = fg.SearchConfig(open_until=0.1, anneal_until=0.1, settle_at=0.1)
    search = None
    if any(named_gates(model)):
        search = fg.GateSearch(
            model, size, optimizer, epochs=epochs, config=early if what == "weights" else fg.SearchConfig()
        )
    teacher = None if weights is None or teaches != "weights" else copy.deepcopy(weights).eval()
    whole, small, spent = fg.macs(fg.models.resnet20(), size), fg.macs(model, size), 0
    for epoch in range(epochs):
        if search is not None:
            before = copy.deepcopy(model) if teaches == "decided" and search.phase != "settled" else None
            if epoch == (1 if teaches == "loss" else 0) and teaches in ("random", "loss"):
                search.finalize(
                    decide_by_loss(model, search, data) if teaches == "loss" else decide_at_random(search, seed)
                )
            search.begin_epoch(epoch, data.training(BATCH, seed=seed, channels_last=True).start_at(epoch))
            small = search.macs_training
            if before is not None and search.phase == "settled":
                hold_open(before)
                teacher = before.eval()
        for step, (x, y) in enumerate(loader.start_at(epoch)):
            asked = every > 0 and step % every == 0
            taught = None
            if asked and teacher is not None:
                with torch.no_grad():
                    taught = teacher(x)
            elif asked and teaches == "open" and search is not None and search.phase == "search":
                with all_open(model):
                    taught = model(x)
            outputs = model(x)
            loss = F.cross_entropy(outputs, y) if taught is None else distillation(outputs, taught, y)
            if search is not None:
                loss = loss + search.loss(step / len(loader))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            spent += BATCH * (3 * small + (0 if taught is None else whole))
    if search is not None:
        model = search.compact()
    accuracy = evaluate(model, data.evaluation("validation", 500, channels_last=True))["accuracy"]
    return model, {"accuracy": accuracy, "macs": fg.macs(model, size), "macs_training": spent}


def main() -> None:
    """Train the ways that the file lacks, and print means."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--data-root")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load_dataset("cifar10", options.data_root, image_size=16, validation=10_000, train_images=10_000)
    for seed in options.seeds:
        weights, whole = train("teacher", data, seed, None)
        for way in ("teacher", *WAYS):
            runs = json.loads(OUTPUT.read_text())["runs"] if OUTPUT.exists() else []
            if any(run["way"] == way and run["seed"] == seed for run in runs):
                continue
            result = whole if way == "teacher" else train(way, data, seed, weights)[1]
            runs.append({"way": way, "seed": seed, **result})
            print(json.dumps(runs[-1]), flush=True)
            write_atomically(OUTPUT, json.dumps({"environment": describe_environment(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
