"""What share of the network's cost was asked for, and what the compact network reached."""

from fastgate.reports.recipes import RecipeFacts
from fastgate.reports.runs import look_up
from fastgate.training.records import Rows

# cost -> where it stands in a summary's row, and its name
_COSTS = {"macs": ("macs", "MACs"), "params": ("parameters", "parameters"), "latency": ("latency_ms", "latency")}


def share_reached(recipe: RecipeFacts, rows: Rows) -> float | None:
    """The compact network's share of the unpruned one's cost, the one that the target is of; None where unknown.

    A share of latency is the one measured at the end, not the one that the search aimed at.
    """
    field, _ = _COSTS[recipe.cost]
    small, whole = look_up(rows, "compact", field), look_up(rows, "unpruned", field)
    return None if small is None or not whole else small / whole


def describe_target(recipe: RecipeFacts, reached: float | None) -> str:
    """Target and result in a few words; empty for a run that was given no target or has no gates."""
    if recipe.target is None or recipe.gating in (None, "none"):
        return ""
    came_to = "not known yet" if reached is None else f"{reached:.1%}"
    return f"asked for {100 * recipe.target:.4g}% of the {_COSTS[recipe.cost][1]}, reached {came_to}"
