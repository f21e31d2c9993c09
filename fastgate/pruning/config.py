"""What a search is asked for: its target, when gates are open, live and final, and what its losses weigh."""

from dataclasses import dataclass
from enum import StrEnum

from fastgate import schedules
from fastgate.pruning.costs import COSTS

# the fields that are weights of losses, in the order of :meth:`fastgate.GateSearch.weights`
WEIGHTS = ("polarization", "activation", "budget", "capacity")


class Phase(StrEnum):
    """Where a run is in its life."""

    OPEN = "open"  # gates are held open
    SEARCH = "search"  # gates are live
    SETTLED = "settled"  # every decision is final


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """When gates are open, live and final, as shares of the epochs, and what the search weighs.

    Weights are numbers or schedules over epochs, see :func:`fastgate.schedules.parse`.

    Attributes:
        target: share of the whole network's cost that the compact network has; None for no target.
        cost: what the target is a share of: "macs", "params", or "latency" (measured on this device).
        open_until: gates are held open for this share of the epochs.
        anneal_until: the target falls linearly from 1 to `target` until this share of the epochs.
        settle_at: what is still undecided is decided at this share of the epochs; None: at the end, by `compact`.
        commit_after: a gate is final earlier, once all samples of this many epochs agree; None: no.
        polarization, activation: weights of these losses (Eq. 10 of the paper).
        budget: weight of the squared distance from the target.
        capacity: weight of the share of parameters that gates close.
        round_to: channel counts of the compact network are multiples of it, or the full width; None: any.
        compact_training: whether what final gates closed leaves the network during training.

    Raises `ValueError` for what no search could honour.
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
    compact_training: bool = True

    def __post_init__(self) -> None:
        if self.cost not in COSTS:
            raise ValueError(f"cost: expected one of {', '.join(COSTS)}, got {self.cost!r}")
        for name in ("target", "open_until", "anneal_until", "settle_at"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a share from 0 to 1, got {value}")
        for name in ("commit_after", "round_to"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name}: expected a positive whole number or None, got {value}")
        if not self.open_until <= self.anneal_until <= (1 if self.settle_at is None else self.settle_at):
            raise ValueError(
                "open_until, anneal_until, settle_at: expected increasing shares of the epochs, got "
                f"{self.open_until}, {self.anneal_until}, {self.settle_at}"
            )
        for name in WEIGHTS:
            value = getattr(self, name)
            schedules.parse(value)
            # one spelling of a number, so that equal configurations are equal
            object.__setattr__(self, name, _number(value))

    def target_at(self, share: float) -> float | None:
        """The target at a share of the epochs: 1 while gates are held open, then falling linearly."""
        if self.target is None:
            return None
        fall = self.anneal_until - self.open_until
        done = 1.0 if fall <= 0 else min(max((share - self.open_until) / fall, 0.0), 1.0)
        return 1 + (self.target - 1) * (done if share >= self.open_until else 0.0)


def _number(value: float | str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value
