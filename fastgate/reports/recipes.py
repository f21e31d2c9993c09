"""What reports read from a recipe: the one place that knows how recipes of all versions are written down."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fastgate.pruning.config import WEIGHTS, SearchConfig
from fastgate.training.recipe import ADDED_LATER, OLD_NAMES

_SEARCH = {field.name for field in fields(SearchConfig)}


@dataclass(frozen=True)
class RecipeFacts:
    """The facts of a recipe that reports name; what its version did not record is None.

    Attributes:
        fields: the whole recipe: option -> value.
        target: share of the whole network's cost that was asked for.
        cost: what the target is a share of: "macs", "params" or "latency".
        open_until: share of the epochs for which gates are held open.
        weights: gate loss -> its weight, a number or a schedule, as text.
    """

    fields: dict[str, Any]
    dataset: str | None
    network: str | None
    gating: str | None
    epochs: int | None
    seed: int | None
    precision: str | None
    target: float | None
    cost: str
    open_until: float | None
    weights: dict[str, str]


def read_recipe(recipe: Mapping[str, Any]) -> RecipeFacts:
    """The facts of a recipe as it stands in a run's `config.json` or `summary.json`, of any version."""
    flat = _flatten(recipe)

    return RecipeFacts(
        fields=flat,
        dataset=flat.get("dataset"),
        network=flat.get("network"),
        gating=flat.get("gating"),
        epochs=flat.get("epochs"),
        seed=flat.get("seed"),
        precision=flat.get("precision"),
        target=flat.get("target"),
        cost=flat.get("cost") or "macs",  # the only one there was, before there was a choice
        open_until=flat.get("open_until"),
        weights={loss: str(flat[loss]) for loss in WEIGHTS if loss in flat},
    )


def without_seed(facts: RecipeFacts) -> dict[str, Any]:
    """The fields in which runs of the same recipe agree: those that an early version lacks with the values it used.

    Without gates, nothing depends on the options of the search.
    """
    unused = {"seed", *(_SEARCH if facts.gating == "none" else ())}
    return {name: value for name, value in {**ADDED_LATER, **facts.fields}.items() if name not in unused}


def _flatten(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, whatever section they stand in; those of the first version by their present names."""
    flat: dict[str, Any] = {}
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value)
        elif name != "version":
            flat[OLD_NAMES.get(name, name)] = value
    return flat
