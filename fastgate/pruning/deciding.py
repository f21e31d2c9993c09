"""Which decisions of a search become final: unanimous ones early, the others in the epoch in which all are decided."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgate import processes
from fastgate.pruning.config import SearchConfig
from fastgate.pruning.costs import Costs
from fastgate.pruning.decisions import Decisions, GateDecision, decide, merge_decisions
from fastgate.pruning.importance import layer_importance
from fastgate.pruning.probe import FirstKept
from fastgate.pruning.targets import check_target, meet_target, overruled, within_reach
from fastgate.values import Forward

# share of the network's cost that may be closed against most samples without a warning: where gates learned the target
# none was, where they did not a quarter (bench/results/finetune/channel)
_OVERRULED = 0.1


class Deciding:
    """The decisions of a search, for its target.

    Args:
        config: target and phases.
        epochs: total number of epochs.
        costs: the costs that the target refers to.

    Attributes:
        released_at: the epoch from which gates are live.

    Raises:
        ValueError: a target that no decisions can reach.
    """

    def __init__(self, config: SearchConfig, epochs: int, costs: Costs) -> None:
        self._config, self._epochs, self._costs = config, epochs, costs
        self.released_at = round(config.open_until * epochs)
        if config.target is not None:
            check_target(costs, config.target, costs.total, config.round_to)

    def settles_at(self, epoch: int) -> bool:
        """Whether gates that are still live are decided in this epoch."""
        settle_at = self._config.settle_at
        return settle_at is not None and epoch >= round(settle_at * self._epochs)

    def unanimous(
        self, epoch: int, means: Sequence[Mapping[str, Sequence[float]]], final: Mapping[str, Tensor]
    ) -> Decisions:
        """Decisions on which all samples of the last `commit_after` epochs agree and which the target allows.

        Args:
            epoch: the epoch that begins.
            means: for each of these epochs, the mean decisions of every gate by name.
            final: the final decisions.
        """
        config, found = self._config, {}
        if config.commit_after is not None:
            # while the target decreases it still keeps gates open, so only closed ones are decided then
            searching = epoch - self.released_at
            fallen = epoch - math.ceil(config.anneal_until * self._epochs)
            steady = searching if config.target is None else fallen
            found = {
                name: opened
                for name, opened in unanimous(means).items()
                if name not in final and (steady if opened.any() else searching) >= config.commit_after
            }
            if config.target is not None:
                costs = self._costs
                found = within_reach(found, final, costs, config.target, costs.total, round_to=config.round_to)
        return Decisions({name: GateDecision(opened.double(), opened) for name, opened in found.items()})

    def decide(
        self, model: nn.Module, final: Decisions, calibration: Iterable[Any], forward: Forward | None
    ) -> Decisions:
        """Decide all gates on the batches so that the target, if any, is met; final decisions do not change."""
        found, samples, batches = dict(final), 0, FirstKept(calibration)
        if len(found) < len(self._costs):
            processes.share_buffers(model)  # every process evaluates the same network
            asked = merge_decisions(decide(model, batches, forward=forward))
            found, samples = {**asked, **found}, asked.samples
        config, costs = self._config, self._costs
        decisions = Decisions({name: found[name] for name in costs}, samples=samples)
        if config.target is None or not samples:
            return decisions
        batch, target = batches.first, config.target
        importance = layer_importance(model, decisions, batch, costs, target, costs.total, held=final, forward=forward)
        return meet_target(
            decisions, costs, target, costs.total, held=final, round_to=config.round_to,
            importance=processes.average(importance),
        )  # fmt: skip

    def warn_if_overruled(self, decisions: Decisions) -> None:
        """Warn where much had to be closed: gates that have learned the target leave little to close."""
        closed = 0.0 if self._config.target is None else overruled(decisions, self._costs)
        if closed > _OVERRULED:
            warnings.warn(
                f"the gates did not learn the target: {closed:.0%} of the network's cost had to be closed although "
                "most samples held it open; let the search last longer (settle_at, epochs), or its gates learn faster "
                "(parameter_groups(gate_lr=), --gate-lr-factor)",
                stacklevel=4,
            )


def unanimous(epochs: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Tensor]:
    """Gates on whose decisions all samples of all these epochs agree, bool `[gates]` by name.

    Args:
        epochs: for each epoch, the mean decisions of every gate by name.
    """
    if not epochs:
        return {}
    return {
        name: torch.tensor(means) == 1
        for name, means in epochs[-1].items()
        if set(means) <= {0.0, 1.0} and all(epoch[name] == means for epoch in epochs)
    }
