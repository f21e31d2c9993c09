"""Controls: the baselines of a compact network, trained with the same recipe and seed."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastgate.models.resnet import WIDTHS
from fastgate.pruning.decisions import Decisions, GateDecision
from fastgate.pruning.targets import meet_target
from fastgate.schedules import stretch
from fastgate.training.matching import match_macs
from fastgate.training.network_names import parse_name
from fastgate.training.recipe import Recipe, change


def control_recipe(kind: str, recipe: Recipe, find: Callable[[str], str], *, training: float) -> Recipe:
    """The recipe of a control: the run's own, except for the network and, for equal training MACs, the epochs.

    Args:
        kind: one of :data:`~fastgate.training.recipe.CONTROLS`.
        recipe: of the gated run.
        find: maps the name of the run's network to that of the plain network that replaces it.
        training: training MACs of the gated run, as a fraction of the plain network's for the same number of epochs.

    Raises:
        ValueError: there is no such plain network.
    """
    if kind in ("random", "retrain"):
        # a gated network whose gates are all final, and closed parts removed, before the first epoch
        scratch = {"weights": "none"} if kind == "retrain" else {}
        return change(recipe, control="none", compact_training=True, **scratch)
    plain = change(recipe, gating="none", control="none")
    if kind == "unpruned":
        return plain
    plain = with_network(plain, find(network_name(recipe)))
    if kind != "equal-training":
        return plain
    epochs, schedule = max(1, round(training * recipe.run.epochs)), recipe.optimizer.lr_schedule
    if schedule != "cosine":  # which follows the number of epochs by itself
        schedule = stretch(schedule, epochs / recipe.run.epochs)
    return change(plain, epochs=epochs, lr_schedule=schedule)


def network_name(recipe: Recipe) -> str:
    """The name of a recipe's network with its options, as :mod:`fastgate.training.zoo` parses it."""
    model = recipe.model
    if model.cifar_depth is None:
        return model.network
    return f"{model.network}?widths={model.widths}&shortcut={model.shortcut}"


def with_network(recipe: Recipe, name: str) -> Recipe:
    """The recipe with the network of this name, trained from scratch."""
    found = parse_name(name, None)
    if found.kind != "cifar":
        return change(recipe, network=name, weights="none")
    options = {"widths": ",".join(map(str, found.options.get("widths", WIDTHS)))}
    return change(recipe, network=found.base, **options, weights="none")


def match_recipe(recipe: Recipe, image_size: Sequence[int], num_classes: int, wanted: int) -> Recipe:
    """The recipe with a plain network of `wanted` MACs; see :func:`fastgate.training.matching.match_macs`.

    Raises:
        ValueError: no network has these MACs within 1 %, or depth and widths of the network cannot be chosen.
    """
    return with_network(recipe, match_macs(network_name(recipe), num_classes, image_size, wanted))


def draw_decisions(found: Decisions, costs: Mapping[str, Tensor], wanted: int, total: int, seed: int) -> Decisions:
    """Random decisions for the gates of `found` that leave the same MACs.

    Gates that the search closed entirely are drawn like the others: every channel gate keeps a channel, see
    :func:`~fastgate.pruning.targets.meet_target`.

    Args:
        found: decisions of the search.
        costs: MACs controlled by each gate (channel).
        wanted: MACs of the compact network.
        total: MACs with every gate open.
        seed: of the random draw.
    """
    generator = torch.Generator().manual_seed(seed)
    # means close to one half only rank the gates for meet_target: no vote outweighs the target
    drawn = {
        name: GateDecision(
            0.5 + 1e-3 * (torch.rand(len(gate.open), generator=generator, dtype=torch.float64) - 0.5),
            torch.ones(len(gate.open), dtype=torch.bool),
        )
        for name, gate in found.items()
    }
    return meet_target(Decisions(drawn), costs, wanted / total, total)
