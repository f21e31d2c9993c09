"""A captured step trains as one that runs: on a CPU on tapes, which stand in for CUDA graphs, on a GPU on graphs."""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgate.training.data import Dataset, load_dataset
from fastgate.training.recipe import Recipe, change
from fastgate.training.step import CudaGraphs
from fastgate.training.trainer import Interrupted, NonFiniteLoss, Trainer
from tests.training.runs import TINY, checkpoint_state, differences, trainer_of
from tests.training.tape import HostReads, Tapes
from tests.votes import cast_votes

# every step differs from the one before in learning rate, target and a weight; with chosen votes one epoch is held
# open, three are alive, two follow a commit, and one is settled
RECIPE = change(
    TINY,
    epochs=7,
    warmup_epochs=2.0,
    target=0.33,
    capacity="0",  # the phases that are counted below are those without it
    open_until=0.15,
    anneal_until=0.4,
    settle_at=0.8,
    commit_after=1,
    polarization="0:0 -> 7:1",
)
STEPS = 11  # of an epoch


class FusedSGD(torch.optim.SGD):
    """What the trainer uses on CUDA; the others read the learning rate on the host."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "fused": True})


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


@pytest.fixture
def like_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "SGD", FusedSGD)
    monkeypatch.setenv("FASTGATE_IMPL", "torch")  # the default path of a CPU reads decisions


@pytest.fixture
def votes(monkeypatch: pytest.MonkeyPatch) -> None:
    cast_votes(monkeypatch.setattr)


def make(recipe: Recipe, data: Dataset, folder: Path, graphs: Any = None, **options: Any) -> Trainer:
    trainer = trainer_of(recipe, data, folder, **options)
    trainer.training_step.graphs = graphs
    return trainer


def fit(recipe: Recipe, data: Dataset, folder: Path, graphs: Any = None, **options: Any) -> Trainer:
    trainer = make(recipe, data, folder, graphs, **options)
    trainer.fit()
    return trainer


def numbers(trainer: Trainer) -> list[dict[str, Any]]:
    measured = ("seconds", "joules", "energy")
    return [{key: line[key] for key in line if key not in measured} for line in trainer.records]


def interrupt_at(trainer: Trainer, epoch: int, step: int) -> None:
    train_epoch = trainer._train_epoch

    class Asked(list[bool]):
        def __bool__(self) -> bool:
            return (trainer.epoch, trainer.step) == (epoch, step)

    trainer._train_epoch = lambda _: train_epoch(Asked())  # type: ignore[method-assign]


@pytest.mark.usefixtures("like_cuda", "votes")
@pytest.mark.parametrize(
    ("gating", "estimator"),
    [
        pytest.param("layer", "straight_through", id="layer"),
        pytest.param("channel", "straight_through", id="channel"),
        pytest.param("layer", "gumbel", id="gumbel"),
    ],
)
def test_a_replayed_run_ends_with_the_same_bits(gating: str, estimator: str, digits: Dataset, tmp_path: Path) -> None:
    """So a step has no Python numbers, its state stays in place, and nothing is read on the host."""
    recipe = change(RECIPE, gating=gating, estimator=estimator)
    eager = fit(recipe, digits, tmp_path / "eager")
    tapes = Tapes()
    replayed = fit(recipe, digits, tmp_path / "replayed", tapes)
    assert differences(checkpoint_state(tmp_path / "eager"), checkpoint_state(tmp_path / "replayed")) == []
    assert numbers(eager) == numbers(replayed)
    # a tape for every phase; the steps before its recording are real ones too
    assert tapes.replays == [epochs * STEPS - 3 for epochs in (1, 3, 2, 1)]


@pytest.mark.usefixtures("like_cuda", "votes")
def test_a_resumed_run_is_captured_anew(digits: Dataset, tmp_path: Path) -> None:
    """In the middle of an epoch, after a commit."""
    fit(RECIPE, digits, tmp_path / "whole", Tapes())
    first = make(RECIPE, digits, tmp_path / "parts", Tapes())
    interrupt_at(first, 4, 6)
    with pytest.raises(Interrupted):
        first.fit()
    second = fit(RECIPE, digits, tmp_path / "parts", Tapes(), resume=True)
    assert differences(checkpoint_state(tmp_path / "whole"), checkpoint_state(tmp_path / "parts")) == []
    assert second.training_step.graphs.replays == [5 + STEPS - 3, STEPS - 3]  # type: ignore[union-attr]


def test_a_cpu_reads_what_a_gpu_would_wait_for(digits: Dataset, tmp_path: Path) -> None:
    """The tape sees a read: SGD that is not fused asks for its learning rate."""
    with pytest.raises(HostReads):
        fit(RECIPE, digits, tmp_path, Tapes())


class NoGraphs(Tapes):
    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


def test_a_capture_that_fails_is_a_warning(digits: Dataset, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="runs without a CUDA graph, slower: operation not permitted .* capturing$"):
        trainer = fit(TINY, digits, tmp_path / "run", NoGraphs())
    assert not trainer.training_step.captured
    fit(TINY, digits, tmp_path / "eager")
    assert differences(checkpoint_state(tmp_path / "eager"), checkpoint_state(tmp_path / "run")) == []


@pytest.mark.usefixtures("like_cuda")
def test_the_optimizer_of_another_device_is_made_ready(digits: Dataset, tmp_path: Path) -> None:
    """Resumed from a CPU: not fused, without momentum for heads that have not run, and in any memory layout."""
    trainer = make(change(RECIPE, gating="channel"), digits, tmp_path)
    optimizer, weight = trainer.optimizer, trainer.model.layer2[0].conv2.weight
    momentum = torch.rand_like(weight, memory_format=torch.contiguous_format)
    optimizer.state[weight]["momentum_buffer"] = momentum
    for group in optimizer.param_groups:
        group["fused"] = None
    batch = next(iter(trainer.train_loader))
    parameters = copy.deepcopy(trainer.model.state_dict())
    schedule = torch.zeros_like(trainer._schedule()[0])  # a learning rate of 0
    trainer.training_step(batch, schedule)
    assert all(group["fused"] for group in optimizer.param_groups)
    buffers = [(p, optimizer.state[p]["momentum_buffer"]) for group in optimizer.param_groups for p in group["params"]]
    assert all(buffer.stride() == p.stride() for p, buffer in buffers)
    assert weight.stride() != momentum.stride()  # channels_last
    decayed = (
        RECIPE.optimizer.momentum * momentum
        + weight.grad
        + RECIPE.optimizer.weight_decay * parameters["layer2.0.conv2.weight"]
    )
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], decayed)


@pytest.mark.parametrize("end", [None, Interrupted])
def test_what_is_not_finite_at_the_end_is_not_saved(
    end: type[Exception] | None, digits: Dataset, tmp_path: Path
) -> None:
    """Where steps are not waited for, the sum of the epoch's losses tells."""
    trainer = make(TINY, digits, tmp_path)
    train_epoch = trainer._train_epoch

    def poison(*arguments: Any) -> None:
        train_epoch(*arguments)
        if trainer.epoch == 1:
            trainer.sums["loss"].fill_(torch.nan)
            if end is not None:
                raise end

    trainer._train_epoch = poison  # type: ignore[method-assign]
    with pytest.raises(NonFiniteLoss, match="not finite in epoch 2 by step 11"):
        trainer.fit()
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 1


@pytest.fixture
def same_algorithms() -> Iterator[None]:
    """Of two runs on a GPU, in and outside a graph."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.usefixtures("same_algorithms", "votes")
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("gating", ["none", "layer", "channel"])
def test_a_captured_run_on_a_gpu(gating: str, impl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured and not: the losses of all epochs, through commits, and the weights at the end."""
    monkeypatch.setenv("FASTGATE_IMPL", impl)
    data = load_dataset("digits", device="cuda")
    # decisions that are chosen and settled early: rounding must not make two runs different networks
    recipe = change(RECIPE, gating=gating, precision="fp32", learning_rate=0.02, settle_at=0.6, anneal_until=0.4)
    eager = fit(recipe, data, tmp_path / "eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the training step runs without a CUDA graph")
        captured = fit(recipe, data, tmp_path / "captured", CudaGraphs(data.train.labels.device))
    assert captured.training_step.captured and not eager.training_step.captured
    for a, b in zip(numbers(eager), numbers(captured), strict=True):
        assert a["learning_rate"] == b["learning_rate"] and a["macs_training"] == b["macs_training"]
        # sums in another order, over 11 steps each
        assert a["train"] == pytest.approx(b["train"], rel=1e-3, abs=1e-3)
    ours, theirs = captured.model.state_dict(), eager.model.state_dict()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ["straight_through", "gumbel"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_no_epoch_waits_for_the_gpu(precision: str, estimator: str, tmp_path: Path) -> None:
    """Except epochs with a capture, the first of their phase."""
    data = load_dataset("digits", device="cuda")
    recipe = change(RECIPE, precision=precision, estimator=estimator, commit_after=None, open_until=0.0)
    trainer = make(recipe, data, tmp_path, CudaGraphs(data.train.labels.device))
    train_epoch, phases, watched = trainer._train_epoch, set(), []

    def watch(*arguments: Any) -> None:
        is_new = trainer.search.configuration not in phases
        phases.add(trainer.search.configuration)
        torch.cuda.set_sync_debug_mode("default" if is_new else "error")
        try:
            train_epoch(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        watched.append(not is_new)

    trainer._train_epoch = watch  # type: ignore[method-assign]
    trainer.fit()
    assert watched == [False, True, True, True, True, True, False] and trainer.training_step.captured
