"""Losses on gate decisions: differentiable scalars, computed from the decisions of a step's forward passes.

Each takes a model, an iterable of gates, or the result of :func:`gate_means` (so that several losses share it). The
paper's objective is Eq. 10: task + lambda_polar * polarization + lambda_act * activation.

If gates become final during a run, pass their decisions as `final`: name -> `[gates]`, bool or float. These gates count
as constants, whether they are frozen or have been removed from the network, so that the loss still covers all gates of
the run. Without `final`, a loss covers only the gates it is given.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fastgate.gates import Gate, named_gates
from fastgate.ops.dispatch import escaped
from fastgate.ops.synchronization import all_mean

GateSource = nn.Module | Iterable[Gate] | Iterable[tuple[str, Gate]] | Mapping[str, Tensor]


class GateMeans(dict[str, Tensor]):
    """Mean decisions by gate, `[gates]` each, as views of one vector.

    The losses use the vector: on a GPU, a few small operations per gate would cost more than the gate's block.

    Attributes:
        joined: all means, `[all gates]`.
    """

    def __init__(self, means: Mapping[str, Tensor]) -> None:
        self.joined = torch.cat(list(means.values()))
        parts = self.joined.split([len(mean) for mean in means.values()])
        super().__init__(zip(means, parts, strict=True))

    def over_gates(self, values: Tensor) -> Tensor:
        """Mean over gates of the mean over each gate's channels, for values `[all gates]`."""
        sizes = [len(mean) for mean in self.values()]
        if len(set(sizes)) == 1:
            return values.mean()
        return torch.stack([part.mean() for part in values.split(sizes)]).mean()


def gate_means(
    gates: GateSource, *, final: Mapping[str, Tensor] | None = None, order: Iterable[str] | None = None
) -> GateMeans:
    """Mean decision of each gate over its calls: name -> `[gates]`, float32 or wider, differentiable.

    In training, the mean covers every row of all calls since the last loss (a siamese network calls its gates twice per
    step; one that folds clips into the batch has more rows than samples); otherwise, of the last forward. Under
    :func:`fastgate.ops.synchronization.synchronized` it covers all processes.

    An iterable contains either gates, which are named by position ("0", "1", ...), or pairs as from `named_gates`.

    Args:
        gates: a model, an iterable of gates, or means to which final decisions are added.
        final: decisions of final gates, see :mod:`fastgate.losses`; not copied if on the gates' device.
        order: names of all gates in the order of the result, so that sums round alike whichever gates have been
            removed; None: the order of `gates`, then of `final`.

    Raises:
        ValueError: there are no gates, or one has not run yet; the graph of a live gate in training is gone, so that a
            loss would not train it; `order` names other gates.
    """
    means = gates if isinstance(gates, Mapping) else _means(gates)
    if final:
        like = next(iter(means.values()), torch.empty(0, device=next(iter(final.values())).device))
        means = {**means, **{name: decision.to(like) for name, decision in final.items()}}
    if not means:
        raise ValueError("expected a model with gates, got none; add them with fastgate.attach(model, 'layer')")
    return _ordered(means, list(means if order is None else order), "order")


def _ordered(means: Mapping[str, Tensor], names: list[str], what: str) -> GateMeans:
    if set(names) != means.keys():
        raise ValueError(
            f"{what}: expected the gates {', '.join(means)}, got {', '.join(names)}; name all gates of this model, and "
            "pass those removed from it as final="
        )
    if isinstance(means, GateMeans) and names == list(means):
        return means
    return GateMeans({name: means[name] for name in names})


def _means(gates: nn.Module | Iterable[Gate] | Iterable[tuple[str, Gate]]) -> Mapping[str, Tensor]:
    items = named_gates(gates) if isinstance(gates, nn.Module) else gates
    named: dict[str, Gate] = dict(item if isinstance(item, tuple) else (str(i), item) for i, item in enumerate(items))
    if not named:
        return {}
    decisions = {name: _rows(name, gate) for name, gate in named.items()}
    first = next(iter(decisions.values()))
    exact = torch.promote_types(first.dtype, torch.float32)  # a network's costs would overflow fp16
    if len({(len(rows), rows.dtype, rows.device) for rows in decisions.values()}) > 1:
        return GateMeans(
            {name: all_mean(rows.mean(0, dtype=exact).to(first.device)) for name, rows in decisions.items()}
        )
    means = all_mean(torch.cat(list(decisions.values()), 1).mean(0, dtype=exact))
    return GateMeans(dict(zip(decisions, means.split([gate.gates for gate in named.values()]), strict=True)))


def _rows(name: str, gate: Gate) -> Tensor:
    """The decisions that a loss covers now, `[rows, gates]`."""
    calls = gate.calls.decisions()
    if calls:
        if torch.is_grad_enabled():
            gate.calls.count()
        device = calls[-1].device
        return torch.cat([call.to(device) for call in calls])
    last = gate.decisions
    learns = gate.training and torch.is_grad_enabled() and any(p.requires_grad for p in gate.parameters())
    if last is None:
        raise ValueError(f"gate {name!r} has no decisions yet; run the model's forward before the gate losses")
    if (learns and last is gate.calls.latest) or escaped(last):
        raise ValueError(
            f"gate {name!r}: expected decisions with a graph, got those of an earlier forward whose graph has been "
            "freed; run the model's forward before the gate losses"
        )
    if learns and not last.requires_grad and not gate.frozen:
        raise ValueError(
            f"gate {name!r}: expected decisions with a graph, got some without one (from torch.no_grad, "
            "fastgate.decide or reentrant checkpointing), so that a loss would train nothing; run the model's forward "
            "with gradients before the gate losses, with use_reentrant=False if it is checkpointed"
        )
    return last.reshape(-1, gate.gates)


def polarization(gates: GateSource, *, final: Mapping[str, Tensor] | None = None) -> Tensor:
    """Disagreement between samples: mean over gates of g (1 - g), g the mean decision (Eq. 8; Eq. 9 for channels).

    0 if all samples agree, at most 0.25. For channel gates, the mean over a gate's channels is taken first. The
    mini-batch mean approximates the mean over the data. `final`: see :mod:`fastgate.losses`.
    """
    means = gate_means(gates, final=final)
    return means.over_gates(means.joined * (1 - means.joined))


def activation(gates: GateSource, *, final: Mapping[str, Tensor] | None = None) -> Tensor:
    """Mean decision over all gates (Eq. 11); for channel gates, the mean over a gate's channels is taken first.

    `final`: see :mod:`fastgate.losses`.
    """
    means = gate_means(gates, final=final)
    return means.over_gates(means.joined)


def budget(
    gates: GateSource,
    target: float | Tensor,
    costs: Mapping[str, Tensor] | None = None,
    *,
    total: float | None = None,
    final: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Squared distance of the network's cost from a target: (share - target)^2 * (total / switchable)^2.

    share = 1 - sum(costs * (1 - g)) / total is the current fraction of the cost with every gate open, ungated layers
    included; g are the mean decisions (for channels in a gated layer, multiplied by the layer's). The factor, with
    switchable = sum(costs), scales the distance to the gated part of the cost: from everything open to everything
    closed it is 1, however much is not gated.

    Args:
        gates: a model, an iterable of gates, or their means.
        target: desired fraction of the whole network's cost, as for :func:`fastgate.decide`. A tensor (scalar, on the
            gates' device) is not checked, since that would synchronize with the device.
        costs: name -> `[gates]`, from :func:`fastgate.gate_costs`; None weighs every gate (channel) equally and counts
            nothing else.
        total: cost of the whole network with every gate open, in the units of `costs`; None: `costs.total`.
        final: decisions of final gates, see :mod:`fastgate.losses`; sums are then in the order of `costs`.

    Raises:
        ValueError: a target outside 0 to 1 or below the ungated fraction (the message names the range; not checked if
            that would synchronize with the device); costs of gates other than the model's; costs without a total, or
            with a total below their sum.
    """
    if not isinstance(target, Tensor) and not 0 <= target <= 1:
        raise ValueError(f"target: expected a fraction between 0 and 1, got {target}")
    means = gate_means(gates, final=final)
    switchable: float | Tensor
    whole: float | None
    if costs is None:
        weights, switchable = torch.ones_like(means.joined), len(means.joined)
        whole = switchable if total is None else total
    else:
        means, weights, switchable = _weigh(means, costs, final is not None)
        whole = getattr(costs, "total", None) if total is None else total
        if whole is None:
            raise ValueError(
                "total: expected the cost of the whole network, to which the target is relative, got costs without a "
                "total; pass the result of fastgate.gate_costs(model, inputs), or total=fastgate.macs(model, inputs)"
            )
    if not isinstance(target, Tensor) and _readable(switchable):
        switchable = float(switchable)
        if whole < switchable and total is not None:  # measured times may overlap
            raise ValueError(
                f"total: expected at least {switchable:.0f}, the sum of the gates' costs, got {total}; pass the cost "
                "of the whole network for the same inputs, in the units of the costs"
            )
        lowest = (whole - switchable) / whole
        if target < lowest:
            raise ValueError(
                f"target: expected {math.ceil(lowest * 1e4) / 1e4:.4f} to 1 of the network's cost (the rest is not "
                f"gated), got {target}"
            )
    # both relative to the switchable cost: exactly the target if everything is switchable
    wanted = target - (1 - target) * ((whole - switchable) / switchable)
    return ((means.joined * weights).sum() / switchable - wanted) ** 2


def capacity(
    gates: GateSource,
    parameters: Mapping[str, Tensor],
    *,
    total: float | None = None,
    final: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Fraction of the gated parameters that is closed: the loss of capacity.

    Used together with :func:`budget`: among gates of equal cost, it favours keeping those with more parameters.

    Args:
        gates: a model, an iterable of gates, or their means.
        parameters: name -> `[gates]`, from `fastgate.gate_costs(model, inputs, "params")`.
        total: sum(parameters), if the caller knows it.
        final: decisions of final gates, see :mod:`fastgate.losses`; sums are then in the order of `parameters`.

    Raises:
        ValueError: parameters of gates other than the model's.
    """
    means, weights, switchable = _weigh(gate_means(gates, final=final), parameters, final is not None)
    return 1 - (means.joined * weights).sum() / (switchable if total is None else total)


def under_layers(means: Mapping[str, Tensor], within: Mapping[str, str]) -> Mapping[str, Tensor]:
    """Multiply the decisions of channels by that of their layer, since a closed layer closes its channels.

    Args:
        means: (mean) decisions by gate, `[gates]`, float or bool.
        within: for each channel gate, the layer gate around it; see :class:`fastgate.pruning.costs.Costs`.
    """
    if not within:
        return means
    return {name: mean * means[within[name]] if name in within else mean for name, mean in means.items()}


def _weigh(means: GateMeans, costs: Mapping[str, Tensor], reorder: bool) -> tuple[GateMeans, Tensor, float | Tensor]:
    """Return the means (in the costs' order if `reorder`), the matching costs `[all gates]`, and the costs' sum."""
    if {name: len(cost) for name, cost in costs.items()} != {name: len(mean) for name, mean in means.items()}:
        raise ValueError(
            f"costs: expected the gates {', '.join(means)}, got {', '.join(costs)}, or gates of other sizes; compute "
            "them for this model with fastgate.gate_costs(model, inputs)"
        )
    if reorder:
        means = _ordered(means, list(costs), "costs")
    if within := getattr(costs, "within", None):
        means = GateMeans(under_layers(means, within))
    weights = torch.cat([costs[name] for name in means])
    switchable = getattr(costs, "switchable", None)
    return means, weights.to(means.joined), weights.sum() if switchable is None else switchable


def _readable(value: float | Tensor) -> bool:
    """Whether the value can be read without synchronizing with a device or breaking a compiled graph."""
    return not isinstance(value, Tensor) or (value.device.type == "cpu" and not torch.compiler.is_compiling())
