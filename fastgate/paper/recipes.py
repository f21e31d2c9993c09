"""The runs behind the paper's tables as recipes: section 5 as printed, or shortened to one of two smaller scales."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastgate import schedules
from fastgate.paper.printed import CIFAR10, CIFAR100
from fastgate.training.presets import get_preset
from fastgate.training.recipe import Recipe, change

BASELINE = "baseline"
GATINGS = {"STE": "straight_through", "Gumbel-softmax": "gumbel", "Bernoulli": "mean_threshold"}
RISING = "up"


@dataclass(frozen=True)
class Scale:
    """How much of section 5 is run.

    Attributes:
        about: what differs from the paper, shown with every result.
        changes: fields of the paper's recipes that it replaces.
        networks: what stands for the paper's networks.
        largest_batch: batches of the recipes are cut to it; None for no limit.
        trials: seeds of Table 3.
        activations: weights of the activation loss in Figures 4 and 5; Table 3 has the middle one.
    """

    name: str
    about: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    networks: Mapping[str, str] = field(default_factory=dict)
    largest_batch: int | None = None
    trials: int = 5
    activations: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)

    @property
    def activation(self) -> float:
        """Weight of the activation loss in Table 3."""
        return self.activations[len(self.activations) // 2]


# with the printed steps, so few epochs would spend half of their time at a ten-thousandth of the learning rate
_COSINE = "a cosine instead of the printed learning-rate steps"
SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "smoke",
            "Only shows that everything works: 8x8 digits for both CIFAR sets, ResNet-20 for both networks, "
            f"4 epochs, {_COSINE}, smaller batches, 2 trials. No number here is comparable with the paper's.",
            {"dataset": "digits", "epochs": 4, "lr_schedule": "cosine"},
            {"resnet110": "resnet20", "resnet56": "resnet20"},
            largest_batch=128,
            trials=2,
            activations=(0.0, 0.2, 1.0),
        ),
        Scale(
            "short",
            f"The paper's recipes on ResNet-20, 2 epochs instead of 350 unless stated otherwise, {_COSINE}. "
            "Not trained to the end: compare our rows with each other, not with the paper's.",
            {"epochs": 2, "lr_schedule": "cosine"},
            {"resnet110": "resnet20", "resnet56": "resnet20"},
            trials=2,
            activations=(0.0, 0.5, 1.0),
        ),
        Scale("full", "Section 5 as printed: 350 epochs, default initialisation, clipped window, seed 1."),
    )
}


@dataclass(frozen=True)
class PlannedRun:
    """A run that a table needs.

    Attributes:
        name: of its folder; the same run has the same name wherever it is needed.
        recipe: its own, or that of the run it is a control of.
        equal_to: this run is the plain network with the MACs of that run's compact network.
    """

    name: str
    recipe: Recipe
    equal_to: "PlannedRun | None" = None


def equal_macs(run: PlannedRun) -> PlannedRun:
    """The control of a gated run: the plain ResNet of the same MACs, trained the same way."""
    return PlannedRun(f"{run.name}-equal-macs", run.recipe, run)


@dataclass(frozen=True)
class Recipes:
    """The paper's runs at a scale; `overrides` replace fields of every recipe."""

    scale: Scale
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def baseline(self, dataset: str = CIFAR10, network: str = "resnet110") -> PlannedRun:
        """The unpruned network."""
        return self._plan(BASELINE, dataset, "layer", network, gating="none")

    def layers(self, dataset: str = CIFAR10, polar: str = "1", gating: str = "STE") -> PlannedRun:
        """ResNet-110 with layer gates; `polar` is a number or RISING."""
        what = f"layer-lambda{polar}" + ("" if gating == "STE" else f"-{GATINGS[gating]}")
        return self._plan(
            what,
            dataset,
            "layer",
            estimator=GATINGS[gating],
            polarization=self._stretch(schedules.LAMBDA_UP) if polar == RISING else polar,
        )

    def channels(self, dataset: str = CIFAR10, depth: int = 2, position: str = "after") -> PlannedRun:
        """ResNet-110 with channel gates."""
        return self._plan(f"channel-{depth}fc-{position}", dataset, "channel", gate_depth=depth, position=position)

    def sparse(self, activation: float, seed: int = 1) -> PlannedRun:
        """ResNet-56 with Gumbel-softmax layer gates and the activation loss (section 5.3)."""
        return self._plan(
            f"layer-gumbel-activation{activation:g}-seed{seed}",
            CIFAR10,
            "layer",
            "resnet56",
            estimator="gumbel",
            polarization="1",
            activation=f"{activation:g}",
            seed=seed,
        )

    def _plan(self, what: str, dataset: str, preset: str, network: str = "resnet110", **fields: Any) -> PlannedRun:
        recipe = get_preset(f"paper-{'cifar100' if dataset == CIFAR100 else 'cifar10'}-{preset}")
        batch_size = min(recipe.run.batch_size, self.scale.largest_batch or recipe.run.batch_size)
        recipe = change(
            recipe,
            **{
                "network": self.scale.networks.get(network, network),
                "batch_size": batch_size,
                **self.scale.changes,
                **fields,
                **self.overrides,
            },
        )
        return PlannedRun(f"{recipe.data.dataset}-{recipe.model.network}-batch{batch_size}-{what}", recipe)

    def _stretch(self, schedule: schedules.Piecewise) -> str:
        """A schedule over the paper's 350 epochs as one over this scale's."""
        printed = get_preset("paper-cifar10-layer").run.epochs
        epochs = self.overrides.get("epochs", self.scale.changes.get("epochs", printed))
        return ", ".join(f"{epoch * epochs / printed:g}:{value:g}" for epoch, value in schedule.points)
