"""Decisions that meet a target for the cost: what the samples are least sure of is opened or closed for it."""

import math
from collections.abc import Container, Iterable, Mapping
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgate.losses import under_layers
from fastgate.pruning.decisions import Decisions, GateDecision

# layer gates: what fewer samples than this disagree on is not given up for the target's sake while it is near enough
_DISSENT = 0.01
# channel gates: what is near enough to a target, as a share of the target; coarser where channels go by the dozen
_TOLERANCE, _ROUNDED_TOLERANCE = 0.005, 0.01
# channel gates: how many entries of equal cost on either side of the ranking's border may be decided otherwise, or as
# many as cost what the most expensive entry does, a layer, if that is more
_WINDOW = 32
# sums times entries that are looked at in one step
_STEP = 20_000_000
# layers around channels: so many that samples are least sure of are tried the other way where the target is missed
_FLIPS = 8
# sums of costs that are told apart while looking for a target; the sums of layers of a ResNet are far fewer
_SUMS = 1_000_000

# the entry of channels that stay open whatever is chosen
_ALWAYS_OPEN = -1


def lowest_share(costs: Mapping[str, Tensor], total: int, round_to: int | None = None) -> float:
    """The smallest share of the cost that :func:`meet_target` can reach.

    Layer gates are closed then, and of channel gates one channel is open (with `round_to` that many, or all there are),
    unless a closed layer closes them.

    Args:
        costs: what each gate (channel) switches, int64 `[gates]`, from :func:`fastgate.gate_costs`.
        total: what the network costs with everything open.
        round_to: see :func:`meet_target`.
    """
    step = _step(round_to)
    within = _within(costs)
    kept = [
        int(cost.sort().values[:step].sum()) for name, cost in costs.items() if len(cost) > 1 and name not in within
    ]
    return (total - sum(int(cost.sum()) for cost in costs.values()) + sum(kept)) / total


def check_target(costs: Mapping[str, Tensor], target: float, total: int, round_to: int | None = None) -> None:
    """Raise `ValueError`, with the range that can be reached, where no choice reaches the target."""
    lowest = lowest_share(costs, total, round_to)
    if not lowest <= target <= 1:
        kept = "is not gated" if round_to is None else f"is not gated, or kept for round_to={round_to}"
        raise ValueError(
            f"target: expected {math.ceil(lowest * 1e4) / 1e4:.4f} to 1 of the network's cost (less {kept}), got "
            f"{target}"
        )


def meet_target(
    decisions: Decisions,
    costs: Mapping[str, Tensor],
    target: float,
    total: int,
    *,
    held: Container[str] = (),
    round_to: int | None = None,
) -> Decisions:
    """Open and close as little as possible against the samples so that the compact network meets a target.

    Every sample votes for or against the cost of every gate (channel): a choice is worth the sum of
    cost * (2 * mean - 1) over what it opens, less the cost by which it misses the target. Of all choices that are near
    enough the one worth most is taken. So what costs the same is ranked by mean openness, and between equal means the
    earlier one stays open; where samples are divided the target decides; what they agree on is given up only to get
    near enough.

    * Layer gates: the nearest sum that whole layers can reach without giving up what 99 % of the samples agree on. Only
      where that is off by more than half the cost of the most expensive block are such decisions given up, the cheapest
      in votes that come so near. (Closing whatever comes nearest took two blocks that every image held open: 71 %
      instead of 77 % validation accuracy after 7 of 8 epochs: bench/results/search.)
    * Channel gates: near enough is 0.5 % of the target. Each gate keeps its channel of the highest mean, since without
      any channel more would go than the costs say. Up to 32 channels of equal cost on either side of the ranking's
      border (or as many as make up for a layer) may leave the ranking for the target's sake, far more than networks
      need.
    * Layer gates around channel gates (`within` of the costs): as most samples say. Only where no choice of channels
      comes to the target, the open ones of the lowest mean are closed, or the closed ones of the highest mean opened;
      then those that samples are least sure of are tried the other way, while that comes nearer. Channels of closed
      layers are closed.
    * Channel gates with `round_to`: each gate keeps a multiple of it, at least one, or all of its channels: of 20 and
      `round_to=8` 8, 16 or 20, of 6 all. Which ones is a matter of their means, how many of votes: the channels of a
      gate come and go by rank, `round_to` at a time, and each such group has the votes of its channels. So a gate whose
      samples agree on some other number gives up what has least votes against it, as where the target asks for it.
      Near enough is 1 % of the target. Layer gates are decided as without it.

    Where nothing is near enough, the nearest is taken.

    Args:
        decisions: of every gate, from :func:`decide`.
        costs: what each gate (channel) switches, int64 `[gates]`, from :func:`fastgate.gate_costs`.
        target: wanted share of `total`.
        total: what the network costs with everything open, from :func:`fastgate.macs` or `costs.total`.
        held: names of gates whose decision is final; they keep it, rounded or not.
        round_to: what the numbers of open channels are multiples of; None: any number.

    Raises:
        ValueError: costs of other gates, a target that no choice reaches (the message names the reachable range), or a
            `round_to` below 1.
    """
    if {name: len(g.open) for name, g in decisions.items()} != {name: len(cost) for name, cost in costs.items()}:
        raise ValueError(
            f"costs: expected those of the {len(decisions)} gates decided on, got {len(costs)} of other names or "
            "sizes; compute them for this model with fastgate.gate_costs(model, inputs)"
        )
    check_target(costs, target, total, round_to)
    return _meet_target(decisions, costs, target, total, held, round_to, _FLIPS)


def _meet_target(
    decisions: Decisions,
    costs: Mapping[str, Tensor],
    target: float,
    total: int,
    held: Container[str],
    round_to: int | None,
    flips: int,
) -> Decisions:
    """See :func:`meet_target`; `flips`: how many layers around channels are tried the other way, alone and in pairs."""
    within = _within(costs)
    if not within:
        return _choose_free(decisions, costs, target, total, held, round_to)

    def meet(layers: dict[str, bool]) -> tuple[tuple[float, float], Decisions]:
        """The choice with these layers, and how bad it is: what it misses too much of, then the votes against it."""
        decided = _close_within(decisions, layers, within)
        fixed = {name for name, g in decided.items() if name in held or g is not decisions[name]}
        met = _choose_free(decided, costs, target, total, fixed, round_to)
        opened = under_layers({name: gate.open for name, gate in met.items()}, within)
        cost = total - sum(int(each[~opened[name]].sum()) for name, each in costs.items())
        against = sum(abs(float(decisions[name].mean) - float(flag)) for name, flag in layers.items())
        return (max(abs(cost - target * total) - _near_enough(costs, target, total, round_to), 0.0), against), met

    layers = _choose_outer(decisions, costs, within, target * total - total, held, _step(round_to))
    badness, best = meet(layers)
    unsure = sorted((name for name in layers if name not in held), key=lambda n: abs(float(decisions[n].mean) - 0.5))
    while badness[0] > 0:
        groups = [group for size in (1, 2) for group in combinations(unsure[:flips], size)]
        flipped = [{**layers, **{name: not layers[name] for name in group}} for group in groups]
        tried = [(*meet(each), each) for each in flipped]
        nearer = min(tried, key=lambda one: one[0], default=None)
        if nearer is None or nearer[0] >= badness:
            break
        badness, best, layers = nearer
    return best


def _choose_free(
    decisions: Decisions,
    costs: Mapping[str, Tensor],
    target: float,
    total: int,
    held: Container[str],
    round_to: int | None,
) -> Decisions:
    """See :func:`meet_target`, with the layers around channels among what is held."""
    arrays = {name: costs[name].numpy().astype(np.int64) for name in decisions}
    free = {name: g for name, g in decisions.items() if name not in held}
    entries, entry_of = _entries([(g.mean.numpy(), arrays[name]) for name, g in free.items()], _step(round_to))
    spent = sum(int(arrays[name][g.open.numpy()].sum()) for name, g in decisions.items() if name not in free)
    spent += sum(int(arrays[name][of == _ALWAYS_OPEN].sum()) for name, of in zip(free, entry_of, strict=True))
    wanted = target * total - (total - sum(int(cost.sum()) for cost in arrays.values())) - spent
    near_enough = _near_enough(costs, target, total, round_to)
    if all(len(cost) == 1 for cost in costs.values()):
        opened = _choose_layers(entries, wanted, near_enough)
    else:
        opened = _choose(entries, wanted, near_enough, _WINDOW)
    flags = np.append(opened, True)  # the last one is what _ALWAYS_OPEN, -1, points to
    chosen = {name: torch.from_numpy(flags[of]) for name, of in zip(free, entry_of, strict=True)}
    gates = {name: GateDecision(g.mean, chosen.get(name, g.open), g.rows) for name, g in decisions.items()}
    return Decisions(gates, decisions.threshold, decisions.samples)


def _within(costs: Mapping[str, Tensor]) -> Mapping[str, str]:
    within: Mapping[str, str] = getattr(costs, "within", {})
    return within


def _choose_outer(
    decisions: Decisions,
    costs: Mapping[str, Tensor],
    within: Mapping[str, str],
    wanted: float,
    held: Container[str],
    step: int,
) -> dict[str, bool]:
    """Which of the layers around channel gates to open, by name.

    Args:
        decisions, costs, within, held: as for :func:`meet_target`.
        wanted: what the compact network shall cost more than with everything open.
        step: channels that come and go together.
    """
    layers = {
        name: bool(g.open) if name in held else bool(g.mean > 0.5)
        for name, g in decisions.items()
        if name in within.values()
    }

    wholes = {name: int(cost.sum()) for name, cost in costs.items()}
    # the most and the least that each gate can take away while the layer around it is open
    ranges = {}
    for name, cost in costs.items():
        if name in layers:
            ranges[name] = 0, 0
        elif name in held:
            closed = int(cost[~decisions[name].open].sum())
            ranges[name] = closed, closed
        else:
            kept = int(cost.sort().values[:step].sum()) if len(cost) > 1 else 0
            ranges[name] = wholes[name] - kept, 0

    def reach() -> tuple[int, int]:
        """The lowest and the highest cost with these layers, less that of everything open."""
        lowest = highest = 0
        for name, whole in wholes.items():
            most, least = ranges[name] if layers.get(within.get(name, name), True) else (whole, whole)
            lowest, highest = lowest - most, highest - least
        return lowest, highest

    free = sorted((name for name in layers if name not in held), key=lambda name: float(decisions[name].mean))
    for name in free:
        if layers[name] and reach()[0] > wanted:
            layers[name] = False
    for name in reversed(free):
        if not layers[name] and reach()[1] < wanted:
            layers[name] = True
    return layers


def _close_within(decisions: Decisions, layers: Mapping[str, bool], within: Mapping[str, str]) -> Decisions:
    """The decisions with these of layers, and the channels in closed ones closed."""
    decided = dict(decisions)
    for name, g in decisions.items():
        around = within.get(name)
        if name in layers:
            decided[name] = GateDecision(g.mean, torch.tensor([layers[name]]), g.rows)
        elif around is not None and not layers[around]:
            # as open as the layer is
            decided[name] = GateDecision(g.mean * decisions[around].mean, torch.zeros_like(g.open), g.rows)
    return Decisions(decided, decisions.threshold, decisions.samples)


def within_reach(
    found: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    costs: Mapping[str, Tensor],
    target: float,
    total: int,
    *,
    round_to: int | None = None,
) -> dict[str, Tensor]:
    """Those of the decisions found that can become final, in order, while the target stays within reach.

    Never among them is a decision that :func:`meet_target` would not take: a channel gate without any open channel, or
    with a number of them that `round_to` rules out. Such a gate stays alive until the target decides.

    Args:
        found, held: decisions to be made final, and final ones: bool `[gates]` by gate.
        costs, target, total, round_to: see :func:`meet_target`.
    """
    reach: dict[str, Tensor] = {}
    step = _step(round_to)
    nearest = _miss(held, costs, target, total, round_to)
    for name, opened in found.items():
        kept = int(opened.sum())
        possible = len(opened) == 1 or kept == len(opened) or (kept > 0 and kept % step == 0)
        if possible and _miss({**held, **reach, name: opened}, costs, target, total, round_to) <= nearest:
            reach[name] = opened
    return reach


def _step(round_to: int | None) -> int:
    """By how many the channels of a gate come and go."""
    if round_to is None:
        return 1
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to: expected a number of channels such as 8 or 16, or None, got {round_to!r}")
    return round_to


def _near_enough(costs: Mapping[str, Tensor], target: float, total: int, round_to: int | None) -> float:
    """How much of the cost the target may be missed by."""
    if all(len(cost) == 1 for cost in costs.values()):
        return max((int(cost) for cost in costs.values()), default=0) / 2
    return (_TOLERANCE if round_to is None else _ROUNDED_TOLERANCE) * target * total


def _miss(
    held: Mapping[str, Tensor], costs: Mapping[str, Tensor], target: float, total: int, round_to: int | None
) -> float:
    """How much more than is near enough the nearest choice misses the target by, with these gates held."""
    undecided = {
        name: GateDecision(torch.full(cost.shape, 0.5, dtype=torch.float64), held.get(name, torch.ones_like(cost) == 1))
        for name, cost in costs.items()
    }
    met = _meet_target(Decisions(undecided), costs, target, total, held, round_to, 0)
    opened = under_layers({name: gate.open for name, gate in met.items()}, _within(costs))
    closed = sum(int(cost[~opened[name]].sum()) for name, cost in costs.items())
    return max(abs(total - closed - target * total) - _near_enough(costs, target, total, round_to), 0.0)


class _Entries(NamedTuple):
    """What can be opened or closed: layers, channels, or groups of a gate's channels; `[entries]` each.

    Attributes:
        mean: share of samples for it.
        cost: what it switches, int64.
        votes: sum of cost * (2 * mean - 1) over its channels.
        chain: of the entries in a chain those of the highest means are opened, however many. What costs the same is a
            chain. (The last group of a gate may be a smaller one, which must not be opened before the others: such a
            gate is a chain of its own.)
    """

    mean: np.ndarray
    cost: np.ndarray
    votes: np.ndarray
    chain: np.ndarray

    def at(self, which: np.ndarray) -> "_Entries":
        return _Entries(*(values[which] for values in self))


def _entries(gates: Iterable[tuple[np.ndarray, np.ndarray]], step: int) -> tuple[_Entries, list[np.ndarray]]:
    """Entries of gates with these means and costs, and for each gate the entry of each of its channels.

    Channels that stay open whatever is chosen, the best `step` of a channel gate, have the entry `_ALWAYS_OPEN`.
    """
    none = np.empty(0, dtype=np.int64)
    parts, entry_of, count = [_Entries(none.astype(float), none, none.astype(float), none)], [], 0
    for number, (mean, cost) in enumerate(gates):
        group = np.empty(len(mean), dtype=np.int64)
        group[np.argsort(-mean, kind="stable")] = np.arange(len(mean)) // step
        group -= len(mean) > 1
        free = group != _ALWAYS_OPEN
        sizes, costs, votes, means = (
            np.bincount(group[free], weights)
            for weights in (None, cost[free], (cost * (2 * mean - 1))[free], mean[free])
        )
        costs = costs.astype(np.int64)
        alike = step == 1 or (costs == costs[:1]).all()
        # never above that of the group before, not even by a rounding
        means = np.minimum.accumulate(means / sizes)
        parts.append(_Entries(means, costs, votes, costs if alike else np.full(len(costs), -1 - number)))
        entry_of.append(np.where(free, group + count, _ALWAYS_OPEN))
        count += len(costs)
    return _Entries(*map(np.concatenate, zip(*parts, strict=True))), entry_of


def _choose_layers(layers: _Entries, wanted: float, near_enough: float) -> np.ndarray:
    """Which layers to open, bool: what samples agree on stays if the rest can come near enough, else see `_choose`."""
    mean, cost = layers.mean, layers.cost
    opened = mean > 0.5
    rest = (mean > _DISSENT) & (mean < 1 - _DISSENT)
    opened[rest] = _choose(layers.at(rest), wanted - cost[opened & ~rest].sum(), 0.0, len(mean))
    if abs(cost[opened].sum() - wanted) <= near_enough:
        return opened
    return _choose(layers, wanted, near_enough, len(mean))


def _choose(entries: _Entries, wanted: float, near_enough: float, window: int) -> np.ndarray:
    """Which entries to open, bool, for a sum of costs near `wanted`; see :func:`meet_target` for the rule.

    Dynamic programming over the chains: of each the k entries with the highest means are opened, so a choice is one k
    per chain, and of all choices with the same sum only the best is followed.
    """
    mean, cost, votes_of, chain = entries
    ranking = np.argsort(-mean, kind="stable")
    prefix = ranking[: int(np.searchsorted(np.cumsum(cost[ranking]), wanted))]
    resolution = max(1, int(cost.sum()) // _SUMS)
    sums, votes = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps = []
    for each in np.unique(chain):
        members = ranking[chain[ranking] == each]
        border = int((chain[prefix] == each).sum())
        reach = max(window, -(-int(cost.max()) // max(int(cost[members].min()), 1)))
        reach = min(reach, max(window, _STEP // (2 * len(sums))))
        counts = np.arange(max(border - reach, 0), min(border + reach, len(members)) + 1)
        spent = np.append(0, np.cumsum(cost[members]))[counts]
        gained = np.append(0.0, np.cumsum(votes_of[members]))[counts]
        sums, votes = (sums[:, None] + spent).ravel(), (votes[:, None] + gained).ravel()
        # of choices with the same sum the one with the most votes; sums are merged only where there are very many
        key = sums if len(sums) <= _SUMS else sums // resolution
        order = np.lexsort((-votes, key))
        best = order[np.unique(key[order], return_index=True)[1]]
        sums, votes = sums[best], votes[best]
        steps.append((members, counts, best))
    missed = np.abs(sums - wanted)
    at = np.lexsort((sums, missed - votes, np.maximum(missed - near_enough, 0)))[0]
    opened = np.zeros(len(mean), dtype=bool)
    for members, counts, best in reversed(steps):
        at, k = divmod(best[at], len(counts))
        opened[members[: counts[k]]] = True
    return opened
