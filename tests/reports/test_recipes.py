"""Recipes of all versions, side by side."""

from typing import Any

import pytest

from fastgate.reports.recipes import read_recipe, without_seed
from fastgate.training.presets import get_preset
from fastgate.training.recipe import change, recipe_to_dict


def shared(gating: str, missing: tuple[str, ...] = (), **options: Any) -> dict[str, Any]:
    """What runs of such a recipe share, written by a version that had no `missing` options."""
    recipe = recipe_to_dict(change(get_preset("demo"), gating=gating, **options))
    sections = {
        name: {key: value for key, value in part.items() if key not in missing} if isinstance(part, dict) else part
        for name, part in recipe.items()
    }
    return without_seed(read_recipe(sections))


def test_an_option_that_did_not_exist_had_the_value_of_then() -> None:
    early = shared("layer", ("detach_gates", "gate_lr_factor", "train_images"), seed=1)
    assert early == shared("layer", detach_gates=False, seed=2) != shared("layer", seed=1)


@pytest.mark.parametrize("options", [{"detach_gates": False}, {"settle_at": 0.5}, {"target": 0.7}])
def test_a_plain_network_has_no_search(options: dict[str, Any]) -> None:
    assert shared("none", **options) == shared("none")
    assert shared("layer", **options) != shared("layer")
    assert shared("none", epochs=7) != shared("none")
