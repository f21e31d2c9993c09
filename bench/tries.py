"""What may help a network that prunes itself, in a loop of one's own: `python -m bench.tries --data-root CIFAR`.

ResNet-20, 10,000 images of CIFAR-10 averaged down to 16x16, to half of the MACs; accuracy on 10,000 validation images.
From scratch for 20 epochs, or from weights for 10: those of a network trained on the same images for 20 epochs. A plain
network of half the MACs is trained from scratch for 10. What is tried:

Gradients: whether the gates' gradient reaches the network, or their heads alone (`SearchConfig.detach_gates`).

Other decisions: random ones before the first epoch; or, after it, closing one block after the other, always the one
whose closing raises the loss least for the MACs that it saves.

Distillation (Hinton et al., https://arxiv.org/abs/1503.02531; temperature 4, nine tenths of the weight), in which the
teacher sees one batch in `every`. Teachers: the initial weights; the network with all gates open, in the same step; the
network at the time when its gates are decided.

Runs are added to the file, and those it holds are not repeated. MACs of training include those of teachers and of
deciding.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from fastgate.pruning.statistics import refresh_statistics
from fastgate.training.controls import draw_decisions
from fastgate.training.data import Dataset, load_dataset
from fastgate.training.networks import evaluate

OUTPUT = Path(__file__).parent / "results" / "search" / "tries.json"
TEMPERATURE, WEIGHT = 4.0, 0.9
BATCH, RATE = 128, 0.1
EPOCHS = {"whole": 20, "scratch": 20, "weights": 10, "smaller": 10}
# what the search leaves for a target of a half, as blocks are closed as a whole
WHOLE_BLOCKS = 0.54
BATCHES = 10  # to compare losses, and to estimate batch norms' statistics
HALF = (12, 32, 56)  # widths of the plain ResNet-14 with half the MACs, as in bench.worth


@dataclass(frozen=True)
class Way:
    """One network to train.

    Attributes:
        start: "whole" (the plain ResNet-20), "smaller" (the plain network of half its MACs), or ResNet-20 to be pruned,
            from "scratch" or from "weights".
        gating: of a network to be pruned.
        detach: whether gradients of the gates stop at their heads.
        decides: "search", "random" or "loss".
        teacher: "weights", "open", "decided" or none.
        every: the teacher sees one batch in so many.
    """

    start: str
    gating: str = "layer"
    detach: bool = True
    decides: str = "search"
    teacher: str = "none"
    every: int = 0


WAYS: dict[str, Way] = {
    "whole": Way("whole"),
    **{
        f"{start}, {gating}{'' if detach else ', gradient into the network'}": Way(start, gating, detach)
        for start in ("weights", "scratch")
        for gating in ("layer", "channel", "both")
        for detach in (True, False)
    },
    "weights, decided at random": Way("weights", decides="random"),
    "weights, decided by the loss": Way("weights", decides="loss"),
    "weights, taught by them, every 4": Way("weights", teacher="weights", every=4),
    "weights, taught by them, every 1": Way("weights", teacher="weights", every=1),
    "smaller": Way("smaller"),
    "smaller, taught by the weights, every 4": Way("smaller", teacher="weights", every=4),
    "smaller, taught by the weights, every 1": Way("smaller", teacher="weights", every=1),
    "scratch, taught by the open network, every 4": Way("scratch", teacher="open", every=4),
    "scratch, taught by the network when decided, every 4": Way("scratch", teacher="decided", every=4),
}


def distillation(outputs: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the labels, and divergence from the teacher at a higher temperature."""
    student, teacher = (F.log_softmax(x / TEMPERATURE, 1) for x in (outputs, taught))
    soft = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
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
    """Decisions of random gates that leave as much as the search."""
    ones = {name: torch.ones(gate.gates, dtype=torch.bool) for name, gate in search.gates.items()}
    opened = Decisions({name: GateDecision(one.double(), one) for name, one in ones.items()})
    return draw_decisions(opened, search.costs, round(WHOLE_BLOCKS * search.macs), search.macs, seed)


@torch.no_grad()
def decide_by_loss(
    model: nn.Module, search: fg.GateSearch, batches: list[tuple[Tensor, Tensor]]
) -> tuple[Decisions, int]:
    """Close one block after the other, the one whose closing raises the loss least for its MACs.

    Returns the decisions, and the MACs of finding them.
    """
    left, wanted, spent = search.macs, WHOLE_BLOCKS * search.macs, 0
    free = dict(search.gates)
    decided = {name: torch.ones(1, dtype=torch.bool) for name in free}

    def loss() -> float:
        nonlocal spent
        spent += search.macs * sum(len(y) for _, y in batches)
        with all_open(model):  # keeps the batch norms' statistics
            return sum(float(F.cross_entropy(model(x), y)) for x, y in batches)

    before = loss()
    while left > wanted:
        tried = {}
        for name, gate in free.items():
            gate.freeze(torch.zeros(1, dtype=torch.bool))
            tried[name] = loss()
            gate.freeze(torch.ones(1, dtype=torch.bool))
        name = min(tried, key=lambda name: (tried[name] - before) / int(search.costs[name]))
        after = left - int(search.costs[name])
        if wanted - after > left - wanted:  # farther away than without it
            break
        before, left, decided[name] = tried[name], after, torch.zeros(1, dtype=torch.bool)
        free.pop(name).freeze(decided[name])
    return Decisions({name: GateDecision(opened.double(), opened) for name, opened in decided.items()}), spent


def make_network(way: Way, data: Dataset, weights: nn.Module | None) -> nn.Module:
    """The network to train, with gates if it is to be pruned."""
    if way.start == "smaller":
        return fg.models.ResNet(14, data.num_classes, widths=HALF)
    model: nn.Module = fg.models.resnet20(data.num_classes)
    if way.start == "weights" and weights is not None:
        model = copy.deepcopy(weights)
    return model if way.start == "whole" else fg.attach(model, way.gating)


def config_of(way: Way) -> fg.SearchConfig:
    """From weights, decided early; otherwise as by default."""
    if way.decides == "loss":
        return fg.SearchConfig(open_until=0.1, anneal_until=0.1, settle_at=0.1)
    if way.start == "weights":
        return fg.SearchConfig(open_until=0, anneal_until=0.1, settle_at=0.2, detach_gates=way.detach)
    return fg.SearchConfig(detach_gates=way.detach)


def train(way: Way, data: Dataset, seed: int, weights: nn.Module | None) -> tuple[nn.Module, dict[str, Any]]:
    """Train one network; returns it, plain, and its accuracy, MACs and MACs of training."""
    torch.manual_seed(seed)
    size, epochs = data.image_size, EPOCHS[way.start]
    model = make_network(way, data, weights).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(fg.parameter_groups(model), lr=RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loader, calibration = (data.training(BATCH, seed=seed, channels_last=True) for _ in range(2))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    gated = any(named_gates(model))
    search = fg.GateSearch(model, size, optimizer, epochs=epochs, config=config_of(way)) if gated else None
    teacher = copy.deepcopy(weights).eval() if way.teacher == "weights" and weights is not None else None
    whole = fg.macs(fg.models.resnet20(data.num_classes), size)
    macs, spent = fg.macs(model, size), 0
    for epoch in range(epochs):
        if search is not None and search.phase != "settled":
            before = copy.deepcopy(model)
            if way.decides == "random":
                search.finalize(decide_at_random(search, seed))
            elif way.decides == "loss" and epoch == 1:
                decisions, used = decide_by_loss(model, search, list(islice(calibration.start_at(epoch), BATCHES)))
                search.finalize(decisions)
                spent += used
            search.begin_epoch(epoch, calibration.start_at(epoch))
            macs = search.macs_training
            if search.phase == "settled" and way.decides == "search":
                spent += len(calibration) * BATCH * whole
            if search.phase == "settled" and way.teacher == "decided":
                refresh_statistics(before.train(), islice(calibration.start_at(epoch), BATCHES))
                teacher = before.eval()
        for step, (x, y) in enumerate(loader.start_at(epoch)):
            taught = None
            if way.every and step % way.every == 0:
                if teacher is not None:
                    with torch.no_grad():
                        taught = teacher(x)
                elif way.teacher == "open" and search is not None and search.phase == "search":
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
            spent += BATCH * (3 * macs + (0 if taught is None else whole))
    small = model if search is None else search.compact()
    accuracy = evaluate(small, data.evaluation("validation", 500, channels_last=True))["accuracy"]
    return small, {"accuracy": accuracy, "macs": fg.macs(small, size), "macs_training": spent}


def print_means(runs: list[dict[str, Any]]) -> None:
    """Print accuracy of every way as mean and standard deviation over its seeds, MACs and MACs of training."""
    for way in WAYS:
        rows = [run for run in runs if run["way"] == way]
        if rows:
            accuracies = [100 * row["accuracy"] for row in rows]
            spread = f" ± {statistics.stdev(accuracies):.2f}" if len(rows) > 1 else ""
            macs, training = (statistics.fmean(row[key] for row in rows) for key in ("macs", "macs_training"))
            print(f"{way:60} {statistics.fmean(accuracies):.2f}{spread} %  {macs / 1e6:.2f} M  {training / 1e12:.2f} T")


def main() -> None:
    """Train the networks that the file lacks, and print means."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--data-root")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3], help="none: print only")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(OUTPUT.read_text())["runs"] if OUTPUT.exists() else []
    done = {(run["way"], run["seed"]) for run in runs}
    for seed in options.seeds:
        missing = [way for way in options.ways if (way, seed) not in done]
        if not missing:
            continue
        data = load_dataset("cifar10", options.data_root, image_size=16, validation=10_000, train_images=10_000)
        weights, whole = train(WAYS["whole"], data, seed, None)
        for way in missing:
            result = whole if way == "whole" else train(WAYS[way], data, seed, weights)[1]
            runs.append({"way": way, "seed": seed, **result})
            write_atomically(OUTPUT, json.dumps({"environment": describe_environment(), "runs": runs}, indent=1) + "\n")
    print_means(runs)


if __name__ == "__main__":
    main()
