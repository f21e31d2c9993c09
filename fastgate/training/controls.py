"""Controls: what a compact network is compared with, trained by the same recipe and seed."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastgate.models.resnet import WIDTHS
from fastgate.pruning.decisions import Decisions, GateDecision
from fastgate.pruning.targets import meet_target
from fastgate.training.matching import match_macs
from fastgate.training.network_names import parse_name
from fastgate.training.recipe import Recipe, change


def control_recipe(kind: str, recipe: Recipe, find: Callable[[str], str], *, training: float) -> Recipe:
    """The recipe of a control, the run's own but for the network and, for equal MACs of training, the epochs.

    Args:
        kind: one of :data:`~fastgate.training.recipe.CONTROLS`.
        recipe: the gated run's.
        find: name of the run's network -> name of the plain one that takes its place.
        training: MACs of the gated run's training, as a share of those of the plain network in as many epochs.

    Raises:
        ValueError: there is no such plain network.
    """
    if kind in ("random", "retrain"):
        # a gated network whose gates are all final before the first epoch: what they close is gone by then
        scratch = {"weights": "none"} if kind == "retrain" else {}
        return change(recipe, control="none", compact_training=True, **scratch)
    plain = change(recipe, gating="none", control="none")
    if kind == "unpruned":
        return plain
    plain = with_network(plain, find(network_name(recipe)))
    return change(plain, epochs=max(1, round(training * recipe.run.epochs))) if kind == "equal-training" else plain


def network_name(recipe: Recipe) -> str:
    """The network of a recipe with its options, as :mod:`fastgate.training.zoo` reads it."""
    model = recipe.model
    if model.cifar_depth is None:
        return model.network
    return f"{model.network}?widths={model.widths}&shortcut={model.shortcut}"


def with_network(recipe: Recipe, name: str) -> Recipe:
    """The recipe with a network of that name, from scratch."""
    found = parse_name(name, None)
    if found.kind != "cifar":
        return change(recipe, network=name, weights="none")
    options = {"widths": ",".join(map(str, found.options.get("widths", WIDTHS)))}
    return change(recipe, network=found.base, **options, weights="none")


def match_recipe(recipe: Recipe, image_size: Sequence[int], num_classes: int, wanted: int) -> Recipe:
    """A plain network of the wanted MACs, from scratch; see :func:`fastgate.training.matching.match_macs`.

    Raises:
        ValueError: none has the wanted MACs within 1 %, or depth and widths of the network cannot be chosen.
    """
    return with_network(recipe, match_macs(network_name(recipe), num_classes, image_size, wanted))


def draw_decisions(found: Decisions, costs: Mapping[str, Tensor], wanted: int, total: int, seed: int) -> Decisions:
    """Random decisions for the gates of `found` that leave as many MACs as it does.

    Channels that the search closed altogether stay closed only if they are drawn: every gate keeps a channel, as
    :func:`~fastgate.pruning.targets.meet_target` does.

    Args:
        found: decisions of the search.
        costs: MACs that each gate (channel) switches.
        wanted: MACs of the compact network.
        total: MACs with every gate open.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    # means around one half: for meet_target they are a ranking, and no vote weighs more than the target
    drawn = {
        name: GateDecision(
            0.5 + 1e-3 * (torch.rand(len(gate.open), generator=generator, dtype=torch.float64) - 0.5),
            torch.ones(len(gate.open), dtype=torch.bool),
        )
        for name, gate in found.items()
    }
    return meet_target(Decisions(drawn), costs, wanted / total, total)
