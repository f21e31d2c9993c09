"""Controls: what a compact network is compared with, trained by the same recipe, epochs and seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastgate.pruning.costs import macs
from fastgate.pruning.decisions import Decisions, GateDecision
from fastgate.pruning.targets import meet_target
from fastgate.training.networks import build_network
from fastgate.training.presets import Recipe

# how far the plain network of equal MACs may be from the compact one
_TOLERANCE = 0.02
# widths are tried in steps of one channel of the widest stage
_STEPS_PER_WIDTH = 64


def control_recipe(kind: str, recipe: Recipe, image_size: Sequence[int], num_classes: int, wanted: int) -> Recipe:
    """The recipe of a control, the run's own but for the network.

    Args:
        kind: one of :data:`~fastgate.training.presets.CONTROLS`.
        recipe: the gated run's.
        image_size: (C, H, W).
        num_classes: of the data set.
        wanted: MACs of the compact network.

    Raises:
        ValueError: no plain network has the wanted MACs within 2 %.
    """
    if kind == "unpruned":
        return replace(recipe, gating="none", control="none")
    if kind == "equal-macs":
        return match_macs(replace(recipe, gating="none", control="none"), image_size, num_classes, wanted)
    # a gated network whose gates are all final before the first epoch: what they close is gone by then
    return replace(recipe, control="none", compact_training=True)


def match_macs(recipe: Recipe, image_size: Sequence[int], num_classes: int, wanted: int) -> Recipe:
    """A plain network of the wanted MACs: of the depth that comes closest at the recipe's width, then of the width.

    Where no width of that depth has them within 2 %, the next depth is tried: few widths round to few channels.

    Raises:
        ValueError: no network has the wanted MACs within 2 %.
    """

    def count(network: Recipe) -> int:
        return macs(build_network(network, image_size, num_classes), image_size)

    def match_width(network: Recipe) -> Recipe:
        low, high = 1, math.ceil(2 * recipe.width * _STEPS_PER_WIDTH)
        while low < high:  # the narrowest network that has at least the wanted MACs
            middle = (low + high) // 2
            if count(replace(network, width=middle / _STEPS_PER_WIDTH)) < wanted:
                low = middle + 1
            else:
                high = middle
        return min((replace(network, width=step / _STEPS_PER_WIDTH) for step in (low - 1, low) if step > 0), key=miss)

    def miss(network: Recipe) -> int:
        return abs(count(network) - wanted)

    depths = [replace(recipe, network=f"resnet{depth}") for depth in range(8, recipe.depth + 1, 6)]
    # MACs rise by the same amount with every six layers
    first, last = count(depths[0]), count(depths[-1])
    rises = [first + (last - first) * i / max(len(depths) - 1, 1) for i in range(len(depths))]
    tried: list[Recipe] = []
    for i in sorted(range(len(depths)), key=lambda i: abs(math.log(rises[i] / wanted))):
        tried.append(match_width(depths[i]))
        if miss(tried[-1]) <= _TOLERANCE * wanted:
            return tried[-1]
    nearest = min(tried, key=miss)
    raise ValueError(
        f"control equal-macs: expected a plain network within {_TOLERANCE:.0%} of {wanted} MACs, the nearest is "
        f"{nearest.network} of width {nearest.width:.4g} with {count(nearest)}; ask for a larger target_macs"
    )


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
