"""Controls: what a compact network is compared with, trained by the same recipe, epochs and seed."""

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastgate.pruning.decisions import Decisions, GateDecision
from fastgate.pruning.targets import meet_target
from fastgate.training.matching import match_macs as match_network
from fastgate.training.recipe import Recipe, change

# how far the plain network of equal MACs may be from the compact one
_TOLERANCE = 0.01


def control_recipe(kind: str, recipe: Recipe, image_size: Sequence[int], num_classes: int, wanted: int) -> Recipe:
    """The recipe of a control, the run's own but for the network.

    Args:
        kind: one of :data:`~fastgate.training.recipe.CONTROLS`.
        recipe: the gated run's.
        image_size: (C, H, W).
        num_classes: of the data set.
        wanted: MACs of the compact network.

    Raises:
        ValueError: no plain network has the wanted MACs within 1 %.
    """
    if kind == "unpruned":
        return change(recipe, gating="none", control="none")
    if kind == "equal-macs":
        return match_macs(change(recipe, gating="none", control="none"), image_size, num_classes, wanted)
    # a gated network whose gates are all final before the first epoch: what they close is gone by then
    return change(recipe, control="none", compact_training=True)


def match_macs(recipe: Recipe, image_size: Sequence[int], num_classes: int, wanted: int) -> Recipe:
    """A plain network of the wanted MACs within 1 %, from scratch: by its depth as far as that goes, then its widths.

    The depth is the one that comes closest at the recipe's widths; where whole channels cannot make up for the rest,
    the next one. Of the widths at which a depth is within 1 %, those are taken whose stages are scaled most alike.

    Raises:
        ValueError: none has the wanted MACs within 1 %, or depth and widths of the network cannot be chosen.
    """
    if recipe.model.cifar_depth is None:
        name = match_network(recipe.model.network, num_classes, image_size, wanted, tolerance=_TOLERANCE)
        return change(recipe, network=name, weights="none")
    full = recipe.model.stage_widths

    def count(depth: int, widths: Sequence[int]) -> int:
        return _count(depth, widths, recipe.model.shortcut, image_size, num_classes)

    counts = {depth: count(depth, full) for depth in range(8, recipe.model.cifar_depth + 1, 6)}
    for depth in sorted(counts, key=lambda each: abs(math.log(counts[each] / wanted))):
        scale = math.sqrt(wanted / counts[depth])
        ranges = [range(max(1, math.floor(scale * width * 0.8)), math.ceil(scale * width * 1.2) + 2) for width in full]
        near = [
            widths for widths in itertools.product(*ranges) if abs(count(depth, widths) - wanted) <= _TOLERANCE * wanted
        ]
        if near:
            widths = min(near, key=lambda each: _unevenness(each, full, scale))
            return change(recipe, network=f"resnet{depth}", widths=",".join(map(str, widths)), weights="none")
    raise ValueError(
        f"control equal-macs: expected a plain network within {_TOLERANCE:.0%} of {wanted} MACs, found none; ask for "
        "another target"
    )


def _unevenness(widths: Sequence[int], full: Sequence[int], scale: float) -> float:
    return sum(math.log(width / (scale * each)) ** 2 for width, each in zip(widths, full, strict=True))


def _count(depth: int, widths: Sequence[int], shortcut: str, image_size: Sequence[int], num_classes: int) -> int:
    """MACs of a plain ResNet of `fastgate.models.resnet`, as :func:`fastgate.macs` counts them, without building it."""
    channels, height, width = image_size
    total, before = height * width * 9 * channels * widths[0], widths[0]
    for stage, here in enumerate(widths):
        stride = 2 if stage else 1
        height, width = math.ceil(height / stride), math.ceil(width / stride)
        beside = before * here if stage and shortcut == "conv" else 0
        total += height * width * (9 * here * (before + ((depth - 2) // 3 - 1) * here) + beside)
        before = here
    return total + before * num_classes


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
