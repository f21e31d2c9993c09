"""Decisions that meet a MAC target: what the samples are least sure of is opened or closed for it."""

import math
from collections.abc import Container, Mapping

import numpy as np
import torch
from torch import Tensor

from fastgate.pruning.decisions import Decisions, GateDecision

# layer gates: what fewer samples than this disagree on is not given up for the target's sake while it is near enough
_DISSENT = 0.01
# channel gates: what is near enough to a MAC target, as a share of the target
_TOLERANCE = 0.005
# channel gates: how many channels of equal cost on either side of the ranking's border may be decided otherwise
_WINDOW = 32
# sums of costs that are told apart while looking for a target; the sums of layers of a ResNet are far fewer
_SUMS = 1_000_000

_FREE, _OPEN = -1, 1


def lowest_share(costs: Mapping[str, Tensor], total: int) -> float:
    """The smallest MAC share that :func:`meet_target` can reach: layer gates closed, of channel gates one channel open.

    Args:
        costs: MACs that each gate (channel) switches, int64 `[gates]`, from :func:`fastgate.gate_costs`.
        total: MACs of the network with everything open.
    """
    closable = [int(cost.sum()) - (int(cost.min()) if len(cost) > 1 else 0) for cost in costs.values()]
    return (total - sum(closable)) / total


def meet_target(
    decisions: Decisions, costs: Mapping[str, Tensor], target: float, total: int, *, held: Container[str] = ()
) -> Decisions:
    """Open and close as little as possible against the samples so that the compact network meets a MAC target.

    Every sample votes for or against the MACs of every gate (channel): a choice is worth the sum of
    cost * (2 * mean - 1) over what it opens, less the MACs by which it misses the target. Of all choices that are near
    enough the one worth most is taken. So what costs the same is ranked by mean openness, and between equal means the
    earlier one stays open; where samples are divided the target decides; what they agree on is given up only to get
    near enough.

    * Layer gates: the nearest sum that whole layers can reach without giving up what 99 % of the samples agree on. Only
      where that is off by more than half the MACs of the most expensive block are such decisions given up, the cheapest
      in votes that come so near. (Closing whatever comes nearest took two blocks that every image held open: 71 %
      instead of 77 % validation accuracy after 7 of 8 epochs: bench/results/search.)
    * Channel gates: near enough is 0.5 % of the target. Each gate keeps its channel of the highest mean, since without
      any channel more would go than the costs say. Up to 32 channels of equal cost on either side of the ranking's
      border may leave the ranking for the target's sake, which is far more than networks need.

    Where nothing is near enough, the nearest is taken.

    Args:
        decisions: of every gate, from :func:`decide`.
        costs: MACs that each gate (channel) switches, int64 `[gates]`, from :func:`fastgate.gate_costs`.
        target: wanted share of `total`.
        total: MACs of the network with everything open, from :func:`fastgate.macs`.
        held: names of gates whose decision is final.

    Raises:
        ValueError: costs of other gates, or a target that no choice reaches; the message names the reachable range.
    """
    if {name: len(g.open) for name, g in decisions.items()} != {name: len(cost) for name, cost in costs.items()}:
        raise ValueError(
            f"costs: expected those of the {len(decisions)} gates decided on, got {len(costs)} of other names or "
            "sizes; compute them for this model with fastgate.gate_costs(model, inputs)"
        )
    lowest = lowest_share(costs, total)
    if not lowest <= target <= 1:
        raise ValueError(
            f"target: expected {math.ceil(lowest * 1e4) / 1e4:.4f} to 1 of the network's MACs (less is not gated), got "
            f"{target}"
        )
    chosen = {name: _fixed(g, name in held) for name, g in decisions.items()}
    fixed = np.concatenate(list(chosen.values()))
    cost = torch.cat([costs[name] for name in decisions]).numpy().astype(np.int64)
    mean = torch.cat([g.mean for g in decisions.values()]).numpy()
    free = np.flatnonzero(fixed == _FREE)
    wanted = target * total - (total - cost.sum()) - cost[fixed == _OPEN].sum()
    layers = all(len(g.open) == 1 for g in decisions.values())
    near_enough = _near_enough(costs, target, total)
    if layers:
        fixed[free] = _choose_layers(mean[free], cost[free], wanted, near_enough)
    else:
        fixed[free] = _choose(mean[free], cost[free], wanted, near_enough, _WINDOW)
    parts = torch.from_numpy(fixed == _OPEN).split([len(g.open) for g in decisions.values()])
    gates = {name: GateDecision(g.mean, part, g.rows) for (name, g), part in zip(decisions.items(), parts, strict=True)}
    return Decisions(gates, decisions.threshold, decisions.samples)


def within_reach(
    found: Mapping[str, Tensor], held: Mapping[str, Tensor], costs: Mapping[str, Tensor], target: float, total: int
) -> dict[str, Tensor]:
    """Those of the decisions found that can become final, in order, while the target stays within reach.

    A channel gate without any open channel is never among them: :func:`meet_target` opens one.

    Args:
        found, held: decisions to be made final, and final ones: bool `[gates]` by gate.
        costs, target, total: see :func:`meet_target`.
    """
    reach: dict[str, Tensor] = {}
    nearest = _miss(held, costs, target, total)
    for name, opened in found.items():
        empty = len(opened) > 1 and not opened.any()
        if not empty and _miss({**held, **reach, name: opened}, costs, target, total) <= nearest:
            reach[name] = opened
    return reach


def _near_enough(costs: Mapping[str, Tensor], target: float, total: int) -> float:
    """How much of the cost the target may be missed by."""
    if all(len(cost) == 1 for cost in costs.values()):
        return max((int(cost) for cost in costs.values()), default=0) / 2
    return _TOLERANCE * target * total


def _miss(held: Mapping[str, Tensor], costs: Mapping[str, Tensor], target: float, total: int) -> float:
    """How many MACs more than is near enough the nearest choice misses the target by, with these gates held."""
    undecided = {
        name: GateDecision(torch.full(cost.shape, 0.5, dtype=torch.float64), held.get(name, torch.ones_like(cost) == 1))
        for name, cost in costs.items()
    }
    met = meet_target(Decisions(undecided), costs, target, total, held=held)
    closed = sum(int(cost[~met[name].open].sum()) for name, cost in costs.items())
    return max(abs(total - closed - target * total) - _near_enough(costs, target, total), 0.0)


def _fixed(gate: GateDecision, held: bool) -> np.ndarray:
    """Per entry: 0 closed and 1 open for good, -1 free. A channel gate keeps its best channel."""
    if held:
        return gate.open.numpy().astype(np.int8)
    fixed = np.full(len(gate.open), _FREE, dtype=np.int8)
    if len(fixed) > 1:
        fixed[int(gate.mean.argmax())] = _OPEN
    return fixed


def _choose_layers(mean: np.ndarray, cost: np.ndarray, wanted: float, near_enough: float) -> np.ndarray:
    """Which layers to open, bool: what samples agree on stays if the rest can come near enough, else see `_choose`."""
    opened = mean > 0.5
    rest = (mean > _DISSENT) & (mean < 1 - _DISSENT)
    opened[rest] = _choose(mean[rest], cost[rest], wanted - cost[opened & ~rest].sum(), 0.0, len(mean))
    if abs(cost[opened].sum() - wanted) <= near_enough:
        return opened
    return _choose(mean, cost, wanted, near_enough, len(mean))


def _choose(mean: np.ndarray, cost: np.ndarray, wanted: float, near_enough: float, window: int) -> np.ndarray:
    """Which entries to open, bool, for a sum of costs near `wanted`; see :func:`meet_target` for the rule.

    Dynamic programming over the distinct costs: of n entries of equal cost the k with the highest means are opened, so
    a choice is one k per cost, and of all choices with the same sum only the best is followed.
    """
    ranking = np.argsort(-mean, kind="stable")
    prefix = ranking[: int(np.searchsorted(np.cumsum(cost[ranking]), wanted))]
    resolution = max(1, int(cost.sum()) // _SUMS)
    sums, votes = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps = []
    for each in np.unique(cost):
        members = ranking[cost[ranking] == each]
        border = int((cost[prefix] == each).sum())
        counts = np.arange(max(border - window, 0), min(border + window, len(members)) + 1)
        gained = np.append(0.0, np.cumsum(each * (2 * mean[members] - 1)))[counts]
        sums, votes = (sums[:, None] + each * counts).ravel(), (votes[:, None] + gained).ravel()
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
