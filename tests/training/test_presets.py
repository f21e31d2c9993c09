import json
import math
from pathlib import Path

import pytest

from fastgate.training.presets import PRESETS, get_preset
from fastgate.training.recipe import (
    OPTIONS,
    Recipe,
    change,
    find_option,
    list_values,
    make_recipe,
    recipe_from_dict,
    recipe_to_dict,
)
from fastgate.training.run_folder import read_config

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "training"


def test_the_presets_of_the_command_line() -> None:
    assert set(PRESETS) == {
        "demo",
        *(f"{data}-{gating}" for data in ("cifar10", "cifar100") for gating in ("layer", "channel")),
        *(f"paper-{data}-{gating}" for data in ("cifar10", "cifar100") for gating in ("layer", "channel")),
        *(f"{name}-{gating}" for name in ("finetune", "imagenet-resnet50") for gating in ("layer", "channel")),
    }


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("paper-")])
def test_paper_presets_are_section_5_1_as_printed(name: str) -> None:
    recipe = PRESETS[name]
    cifar10 = "cifar10-" in name
    assert recipe.data.dataset == ("cifar10" if cifar10 else "cifar100")
    assert recipe.gates.gating == name.rsplit("-", 1)[1]
    assert (recipe.model.network, recipe.run.epochs, recipe.run.seed) == ("resnet110", 350, 1)
    assert recipe.run.batch_size == (256 if cifar10 else 64)
    assert (recipe.optimizer.momentum, recipe.optimizer.nesterov, recipe.optimizer.weight_decay) == (0.9, False, 5e-4)
    assert recipe.optimizer.gate_weight_decay == 5e-4
    marks = (60, 120, 160) if cifar10 else (125, 190, 250)
    for power, epoch in enumerate((0, *marks)):
        assert recipe.learning_rate_at(epoch) == pytest.approx(0.1 * 0.1**power, rel=1e-12)
        if epoch:
            assert recipe.learning_rate_at(epoch - 0.01) == pytest.approx(0.1 * 0.1 ** (power - 1), rel=1e-12)
    # gates live from the first epoch to the last, clipped window, PyTorch's initialisation, no target
    assert (recipe.search.open_until, recipe.search.settle_at, recipe.gates.window, recipe.gates.init_logit) == (
        0,
        None,
        "clipped",
        None,
    )
    assert recipe.search.target_at(0.3) is None
    assert (recipe.search.commit_after, recipe.search.compact_training) == (None, False)
    assert recipe.gates.gate_input == ("flatten" if recipe.gates.gating == "channel" else "pool")


@pytest.mark.parametrize("name", ["cifar10-layer", "cifar10-channel", "cifar100-layer", "cifar100-channel"])
def test_default_presets_are_the_strong_plain_recipe(name: str) -> None:
    recipe = PRESETS[name]
    assert (recipe.run.epochs, recipe.run.batch_size, recipe.optimizer.warmup_epochs) == (300, 256, 5)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.nesterov, recipe.optimizer.weight_decay) == (
        0.1,
        True,
        5e-4,
    )
    assert (recipe.search.commit_after, recipe.search.compact_training) == (5, True)
    assert recipe.learning_rate_at(2.5) == pytest.approx(0.05)
    assert recipe.learning_rate_at(5) == pytest.approx(0.1)
    assert recipe.learning_rate_at(5 + 295 / 3) == pytest.approx(0.1 * 0.5 * (1 + math.cos(math.pi / 3)))
    assert recipe.learning_rate_at(300) == pytest.approx(0, abs=1e-12)


def test_target_anneals_from_one() -> None:
    search = make_recipe(target=0.5, open_until=0.1, anneal_until=0.5, settle_at=0.6).search
    targets = [search.target_at(share) for share in (0, 0.099, 0.1, 0.3, 0.5, 0.99)]
    assert targets == pytest.approx([1, 1, 1, 0.75, 0.5, 0.5])


def test_recipes_survive_json() -> None:
    for recipe in PRESETS.values():
        assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe)))) == recipe
    broken = recipe_to_dict(Recipe())
    del broken["run"]["batch_size"]
    with pytest.raises(ValueError, match="expected every option of version 2, got one without batch_size"):
        recipe_from_dict(broken)
    with pytest.raises(ValueError, match="expected version 1 or 2, got 3"):
        recipe_from_dict({"version": 3})
    with pytest.raises(ValueError, match="got lamda as well"):
        recipe_from_dict({**recipe_to_dict(Recipe()), "more": {"lamda": 1}})


@pytest.mark.parametrize("folder", sorted(RESULTS.iterdir()), ids=lambda folder: folder.name)
def test_run_folders_of_all_versions_are_read(folder: Path) -> None:
    """Those behind the README's numbers; what had no option then is what was done then."""
    if not folder.is_dir():
        pytest.skip("no run folder")
    old, recipe = json.loads((folder / "config.json").read_text())["recipe"], read_config(folder)
    values = list_values(recipe)
    assert values["target"] == old["target_macs"] and values["polarization"] == float(old["lambda_polar"])
    assert values["compact_training"] == old.get("compact_training", False)
    assert values["commit_after"] == old.get("commit_after") and values["round_to"] is None
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe


def test_channels_are_rounded_where_tensor_cores_multiply() -> None:
    search = make_recipe().search
    assert [search.on("cuda", True).round_to, search.on("cuda", False).round_to, search.on("cpu", True).round_to] == [
        8, None, None
    ]  # fmt: skip
    assert make_recipe(round_to=16).search.on("cpu", False).round_to == 16
    assert make_recipe(round_to=None).search.on("cuda", True).round_to is None


def test_every_option_can_be_set_from_text() -> None:
    for recipe in (PRESETS["demo"], PRESETS["paper-cifar100-channel"], PRESETS["finetune-layer"]):
        for name, value in list_values(recipe).items():
            text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            assert OPTIONS[name].parse(text) == value
    assert find_option("target_macs") == OPTIONS["target"] and OPTIONS["validation"].parse("0.1") == 0.1
    with pytest.raises(ValueError, match=r"lerning_rate: expected an option .*; did you mean learning_rate\?"):
        make_recipe(lerning_rate=0.1)


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
        find_option(name).parse(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "resnet21"}, "network: expected resnetN with N = 6n"),
        ({"network": "vgg16"}, "network: expected resnetN"),
        ({"gating": "block"}, "gating: expected one of none, layer, channel"),
        ({"position": "end"}, "position: expected one of middle, before, after"),
        ({"estimator": "reinforce"}, "estimator: expected one of straight_through, gumbel"),
        ({"window": "soft"}, "window: expected one of clipped, restoring, identity"),
        ({"polarization": "5:1, 3:2"}, "schedule: expected a number, steps"),
        ({"lr_schedule": "linear"}, "schedule: expected a number, steps"),
        ({"epochs": 0}, "epochs: expected a number from 1 to inf, got 0"),
        ({"batch_size": 1}, "batch_size: expected a number from 2"),
        ({"target": 1.5}, "target: expected a fraction from 0 to 1, got 1.5"),
        ({"open_until": 0.7}, "expected increasing fractions of the epochs"),
        ({"settle_at": 0.2}, "expected increasing fractions of the epochs"),
        ({"precision": "fp8"}, "precision: expected one of auto, fp32, fp16, bf16"),
        (
            {"control": "plain"},
            "control: expected none, or a comma-separated list of unpruned, equal-macs, equal-training, "
            "equal-latency, random, retrain",
        ),
        ({"control": "random,random"}, "control: expected none, or a comma-separated list of"),
        ({"control": "random", "gating": "none"}, "control: expected none for a network without gates"),
        ({"cost": "joules"}, "cost: expected one of macs, params, latency, got 'joules'"),
        ({"widths": "16,32"}, "widths: expected three channel counts such as 16,32,64, got '16,32'"),
        ({"commit_after": 0}, "commit_after: expected a positive integer or None, got 0"),
        ({"gate_depth": 3}, "gate_depth: expected a number from 1 to 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_recipes(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change(get_preset("demo"), **options)


def test_unknown_preset() -> None:
    with pytest.raises(
        ValueError, match=r"preset: expected one of demo, .*, got 'cifar-layer'; did you mean cifar10-layer\?"
    ):
        get_preset("cifar-layer")
