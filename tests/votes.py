"""Chosen votes in place of those that training makes: which gates become final, and when, is then the same everywhere.

Which samples open a gate after some epochs hangs on the last bits of every sum before, so on the processor, its
libraries and the number of threads. What the votes decide, what the target allows of it, the cut and all training
around it stay real. In another process: `code=CAST`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.pruning import deciding
from fastgate.pruning.deciding import Deciding
from fastgate.pruning.decisions import Decisions, GateDecision

# the first epoch (from 1) in which all samples agree on the gates of the first and the last stage
AGREED_IN = 4

CAST = "from tests.votes import cast_votes; cast_votes()"


def vote(name: str, gates: int, epoch: int) -> list[float]:
    """The shares of samples that open each gate (channel) of a network of fastgate.models in an epoch (from 1).

    From AGREED_IN on all samples close the layers of the first stage and open those of the last one; of channels they
    open two of five there. They never agree on what is between.
    """
    stage = name.split(".", maxsplit=1)[0]
    if epoch < AGREED_IN or stage == "layer2":
        return [0.2 + 0.6 * (i + 1) / (gates + 1) for i in range(gates)]
    if gates == 1:
        return [0.0 if stage == "layer1" else 1.0]
    return [1.0 if i % 5 < 2 else 0.0 for i in range(gates)]


def cast_votes(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let every search see these votes, at the start of each epoch and where it decides over the training images."""
    find, decide = Deciding.unanimous, deciding.decide

    def find_by_vote(self: Deciding, epoch: int, means: Any, final: Mapping[str, Tensor]) -> Decisions:
        sizes = {name: len(cost) for name, cost in self._costs.items()}
        recent = range(1, epoch + 1)[-(self._config.commit_after or 1) :]
        return find(self, epoch, [{name: vote(name, gates, i) for name, gates in sizes.items()} for i in recent], final)

    def decide_by_vote(model: nn.Module, batches: Any, **options: Any) -> Decisions:
        asked = decide(model, batches, **options)
        means = {
            name: torch.tensor(vote(name, len(gate.open), AGREED_IN), dtype=torch.float64)
            for name, gate in asked.items()
        }
        return Decisions({name: GateDecision(mean, mean > 0.5) for name, mean in means.items()}, samples=asked.samples)

    set_attribute(Deciding, "unanimous", find_by_vote)
    set_attribute(deciding, "decide", decide_by_vote)
