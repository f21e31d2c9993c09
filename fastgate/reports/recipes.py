"""What reports read of a recipe: the one place that knows how recipes of all versions are written down."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# gate losses of an epoch's line of metrics, and the field that weighs them
_WEIGHTS = {
    "polarization": "lambda_polar",
    "activation": "lambda_activation",
    "budget": "lambda_budget",
    "capacity": "lambda_capacity",
}


@dataclass(frozen=True)
class RecipeFacts:
    """The facts of a recipe that reports name; what its version did not record is None.

    Attributes:
        fields: the whole recipe, flat: field -> value; a field of a section is "section.field".
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

    def find(*names: str) -> Any:
        """The value of the first of these fields that is there, in whatever section."""
        return next((value for name in names for key, value in flat.items() if key.split(".")[-1] == name), None)

    return RecipeFacts(
        fields=flat,
        dataset=find("dataset"),
        network=find("network"),
        gating=find("gating"),
        epochs=find("epochs"),
        seed=find("seed"),
        precision=find("precision"),
        target=find("target", "target_macs"),
        cost=find("cost") or "macs",  # the only one there was, before there was a choice
        open_until=find("open_until"),
        weights={loss: str(find(loss, field)) for loss, field in _WEIGHTS.items() if find(loss, field) is not None},
    )


def without_seed(facts: RecipeFacts) -> dict[str, Any]:
    """The fields in which runs of the same recipe agree."""
    return {name: value for name, value in facts.fields.items() if name.split(".")[-1] != "seed"}


def _flatten(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in recipe.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
