"""Configuration of a search: its target, when gates are open, live and final, and its loss weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from fastgate import schedules
from fastgate.pruning.costs import COSTS

# the loss weights, in the order of :meth:`fastgate.GateSearch.weights`
WEIGHTS = ("polarization", "activation", "budget", "capacity")


class Phase(StrEnum):
    """The phase of a run."""

    OPEN = "open"  # gates are held open
    SEARCH = "search"  # gates are live
    SETTLED = "settled"  # every decision is final


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Configuration of a :class:`~fastgate.GateSearch`: target, phases (as fractions of the epochs) and loss weights.

    Weights are numbers or schedules over epochs, see :func:`fastgate.schedules.parse`.

    Attributes:
        target: cost of the compact network as a fraction of the whole network's; None for no target.
        cost: the cost that `target` refers to: "macs", "params", or "latency" (measured on this device).
        open_until: fraction of the epochs at which gates are released; until then they are held open.
        anneal_until: fraction of the epochs until which the target decreases linearly from 1 to `target`.
        settle_at: fraction of the epochs at which the remaining gates are decided; None: at the end, by `compact`.
        commit_after: number of epochs after which a gate becomes final if all samples agree; None: never early.
        polarization: weight of the polarization loss, which makes samples agree on each gate (Eq. 8 to 10, paper).
        activation: weight of the activation loss, the mean fraction of open gates (Eq. 10 and 11, paper).
        budget: weight of the squared distance of the current cost from the target.
        capacity: weight of the fraction of the gated parameters that is closed.
        round_to: channel counts of the compact network are multiples of this, or the full width; None: any.
        detach_gates: detach the input of every gate head, so that neither the gate losses nor the task loss sends
            gradients through it into the network. If false, as in the paper, they also train the network, and may
            spoil it when gates are released (bench/results/search).
        compact_training: whether closed parts of final gates are removed from the network during training.

    Raises `ValueError` for values that no search can honour.
    """

    target: float | None = 0.5
    cost: str = "macs"
    open_until: float = 0.1
    anneal_until: float = 0.25
    settle_at: float | None = 0.4
    commit_after: int | None = 5
    polarization: float | str = 1.0
    activation: float | str = 0.0
    budget: float | str = 16.0
    capacity: float | str = 0.1
    round_to: int | None = None
    detach_gates: bool = True
    compact_training: bool = True

    def __post_init__(self) -> None:
        if self.cost not in COSTS:
            raise ValueError(f"cost: expected one of {', '.join(COSTS)}, got {self.cost!r}")
        for name in ("target", "open_until", "anneal_until", "settle_at"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a fraction from 0 to 1, got {value}")
        for name in ("commit_after", "round_to"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name}: expected a positive integer or None, got {value}")
        if not self.open_until <= self.anneal_until <= (1 if self.settle_at is None else self.settle_at):
            raise ValueError(
                "open_until, anneal_until, settle_at: expected increasing fractions of the epochs, got "
                f"{self.open_until}, {self.anneal_until}, {self.settle_at}"
            )
        for name in WEIGHTS:
            value = getattr(self, name)
            schedules.parse(value)
            # a canonical form, so that equal configurations compare equal
            object.__setattr__(self, name, _number(value))

    def target_at(self, share: float) -> float | None:
        """The target at a fraction of the epochs: 1 while gates are held open, then decreasing linearly."""
        if self.target is None:
            return None
        fall = self.anneal_until - self.open_until
        done = 1.0 if fall <= 0 else min(max((share - self.open_until) / fall, 0.0), 1.0)
        return 1 + (self.target - 1) * (done if share >= self.open_until else 0.0)

    def check_saved(self, config: Mapping[str, Any], epochs: int, saved_epochs: int) -> None:
        """Raise `ValueError` if a search was saved with another configuration or number of epochs."""
        ours = {"epochs": epochs, **asdict(self)}
        # states saved before `detach_gates` existed lack it
        theirs = {"epochs": saved_epochs, "detach_gates": False, **config}
        if odd := [name for name in ours if ours[name] != theirs.get(name)]:
            raise ValueError(
                f"state: expected the state of a search with the same epochs and config, got another {', '.join(odd)}: "
                f"{', '.join(f'{name}={theirs.get(name)!r}' for name in odd)}; create the search with these"
            )


def _number(value: float | str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value
