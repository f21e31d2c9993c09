"""A run measures which kernels it uses at the start of each phase, and a resumed run keeps to it."""

import json
from collections.abc import Callable, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgate import processes
from fastgate.ops import choices
from fastgate.ops.gate_head import HeadCall
from fastgate.ops.gated_residual import ResidualCall
from fastgate.training.callbacks import KernelChoices
from fastgate.training.data import load_dataset
from fastgate.training.recipe import change
from fastgate.training.trainer import Trainer
from tests.training.runs import TINY, trainer_of

RECIPE = change(TINY, epochs=2, open_until=0.0, anneal_until=0.0, settle_at=0.5, batch_size=256)

# kernels are not run: which is taken is told by the clock alone
KINDS = (HeadCall, ResidualCall)


class Clock:
    """Stands in for a GPU's clock: PyTorch, always timed first, is faster, or slower."""

    def __init__(self, factor: float) -> None:
        self.times: list[float] = []
        self.factor = factor

    def __call__(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], dict[str, float]]:
        us = 10.0 if len(self.times) % 2 == 0 else 10.0 * self.factor
        self.times.append(us)
        return lambda: {"eager": us, "captured": us}


def run_torch(kind: Any, run: Callable[..., Any], candidate: str, values: dict[str, Any]) -> Any:
    return run(kind, "torch", values)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[float, str], Clock]:
    def measured(factor: float, cache: str) -> Clock:
        """As a process on a GPU with a cache folder of its own."""
        clock = Clock(factor)
        monkeypatch.setattr(choices, "make_timer", lambda device: clock)
        monkeypatch.setattr(choices, "_memory", choices._Memory())
        monkeypatch.setenv("FASTGATE_CACHE", str(tmp_path / cache))
        monkeypatch.setenv("FASTGATE_TUNE", "on")
        return clock

    for kind in KINDS:
        monkeypatch.setattr(kind, "run", partialmethod(run_torch, kind.run))

    return measured


def chooser(trainer: Trainer) -> KernelChoices:
    (found,) = (callback for callback in trainer.callbacks if isinstance(callback, KernelChoices))
    return found


def taken(folder: Path) -> list[str]:
    return [record["chosen"]["eager"] for record in json.loads((folder / "choices.json").read_text())]


def test_a_run_writes_what_it_takes_and_a_resumed_one_keeps_to_it(
    measured: Callable[[float, str], Clock], tmp_path: Path
) -> None:
    digits = load_dataset("digits")
    clock = measured(2.0, "first")
    trainer_of(RECIPE, digits, tmp_path).fit()
    first = taken(tmp_path)
    assert set(first) == {"torch"} and len(clock.times) == 2 * len(first)
    kinds = [record["kind"] for record in json.loads((tmp_path / "choices.json").read_text())]
    # in training with the batches of the recipe, in inference with those of the evaluation
    assert {(kind["samples"], kind["training"]) for kind in kinds if kind["operation"] == "gate_head"} == {
        (RECIPE.run.batch_size, True), (360, False)
    }  # fmt: skip
    # killed before its first checkpoint, and resumed where the kernels are faster and nothing is in the cache
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "checkpoint.pt").unlink()
    clock = measured(0.5, "second")
    trainer_of(RECIPE, digits, tmp_path, resume=True).fit()
    assert taken(tmp_path) == first and clock.times == []


def test_of_several_processes_the_first_decides(
    measured: Callable[[float, str], Clock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = load_dataset("digits")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    measured(2.0, "first")
    trainer = trainer_of(RECIPE, digits, first)
    chooser(trainer).on_train_begin(trainer)
    records = choices.used()
    clock = measured(0.5, "second")  # another process, which would choose otherwise
    trainer = trainer_of(RECIPE, digits, second)
    monkeypatch.setattr(processes, "from_main", lambda make: json.loads(json.dumps(records)))
    chooser(trainer).on_train_begin(trainer)
    with choices.looking_up():
        trainer.model.train()(torch.rand(RECIPE.run.batch_size, *digits.image_size))
        trainer.model(torch.rand(3, *digits.image_size))  # what was not foreseen is PyTorch's, everywhere
    assert clock.times == [] and json.loads(json.dumps(choices.used())) == json.loads(json.dumps(records))
    assert not (second / "choices.json").exists()  # the first one writes
