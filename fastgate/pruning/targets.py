"""Decisions that meet a cost target: the gates on which samples agree least are opened or closed for it."""

import math
from collections.abc import Container, Iterable, Mapping
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgate.losses import under_layers
from fastgate.pruning.costs import Costs
from fastgate.pruning.decisions import Decisions, GateDecision

# layer gates: a decision from which less than this fraction of samples dissents is not overruled if the target can be
# met otherwise
_DISSENT = 0.01
# the mean of the gate that matters most, where importance takes the place of votes, is below 1 - _DISSENT
_UNSURE = 0.48
# channel gates: tolerance relative to the target; coarser if channels come in groups (`round_to`)
_TOLERANCE, _ROUNDED_TOLERANCE = 0.005, 0.01
# channel gates: number of entries of equal cost on either side of the cutoff in the ranking that may be decided against
# it, or as many as cost as much as the most expensive entry, a layer, if that is more
_WINDOW = 32
# limit on sums times entries in one step of the dynamic program
_STEP = 20_000_000
# layers around channels: number of least certain layers that are flipped if the target is missed
_FLIPS = 8
# limit on distinct cost sums in the dynamic program; layers of a ResNet have far fewer
_SUMS = 1_000_000

# the entry of channels that are always open
_ALWAYS_OPEN = -1


def lowest_share(costs: Mapping[str, Tensor], total: int, round_to: int | None = None) -> float:
    """The smallest fraction of the cost that :func:`meet_target` can reach.

    There, layer gates are closed, and every channel gate has one open channel (or `round_to`, or all if it has fewer)
    unless a closed layer closes it.

    Args:
        costs: cost of each gate (channel), int64 `[gates]`, from :func:`fastgate.gate_costs`.
        total: cost of the network with everything open.
        round_to: see :func:`meet_target`.
    """
    step = _step(round_to)
    within = _within(costs)
    kept = [
        int(cost.sort().values[:step].sum()) for name, cost in costs.items() if len(cost) > 1 and name not in within
    ]
    return (total - sum(int(cost.sum()) for cost in costs.values()) + sum(kept)) / total


def check_costs(costs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
    """Raise `ValueError` if the costs are not those of gates with these sizes."""
    if sizes != {name: len(cost) for name, cost in costs.items()}:
        raise ValueError(
            f"costs: expected the costs of the {len(sizes)} gates decided on, got {len(costs)} with other names or "
            "sizes; compute them for this model with fastgate.gate_costs(model, inputs)"
        )


def check_target(costs: Mapping[str, Tensor], target: float, total: int, round_to: int | None = None) -> None:
    """Raise `ValueError` with the reachable range if no choice reaches the target."""
    lowest = lowest_share(costs, total, round_to)
    if not lowest <= target <= 1:
        kept = "is not gated" if round_to is None else f"is not gated, or kept for round_to={round_to}"
        raise ValueError(
            f"target: expected {math.ceil(lowest * 1e4) / 1e4:.4f} to 1 of the network's cost (the rest {kept}), got "
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
    importance: Mapping[str, Tensor] | None = None,
) -> Decisions:
    """Change decisions so that the compact network meets a target, overruling the samples as little as possible.

    Every sample votes for or against each gate (channel), weighted by cost: the score of a choice is the sum of
    cost * (2 * mean - 1) over everything open, minus the cost by which it misses the target. The choice with the best
    score within tolerance is taken. Gates of equal cost are therefore ranked by mean decision (ties: the earlier one
    stays open); if samples are divided, the target decides; decisions on which they agree are overruled only to get
    within tolerance.

    * Layer gates: the tolerance is half the cost of the most expensive block. Decisions on which 99 % of the samples
      agree are overruled only if no other choice is within it. (Taking the sum closest to the target closed two blocks
      that every image held open, 71 % instead of 77 % validation accuracy after 7 of 8 epochs, and a downsampling block
      that 88 % held open, 75.8 % instead of 80.4 % test accuracy: bench/results/search.) With the `importance` of
      gates, these are their votes instead: of the gates that samples hold open, those on which the outputs depend least
      are closed, however many samples agree; the tolerance is then half the cost of an average block.
    * Channel gates: the tolerance is 0.5 % of the target. Each gate keeps its channel with the highest mean, since
      removing all channels would save more than the costs say. Up to 32 channels of equal cost on either side of the
      cutoff in the ranking (or as many as cost as much as a layer) may be decided against the ranking to meet the
      target, far more than networks need.
    * Layer gates around channel gates (`within` of the costs): the majority of samples decides. Only if no choice of
      channels reaches the target are the open layers of the lowest mean closed, or the closed ones of the highest mean
      opened; then the least certain layers are flipped as long as that gets closer. Channels of closed layers are
      closed.
    * Channel gates with `round_to`: each gate keeps a multiple of it, at least one, or all of its channels: 8, 16 or 20
      of 20 channels with `round_to=8`, and all of 6. The means determine which channels, the votes how many: the
      channels of a gate open and close in order of rank, in groups of `round_to`, and each group has the votes of its
      channels. If samples agree on another number, the group with the fewest votes against it is changed, as for a
      target. The tolerance is 1 % of the target. Layer gates are decided as without it.

    If no choice is within tolerance, the closest is taken.

    Args:
        decisions: decisions of every gate, from :func:`decide`.
        costs: cost of each gate (channel), int64 `[gates]`, from :func:`fastgate.gate_costs`.
        target: desired fraction of `total`.
        total: cost of the network with everything open, from :func:`fastgate.macs` or `costs.total`.
        held: names of gates with final decisions; these do not change, even with `round_to`.
        round_to: open channel counts are multiples of this; None: any number.
        importance: of the open layer gates, see :func:`fastgate.pruning.importance.layer_importance`; ignored if empty
            or not finite.

    Raises:
        ValueError: costs of other gates, a target that no choice reaches (the message names the reachable range), or a
            `round_to` below 1.
    """
    check_costs(costs, {name: len(g.open) for name, g in decisions.items()})
    check_target(costs, target, total, round_to)
    if not _within(costs):
        return _choose_free(decisions, costs, target, total, held, round_to, importance)
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
    """See :func:`meet_target`; `flips`: number of layers around channels to flip on trial, singly and in pairs."""
    within = _within(costs)
    if not within:
        return _choose_free(decisions, costs, target, total, held, round_to)

    def meet(layers: dict[str, bool]) -> tuple[tuple[float, float], Decisions]:
        """The choice with these layers, and its badness: the miss beyond the tolerance, then the votes against it."""
        decided = _close_within(decisions, layers, within)
        fixed = {name for name, g in decided.items() if name in held or g is not decisions[name]}
        met = _choose_free(decided, costs, target, total, fixed, round_to)
        opened = under_layers({name: gate.open for name, gate in met.items()}, within)
        cost = total - sum(int(each[~opened[name]].sum()) for name, each in costs.items())
        against = sum(abs(float(decisions[name].mean) - float(flag)) for name, flag in layers.items())
        return (max(abs(cost - target * total) - tolerance(costs, target, total, round_to), 0.0), against), met

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
    importance: Mapping[str, Tensor] | None = None,
) -> Decisions:
    """See :func:`meet_target`; layers around channels are in `held`."""
    arrays = {name: costs[name].numpy().astype(np.int64) for name in decisions}
    free = {name: g for name, g in decisions.items() if name not in held}
    entries, entry_of = _entries([(g.mean.numpy(), arrays[name]) for name, g in free.items()], _step(round_to))
    spent = sum(int(arrays[name][g.open.numpy()].sum()) for name, g in decisions.items() if name not in free)
    spent += sum(int(arrays[name][of == _ALWAYS_OPEN].sum()) for name, of in zip(free, entry_of, strict=True))
    wanted = target * total - (total - sum(int(cost.sum()) for cost in arrays.values())) - spent
    near_enough = tolerance(costs, target, total, round_to)
    if all(len(cost) == 1 for cost in costs.values()):
        layers = _by_importance(entries, free, importance)
        if layers is not entries:  # one outsized block must not widen the tolerance: half of an average one
            near_enough = sum(int(cost) for cost in costs.values()) / len(costs) / 2
        opened = _choose_layers(layers, wanted, near_enough)
    else:
        opened = _choose(entries, wanted, near_enough, _WINDOW)
    flags = np.append(opened, True)  # _ALWAYS_OPEN, -1, indexes the last one
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
    """Decide which layers around channel gates to open, by name.

    Args:
        decisions, costs, within, held: as for :func:`meet_target`.
        wanted: desired cost minus the cost with everything open.
        step: number of channels per group.
    """
    layers = {
        name: bool(g.open) if name in held else bool(g.mean > 0.5)
        for name, g in decisions.items()
        if name in within.values()
    }

    wholes = {name: int(cost.sum()) for name, cost in costs.items()}
    # the most and the least that each gate can save while the layer around it is open
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
        """The lowest and the highest cost with these layers, minus the cost with everything open."""
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
    """The decisions with these layer decisions, and with the channels of closed layers closed."""
    decided = dict(decisions)
    for name, g in decisions.items():
        around = within.get(name)
        if name in layers:
            decided[name] = GateDecision(g.mean, torch.tensor([layers[name]]), g.rows)
        elif around is not None and not layers[around]:
            # a channel is open only where its layer is
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
    """Select the new decisions that can become final, in order, such that the target stays within reach.

    Decisions that :func:`meet_target` would not make are excluded: a channel gate without open channels, or with a
    number of them that `round_to` rules out. Such a gate stays live until the target decides.

    Args:
        found, held: decisions to make final, and those already final: bool `[gates]` by gate.
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


def overruled(decisions: Decisions, costs: Costs) -> float:
    """The share of the network's cost that is closed although most samples held it open."""
    held = {name: gate.open | (gate.mean > 0.5) for name, gate in decisions.items()}
    return (costs.of(held) - costs.of({name: gate.open for name, gate in decisions.items()})) / costs.total


def _step(round_to: int | None) -> int:
    """Number of channels of a gate that open and close together."""
    if round_to is None:
        return 1
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to: expected a number of channels such as 8 or 16, or None, got {round_to!r}")
    return round_to


def tolerance(costs: Mapping[str, Tensor], target: float, total: int, round_to: int | None) -> float:
    """Tolerance: the cost by which the target may be missed."""
    if all(len(cost) == 1 for cost in costs.values()):
        return max((int(cost) for cost in costs.values()), default=0) / 2
    return (_TOLERANCE if round_to is None else _ROUNDED_TOLERANCE) * target * total


def _miss(
    held: Mapping[str, Tensor], costs: Mapping[str, Tensor], target: float, total: int, round_to: int | None
) -> float:
    """Cost by which the closest choice misses the target beyond the tolerance, with these gates held."""
    undecided = {
        name: GateDecision(torch.full(cost.shape, 0.5, dtype=torch.float64), held.get(name, torch.ones_like(cost) == 1))
        for name, cost in costs.items()
    }
    met = _meet_target(Decisions(undecided), costs, target, total, held, round_to, 0)
    opened = under_layers({name: gate.open for name, gate in met.items()}, _within(costs))
    closed = sum(int(cost[~opened[name]].sum()) for name, cost in costs.items())
    return max(abs(total - closed - target * total) - tolerance(costs, target, total, round_to), 0.0)


class _Entries(NamedTuple):
    """Units that can be opened or closed: layers, channels, or groups of a gate's channels; `[entries]` each.

    Attributes:
        mean: fraction of samples that vote for the entry.
        cost: its cost, int64.
        votes: sum of cost * (2 * mean - 1) over its channels.
        chain: chain id; however many entries of a chain are opened, they are those with the highest means. Entries of
            equal cost form a chain. (The last group of a gate may be smaller and must not be opened before the others:
            such a gate is a chain of its own.)
    """

    mean: np.ndarray
    cost: np.ndarray
    votes: np.ndarray
    chain: np.ndarray

    def at(self, which: np.ndarray) -> "_Entries":
        return _Entries(*(values[which] for values in self))


def _entries(gates: Iterable[tuple[np.ndarray, np.ndarray]], step: int) -> tuple[_Entries, list[np.ndarray]]:
    """Entries of gates with these means and costs, and for each gate the entry of each of its channels.

    Channels that are always open, the best `step` of a channel gate, have the entry `_ALWAYS_OPEN`.
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
        # never above that of the previous group, not even by rounding
        means = np.minimum.accumulate(means / sizes)
        parts.append(_Entries(means, costs, votes, costs if alike else np.full(len(costs), -1 - number)))
        entry_of.append(np.where(free, group + count, _ALWAYS_OPEN))
        count += len(costs)
    return _Entries(*map(np.concatenate, zip(*parts, strict=True))), entry_of


def _by_importance(layers: _Entries, names: Iterable[str], importance: Mapping[str, Tensor] | None) -> _Entries:
    """Layers whose votes are their importance, in units of cost: what is open costs as much as all of it matters."""
    if not importance:
        return layers
    opened = layers.mean > 0.5
    values = np.array([float(importance[name]) if keep else 0.0 for name, keep in zip(names, opened, strict=True)])
    if not np.isfinite(values).all() or not values.sum() > 0:
        return layers
    shares = values / values.sum()
    # any mean between those of closed gates and one: its order is that of the importance, and nothing is unanimous
    mean = np.where(opened, 0.5 + _UNSURE * shares, layers.mean)
    return layers._replace(mean=mean, votes=np.where(opened, layers.cost[opened].sum() * shares, layers.votes))


def _choose_layers(layers: _Entries, wanted: float, near_enough: float) -> np.ndarray:
    """Which layers to open, bool: where 99 % agree, decisions stay if the rest can come near enough; see `_choose`."""
    mean, cost = layers.mean, layers.cost
    opened = mean > 0.5
    rest = (mean > _DISSENT) & (mean < 1 - _DISSENT)
    opened[rest] = _choose(layers.at(rest), wanted - cost[opened & ~rest].sum(), near_enough, len(mean))
    if abs(cost[opened].sum() - wanted) <= near_enough:
        return opened
    return _choose(layers, wanted, near_enough, len(mean))


def _choose(entries: _Entries, wanted: float, near_enough: float, window: int) -> np.ndarray:
    """Which entries to open, bool, for a sum of costs near `wanted`; see :func:`meet_target` for the rule.

    Dynamic programming over the chains: in each, the k entries with the highest means are opened, so a choice is one k
    per chain, and among all choices with the same sum only the best is kept.
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
        # among choices with the same sum, keep the one with the most votes; merge sums only if there are very many
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
