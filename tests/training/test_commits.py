"""Gates whose decisions are final leave the network in training: what that changes, and what it must not."""

import copy
import itertools
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgate as fg
from fastgate.pruning.decisions import GateDecision
from fastgate.pruning.equality import hold_open
from fastgate.training.checkpoint import load_checkpoint
from fastgate.training.data import Dataset, load_dataset
from fastgate.training.networks import evaluate, load_network
from fastgate.training.pipeline import Run, train
from fastgate.training.recipe import change
from fastgate.training.trainer import Interrupted, Trainer
from tests.training.runs import TINY, TINY_OPTIONS, checkpoint_state, differences, run_cli, trainer_of
from tests.votes import cast_votes

# with chosen votes the gates of the first and the last block are committed after four epochs, the other after six
EARLY = change(TINY, epochs=7, open_until=0.15, anneal_until=0.4, settle_at=0.8, commit_after=1)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


@pytest.fixture
def votes(monkeypatch: pytest.MonkeyPatch) -> None:
    cast_votes(monkeypatch.setattr)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fit(recipe: Any, digits: Dataset, folder: Path) -> Trainer:
    folder.mkdir(exist_ok=True)
    trainer = trainer_of(recipe, digits, folder)
    trainer.fit()
    return trainer


@pytest.mark.usefixtures("votes")
def test_epochs_get_cheaper_commit_by_commit(digits: Dataset, tmp_path: Path) -> None:
    trainer = fit(EARLY, digits, tmp_path)
    lines = metrics(tmp_path)
    costs = [line["macs_training"]["per_image"] for line in lines]
    assert costs[0] == trainer.search.macs and costs == sorted(costs, reverse=True)
    assert costs[3] == trainer.search.macs > costs[4]  # the early commit
    assert costs[-1] == fg.macs(trainer.model, digits.image_size) == lines[-1]["macs"]
    images = len(trainer.train_loader) * EARLY.run.batch_size
    assert [line["macs_training"]["total"] for line in lines] == [
        images * total for total in itertools.accumulate(costs)
    ]
    # next to what the unpruned network would have taken
    assert [line["macs_training"]["all_open_total"] for line in lines] == [images * costs[0] * n for n in range(1, 8)]
    spent = [line["seconds"] for line in lines]
    assert spent[-1]["total"] == pytest.approx(sum(each["train"] + each["eval"] for each in spent))
    assert list(fg.named_gates(trainer.model)) == [] and not any("gate" in name for name in trainer.model.state_dict())
    assert {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} == {
        id(p) for p in trainer.model.parameters()
    }
    # every line and the decisions speak of all gates, also of those that are gone
    assert all(list(line["gates"]) == list(trainer.search.gates) for line in lines)
    decisions = fg.Decisions.from_json(tmp_path / "decisions.json")
    assert lines[-1]["gates"] == {name: gate.open.double().tolist() for name, gate in decisions.items()}
    assert lines[-1]["open_ratio"] == decisions.open_ratio and lines[-1]["polarization"] == 0.0
    assert lines[-1]["frozen"] and not lines[3]["frozen"]


@pytest.mark.usefixtures("votes")
@pytest.mark.parametrize("gating", ["layer", "channel"])
def test_a_commit_changes_nothing_in_what_the_network_says(gating: str, digits: Dataset, tmp_path: Path) -> None:
    trainer = trainer_of(change(EARLY, gating=gating), digits, tmp_path)
    cut, seen = trainer.search._cut, []

    def measure() -> dict[str, float]:
        model = copy.deepcopy(trainer.model)
        hold_open(model)  # a rounding may change what a live gate decides
        return evaluate(model, digits.evaluation("test", 500, channels_last=True))

    def watched_cut() -> None:
        before = measure()
        cut()
        seen.append((before, measure()))

    trainer.search._cut = watched_cut  # type: ignore[method-assign]
    trainer.fit()
    assert len(seen) == 2
    for before, after in seen:
        assert after["loss"] == pytest.approx(before["loss"], rel=0.0 if gating == "layer" else 1e-5)
        # rounding may turn an image whose two best classes are level
        assert abs(after["accuracy"] - before["accuracy"]) <= (0.0 if gating == "layer" else 1.5 / len(digits.test))
    assert trainer.search.difference <= (0.0 if gating == "layer" else 1e-4)


@pytest.mark.usefixtures("votes")
def test_layer_gates_train_to_the_same_bits_with_and_without_the_closed_blocks(digits: Dataset, tmp_path: Path) -> None:
    """Times zero or gone is the same to the rest of the network, in every step."""
    cut = fit(EARLY, digits, tmp_path / "cut")
    kept = fit(change(EARLY, compact_training=False), digits, tmp_path / "kept")
    ours, theirs = cut.model.state_dict(), fg.compact(kept.model).state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    for a, b in zip(metrics(tmp_path / "cut"), metrics(tmp_path / "kept"), strict=True):
        assert [a[key] for key in ("eval", "gates", "macs")] == [b[key] for key in ("eval", "gates", "macs")]
    assert {line["macs_training"]["per_image"] for line in metrics(tmp_path / "kept")} == {kept.search.macs}


def find(trainer: Trainer, epoch: int, votes: dict[str, list[float]]) -> dict[str, list[bool]]:
    """What becomes final at an epoch's start, after three epochs with these votes."""
    search = trainer.search
    return {
        name: gate.open.tolist() for name, gate in search._deciding.unanimous(epoch, [votes] * 3, search.final).items()
    }


def test_gates_are_open_for_the_target_before_it_stands_still(digits: Dataset, tmp_path: Path) -> None:
    """At the start of the search every gate is open for every sample: that decides nothing."""
    trainer = trainer_of(EARLY, digits, tmp_path)
    names = list(trainer.search.gates)
    votes = dict(zip(names, ([1.0], [1.0], [0.0]), strict=True))
    assert find(trainer, 2, votes) == {names[2]: [False]}  # the target falls from epoch 1 to 2.8
    assert list(find(trainer, 4, votes)) == [names[0], names[2]]  # all three are too much: 0.58 for 0.5


def test_commits_leave_the_target_within_reach(digits: Dataset, tmp_path: Path) -> None:
    trainer = trainer_of(EARLY, digits, tmp_path)
    for flag in (0.0, 1.0):
        found = find(trainer, 5, {name: [flag] for name in trainer.search.gates})
        assert 0 < len(found) < len(trainer.search.gates) and set(map(tuple, found.values())) == {(bool(flag),)}


def interrupt_in_epoch(trainer: Trainer, epoch: int) -> None:
    train_epoch = trainer._train_epoch

    def train_and_stop(interrupted: list[bool]) -> None:
        if trainer.epoch == epoch:
            interrupted.append(True)
        train_epoch(interrupted)

    trainer._train_epoch = train_and_stop  # type: ignore[method-assign]


@pytest.mark.usefixtures("votes")
@pytest.mark.parametrize(
    ("gating", "epoch"),
    [
        ("layer", 4),
        ("channel", 6),
        pytest.param("channel", 4, marks=pytest.mark.slow),
        pytest.param("layer", 6, marks=pytest.mark.slow),
    ],
)
def test_interrupted_after_a_commit(gating: str, epoch: int, digits: Dataset, tmp_path: Path) -> None:
    """Epoch 4 (from 0) begins with the early commit of two gates, epoch 6 with that of the last one."""
    recipe = change(EARLY, gating=gating)
    whole = fit(recipe, digits, tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    first = trainer_of(recipe, digits, tmp_path / "parts")
    interrupt_in_epoch(first, epoch)
    with pytest.raises(Interrupted):
        first.fit()
    saved = load_checkpoint(tmp_path / "parts" / "checkpoint.pt")
    assert (saved["epoch"], saved["step"]) == (epoch, 1)
    assert len(saved["search"]["final"]) == (3 if epoch == 6 else 2)
    second = trainer_of(recipe, digits, tmp_path / "parts", resume=True)
    second.fit()
    assert differences(checkpoint_state(tmp_path / "whole"), checkpoint_state(tmp_path / "parts")) == []
    ours, theirs = metrics(tmp_path / "parts"), metrics(tmp_path / "whole")
    for a, b in zip(ours, theirs, strict=True):
        assert [a[key] for key in a if key not in ("seconds", "joules", "energy")] == [
            b[key] for key in b if key not in ("seconds", "joules", "energy")
        ]
    assert second.search.difference == whole.search.difference


CHANNELS = [*TINY_OPTIONS, "--gating", "channel", "--epochs", "5"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    result = run_cli("train", *CHANNELS, "--output", folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("when", ["commit", "epoch"])
def test_killed_after_a_commit(when: str, undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL between the settle commit and its first step, or right after the epoch behind it was saved."""
    if when == "commit":
        owner, method, condition = "pruning.search import GateSearch", "GateSearch._cut", "True"
    else:
        owner, method = "training.callbacks import Checkpoints", "Checkpoints._save"
        condition = "arguments[0].search.final and not arguments[0].step"
    code = f"""
import os, signal
from fastgate.{owner}
method = {method}
def dying(self, *arguments):
    method(self, *arguments)
    if {condition}:
        os.kill(os.getpid(), signal.SIGKILL)
{method} = dying
"""
    assert run_cli("train", *CHANNELS, "--output", tmp_path / "run", code=code).returncode == -signal.SIGKILL
    assert len(load_checkpoint(tmp_path / "run" / "checkpoint.pt")["search"]["final"]) == (3 if when == "epoch" else 0)
    resumed = run_cli("train", "--output", tmp_path / "run", "--resume", "--device", "cpu")
    assert resumed.returncode == 0, resumed.stderr
    assert differences(checkpoint_state(undisturbed), checkpoint_state(tmp_path / "run")) == []


@pytest.mark.usefixtures("votes")
@pytest.mark.parametrize("epochs", [5, 7])
@pytest.mark.parametrize("gating", ["layer", "channel"])
def test_a_checkpoint_gives_the_cut_network(gating: str, epochs: int, digits: Dataset, tmp_path: Path) -> None:
    """After five epochs two of three gates are gone, after seven all."""
    trainer = trainer_of(change(EARLY, gating=gating), digits, tmp_path)
    if epochs == 5:
        interrupt_in_epoch(trainer, epochs - 1)
        with pytest.raises(Interrupted):
            trainer.fit()
    else:
        trainer.fit()
    model, _ = load_network(tmp_path / "checkpoint.pt")
    ours, theirs = trainer.model.state_dict(), model.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert dict(fg.named_gates(model)).keys() == trainer.search.live.keys()
    # decisions of all gates: those that are gone have theirs
    closed = {
        name: (gate.open if gate.frozen else torch.zeros(gate.gates) == 1)
        for name, gate in trainer.search.gates.items()
    }
    decisions = fg.Decisions({name: GateDecision(o.double(), o) for name, o in closed.items()})
    frozen, _ = load_network(tmp_path / "checkpoint.pt", decisions)
    assert all(gate.frozen for _, gate in fg.named_gates(frozen))
    with pytest.raises(ValueError, match="these are decisions of another network"):
        load_network(tmp_path / "checkpoint.pt", fg.Decisions({}))


@pytest.mark.usefixtures("votes")
def test_early_commits_without_a_settle_epoch(tmp_path: Path) -> None:
    """Gates that are left at the end are decided then; the table has what was trained and what is shipped."""
    summary = train(Run(change(EARLY, settle_at=None), tmp_path / "run"))
    rows = summary["rows"]
    assert list(rows) == ["unpruned", "gated", "compact"]
    assert rows["unpruned"]["macs"] > rows["gated"]["macs"] >= rows["compact"]["macs"]
    assert summary["max_abs_difference"] == 0.0
    assert list(fg.Decisions.from_json(tmp_path / "run" / "decisions.json")) == [f"layer{i}.0.gate" for i in (1, 2, 3)]


def test_no_commit_before_the_settle_epoch_where_none_is_asked_for(digits: Dataset, tmp_path: Path) -> None:
    trainer = fit(change(EARLY, commit_after=None), digits, tmp_path)
    assert [line["macs_training"]["per_image"] for line in metrics(tmp_path)][:6] == [trainer.search.macs] * 6
