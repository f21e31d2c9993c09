"""What a search does to the running statistics of batch norms while gates open and close."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastgate as fg
from fastgate.gates import named_gates
from fastgate.pruning.statistics import refresh_statistics
from fastgate.training.data import load_dataset
from fastgate.training.recipe import Recipe, change
from tests.helpers import state_copy
from tests.training.runs import TINY, trainer_of


def gated(gating: str = "layer", **options: object) -> nn.Module:
    """A network with lively heads, in training mode, whose running statistics are of quite another network."""
    torch.manual_seed(0)
    model = fg.models.resnet20(gating=gating, **options)
    with torch.no_grad():
        for _, gate in named_gates(model):
            gate.fc2.weight.normal_(std=0.5)
            gate.fc2.bias.zero_()
        for norm in norms(model).values():
            norm.running_mean.fill_(2.0)
            norm.running_var.fill_(0.25)
            norm.num_batches_tracked.fill_(7)
    return model.train()


def norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def images(batches: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 3, 8, 8, generator=generator) for _ in range(batches)]


def decisions(model: nn.Module, x: Tensor, training: bool) -> Tensor:
    model.train(training)
    with torch.no_grad():
        model(x)
    return torch.cat([gate.decisions.flatten() for _, gate in named_gates(model)])


@pytest.mark.parametrize("gating", ["layer", "channel"])
def test_evaluation_decides_as_training_does(gating: str) -> None:
    model, (x,) = gated(gating), images(1)
    expected = decisions(model, x, training=True)
    assert 0.1 < expected.mean() < 0.9
    before = (decisions(model, x, training=False) == expected).double().mean()
    model.train()
    refresh_statistics(model, [x])
    after = (decisions(model, x, training=False) == expected).double().mean()
    # variances are of n in training and of n - 1 here: what is near the threshold may be decided otherwise
    assert before < 0.8 and after > 0.95


def test_statistics_are_the_means_over_batches_and_nothing_else_changes() -> None:
    model, batches = gated(), images()
    old, random = state_copy(model), torch.get_rng_state()
    momenta = {name: norm.momentum for name, norm in norms(model).items()}
    refresh_statistics(model, ((x, None) for x in batches))
    stem = torch.stack([model.conv1(x) for x in batches])
    torch.testing.assert_close(model.bn1.running_mean, stem.mean((1, 3, 4)).mean(0))
    torch.testing.assert_close(model.bn1.running_var, stem.transpose(1, 2).flatten(2).var(2).mean(0))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, old[name])}
    assert changed == {f"{name}.{buffer}" for name in norms(model) for buffer in ("running_mean", "running_var")}
    assert {name: norm.momentum for name, norm in norms(model).items()} == momenta
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_held_batch_norms_and_heads_of_frozen_gates_keep_theirs() -> None:
    model = gated()
    name, gate = next(named_gates(model))
    gate.freeze(torch.tensor([True]))
    model.bn1.eval()
    refresh_statistics(model, images())
    kept = {norm for norm, module in norms(model).items() if bool((module.running_mean == 2.0).all())}
    assert kept == {"bn1", f"{name}.bn"} and not model.bn1.training


def test_a_dropout_draws_nothing() -> None:
    model = nn.Sequential(gated(), nn.Dropout())
    random = torch.get_rng_state()
    refresh_statistics(model, images(1))
    assert torch.equal(torch.get_rng_state(), random) and model[1].training


def test_without_batches_or_batch_norms_it_is_refused_and_nothing_changes() -> None:
    model = gated()
    old = state_copy(model)
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        refresh_statistics(model, [])
    with pytest.raises(ValueError, match=r"call model.train\(\) first"):
        refresh_statistics(model.eval(), images(1))
    assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())


def test_a_failing_batch_leaves_all_as_it_was() -> None:
    model = gated()
    old = state_copy(model)
    with pytest.raises(ValueError, match="got \\[4, 5, 8, 8\\]"):
        refresh_statistics(model, [*images(1), torch.zeros(4, 5, 8, 8)])
    assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())
    assert all(norm.momentum == 0.1 and norm.training for norm in norms(model).values())


@pytest.mark.parametrize(
    ("recipe", "epochs"),
    [
        (TINY, [1, 2]),  # held open in epoch 0, decided before epoch 3
        (change(TINY, target=None), []),
        (change(TINY, gating="none"), []),
    ],
    ids=["target", "no target", "no gates"],
)
def test_a_run_evaluates_with_fresh_statistics_while_gates_are_live(
    recipe: Recipe, epochs: list[int], tmp_path: Path
) -> None:
    trainer = trainer_of(recipe, load_dataset("digits"), tmp_path)
    fresh = []
    end_epoch = trainer._end_epoch

    def watch(*arguments: object) -> dict[str, object]:
        state = state_copy(trainer.model)
        refresh_statistics(trainer.model, list(trainer.train_loader.start_at(trainer.epoch))[:10])
        if all(torch.equal(value, state[name]) for name, value in trainer.model.state_dict().items()):
            fresh.append(trainer.epoch)
        trainer.model.load_state_dict(state)
        return end_epoch(*arguments)

    trainer._end_epoch = watch  # type: ignore[method-assign, assignment]
    trainer.fit()
    assert fresh == epochs
