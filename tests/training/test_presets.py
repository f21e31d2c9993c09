import math
from dataclasses import asdict, fields, replace

import pytest

from fastgate.training.presets import PRESETS, Recipe, get_preset, parse_field, recipe_from_dict


def test_the_presets_of_the_command_line() -> None:
    assert set(PRESETS) == {
        "demo",
        *(f"{data}-{gating}" for data in ("cifar10", "cifar100") for gating in ("layer", "channel")),
        *(f"paper-{data}-{gating}" for data in ("cifar10", "cifar100") for gating in ("layer", "channel")),
    }


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("paper-")])
def test_paper_presets_are_section_5_1_as_printed(name: str) -> None:
    recipe = PRESETS[name]
    cifar10 = "cifar10-" in name
    assert recipe.dataset == ("cifar10" if cifar10 else "cifar100")
    assert recipe.gating == name.rsplit("-", 1)[1]
    assert (recipe.network, recipe.epochs, recipe.seed) == ("resnet110", 350, 1)
    assert recipe.batch_size == (256 if cifar10 else 64)
    assert (recipe.momentum, recipe.nesterov, recipe.weight_decay) == (0.9, False, 5e-4)
    assert recipe.gate_weight_decay == 5e-4
    marks = (60, 120, 160) if cifar10 else (125, 190, 250)
    for power, epoch in enumerate((0, *marks)):
        assert recipe.learning_rate_at(epoch) == pytest.approx(0.1 * 0.1**power, rel=1e-12)
        if epoch:
            assert recipe.learning_rate_at(epoch - 0.01) == pytest.approx(0.1 * 0.1 ** (power - 1), rel=1e-12)
    # gates live from the first epoch to the last, clipped window, PyTorch's initialisation, no target
    assert (recipe.open_until, recipe.settle_at, recipe.window, recipe.init_logit) == (0, None, "clipped", None)
    assert recipe.target_at(100) is None
    assert (recipe.commit_after, recipe.compact_training) == (None, False)
    assert recipe.gate_input == ("flatten" if recipe.gating == "channel" else "pool")


@pytest.mark.parametrize("name", ["cifar10-layer", "cifar10-channel", "cifar100-layer", "cifar100-channel"])
def test_default_presets_are_the_strong_plain_recipe(name: str) -> None:
    recipe = PRESETS[name]
    assert (recipe.epochs, recipe.batch_size, recipe.warmup_epochs) == (300, 256, 5)
    assert (recipe.learning_rate, recipe.nesterov, recipe.weight_decay) == (0.1, True, 5e-4)
    assert (recipe.commit_after, recipe.compact_training) == (5, True)
    assert recipe.learning_rate_at(2.5) == pytest.approx(0.05)
    assert recipe.learning_rate_at(5) == pytest.approx(0.1)
    assert recipe.learning_rate_at(5 + 295 / 3) == pytest.approx(0.1 * 0.5 * (1 + math.cos(math.pi / 3)))
    assert recipe.learning_rate_at(300) == pytest.approx(0, abs=1e-12)


def test_target_anneals_from_one() -> None:
    recipe = Recipe(epochs=100, target_macs=0.5, open_until=0.1, anneal_until=0.5, settle_at=0.6)
    assert [recipe.target_at(epoch) for epoch in (0, 9.9, 10, 30, 50, 99)] == [1, 1, 1, 0.75, 0.5, 0.5]


def test_recipes_survive_json() -> None:
    for recipe in PRESETS.values():
        assert recipe_from_dict(asdict(recipe)) == recipe
    with pytest.raises(ValueError, match="a difference at batch_size"):
        recipe_from_dict({k: v for k, v in asdict(Recipe()).items() if k != "batch_size"})


def test_every_field_can_be_set_from_text() -> None:
    for field in fields(Recipe):
        for recipe in (PRESETS["demo"], PRESETS["paper-cifar100-channel"]):
            value = getattr(recipe, field.name)
            text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            assert parse_field(field.name, text) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("epochs", "ten", "epochs: expected a value of type int, got 'ten'"),
        ("nesterov", "yes", "nesterov: expected true or false, got 'yes'"),
        ("learning_rate", "none", "learning_rate: expected a value of type float, got 'none'"),
    ],
)
def test_unreadable_values(name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_field(name, text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "mnist"}, "dataset: expected one of digits, cifar10, cifar100, got 'mnist'"),
        ({"network": "resnet21"}, "network: expected resnetN with N = 6n"),
        ({"network": "vgg16"}, "network: expected resnetN"),
        ({"gating": "block"}, "gating: expected one of none, layer, channel"),
        ({"position": "end"}, "position: expected one of middle, before, after"),
        ({"estimator": "reinforce"}, "estimator: expected one of straight_through, gumbel"),
        ({"window": "soft"}, "window: expected one of clipped, restoring, identity"),
        ({"lambda_polar": "5:1, 3:2"}, "schedule: expected a number, steps"),
        ({"lr_schedule": "linear"}, "schedule: expected a number, steps"),
        ({"epochs": 0}, "epochs: expected a number from 1 to inf, got 0"),
        ({"batch_size": 1}, "batch_size: expected a number from 2"),
        ({"target_macs": 1.5}, "target_macs: expected a number from 0 to 1, got 1.5"),
        ({"open_until": 0.7}, "expected increasing shares of the epochs"),
        ({"settle_at": 0.2}, "expected increasing shares of the epochs"),
        ({"precision": "fp8"}, "precision: expected one of auto, fp32, fp16, bf16"),
        ({"control": "plain"}, "control: expected none, or some of unpruned, equal-macs, random, retrain"),
        ({"control": "random,random"}, "control: expected none, or some of"),
        ({"control": "random", "gating": "none"}, "control: expected none for a network without gates"),
        ({"cost": "joules"}, "cost: expected one of macs, params, latency, got 'joules'"),
        ({"widths": "16,32"}, "widths: expected three numbers of channels such as 16,32,64, got '16,32'"),
        ({"commit_after": 0}, "commit_after: expected a number from 1 to inf, got 0"),
        ({"gate_depth": 3}, "gate_depth: expected a number from 1 to 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_recipes(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(get_preset("demo"), **change)


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"preset: expected one of demo, .*, got 'imagenet'"):
        get_preset("imagenet")
