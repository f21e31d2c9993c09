"""Losses on gate decisions: scalars with graph, computed from the decisions of the step's forwards.

Each takes a model, an iterable of gates, or the means that :func:`gate_means` gave for one of them (so that several
losses share them). The paper's objective is Eq. 10: task + lambda_polar * polarization + lambda_act * activation.

In a run whose gates become final, `final` holds their decisions: name -> `[gates]`, bool or float. A gate in it counts
with that decision as a constant, whether it is frozen or has left the network, so that a loss stays one over all gates
of the run. Without it a loss is about the gates it is given.
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
    """Mean decisions by gate, `[gates]` each, as parts of one vector.

    The losses work on the vector: on a GPU some small operations per gate would cost more than the gate's block.

    Attributes:
        joined: all of them, `[all gates]`.
    """

    def __init__(self, means: Mapping[str, Tensor]) -> None:
        self.joined = torch.cat(list(means.values()))
        parts = self.joined.split([len(mean) for mean in means.values()])
        super().__init__(zip(means, parts, strict=True))

    def over_gates(self, values: Tensor) -> Tensor:
        """The mean over gates of the mean over a gate's channels, of values `[all gates]`."""
        sizes = [len(mean) for mean in self.values()]
        if len(set(sizes)) == 1:
            return values.mean()
        return torch.stack([part.mean() for part in values.split(sizes)]).mean()


def gate_means(
    gates: GateSource, *, final: Mapping[str, Tensor] | None = None, order: Iterable[str] | None = None
) -> GateMeans:
    """Mean decision of each gate over its calls: name -> `[gates]`, float32 or wider, with graph.

    In training these are all calls since the last loss, every row of each (a siamese network calls its gates twice in a
    step, one that folds clips into the batch has more rows than samples); else it is the last forward. Under
    :func:`fastgate.ops.synchronization.synchronized` they are those of all processes.

    An iterable holds gates, then named by position ("0", "1", ...), or the pairs of `named_gates`.

    Args:
        gates: a model, an iterable of gates, or means to add final decisions to.
        final: decisions of gates that are final, see :mod:`fastgate.losses`; on the gates' device nothing is copied.
        order: the names of all gates, in the order that the means shall have, so that sums over them round alike
            whichever gates have left; None: that of `gates`, then of `final`.

    Raises:
        ValueError: there is no gate, or one has not run yet; a live gate in training whose decisions have no graph any
            more, so that a loss would not train it; an order of other gates.
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
            f"{what}: expected the gates {', '.join(means)}, got {', '.join(names)}; name all of this model, and those "
            "that have left it in final="
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
    exact = torch.promote_types(first.dtype, torch.float32)  # costs are weighed in it: those of a network overflow fp16
    if len({(len(rows), rows.dtype, rows.device) for rows in decisions.values()}) > 1:
        return GateMeans(
            {name: all_mean(rows.mean(0, dtype=exact).to(first.device)) for name, rows in decisions.items()}
        )
    means = all_mean(torch.cat(list(decisions.values()), 1).mean(0, dtype=exact))
    return GateMeans(dict(zip(decisions, means.split([gate.gates for gate in named.values()]), strict=True)))


def _rows(name: str, gate: Gate) -> Tensor:
    """The decisions that a loss is about now, `[rows, gates]`."""
    calls = gate.calls.decisions()
    if calls:
        if torch.is_grad_enabled():
            gate.calls.count()
        device = calls[-1].device
        return torch.cat([call.to(device) for call in calls])
    last = gate.decisions
    learns = gate.training and torch.is_grad_enabled() and any(p.requires_grad for p in gate.parameters())
    if last is None:
        raise ValueError(f"gate {name!r} has no decisions yet; run the model's forward before its gate losses")
    if (learns and last is gate.calls.latest) or escaped(last):
        raise ValueError(
            f"gate {name!r}: expected decisions with a graph, got those of an earlier forward, whose graph is gone; "
            "run the model's forward before its gate losses"
        )
    if learns and not last.requires_grad and not gate.frozen:
        raise ValueError(
            f"gate {name!r}: expected decisions with a graph, got some without (of a forward under torch.no_grad, of "
            "fastgate.decide, of reentrant checkpointing), so that a loss would train nothing; run the model's forward "
            "with gradients before its gate losses, with use_reentrant=False if it is checkpointed"
        )
    return last.reshape(-1, gate.gates)


def polarization(gates: GateSource, *, final: Mapping[str, Tensor] | None = None) -> Tensor:
    """Disagreement of the samples: mean over gates of g (1 - g), g the mean decision (Eq. 8; Eq. 9 for channels).

    0 where all samples agree, at most 0.25. For channels the mean over a gate's channels comes first. The mini-batch
    mean stands for the mean over the data. `final`: see :mod:`fastgate.losses`.
    """
    means = gate_means(gates, final=final)
    return means.over_gates(means.joined * (1 - means.joined))


def activation(gates: GateSource, *, final: Mapping[str, Tensor] | None = None) -> Tensor:
    """Mean over gates of the mean decision (Eq. 11); for channels the mean over a gate's channels comes first.

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
    """(share - target)^2 * (total / switchable)^2: how far the network's cost is from a share of the whole network's.

    share = 1 - sum(costs * (1 - g)) / total, g the mean decisions (of channels in a gated layer times that layer's):
    what the network costs, ungated layers included, of what it costs with every gate open. The factor, with switchable
    = sum(costs), measures the distance in what gates can switch: from everything open to everything closed it is 1,
    however much is not gated.

    Args:
        gates: a model, an iterable of gates, or their means.
        target: wanted share of the whole network's cost, as for :func:`fastgate.decide`. A tensor (scalar, on the
            gates' device) is taken as it is: to check it would mean to wait for the device.
        costs: name -> `[gates]`, from :func:`fastgate.gate_costs`; None weighs every gate (channel) alike, and nothing
            else costs anything.
        total: what the whole network costs with every gate open, in the units of the costs; None: `costs.total`.
        final: decisions of gates that are final, see :mod:`fastgate.losses`; sums are then in the order of the costs.

    Raises:
        ValueError: a target outside 0 to 1 or less than what is not gated (the message names the range; not checked
            where that would mean to wait for the device); costs of other gates than the model's; costs that do not say
            what the whole network costs, or less than they sum up to.
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
                "total: expected what the whole network costs, of which the target is a share, got costs that do not "
                "say it; use fastgate.gate_costs(model, inputs) as it is, or pass total=fastgate.macs(model, inputs)"
            )
    if not isinstance(target, Tensor) and _readable(switchable):
        switchable = float(switchable)
        if whole < switchable and total is not None:  # measured times may overlap
            raise ValueError(
                f"total: expected at least the {switchable:.0f} that gates switch, got {total}; give the cost of the "
                "whole network for the same inputs, in the units of the costs"
            )
        lowest = (whole - switchable) / whole
        if target < lowest:
            raise ValueError(
                f"target: expected {math.ceil(lowest * 1e4) / 1e4:.4f} to 1 of the network's cost (less is not gated), "
                f"got {target}"
            )
    # both as shares of what is switchable: exactly the target where everything is
    wanted = target - (1 - target) * ((whole - switchable) / switchable)
    return ((means.joined * weights).sum() / switchable - wanted) ** 2


def capacity(
    gates: GateSource,
    parameters: Mapping[str, Tensor],
    *,
    total: float | None = None,
    final: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """1 - open share of the parameters that gates switch: what of the network's capacity is given up.

    Beside :func:`budget` it prefers, of gates that cost the same, those that hold more parameters.

    Args:
        gates: a model, an iterable of gates, or their means.
        parameters: name -> `[gates]`, from `fastgate.gate_costs(model, inputs, "params")`.
        total: sum(parameters), where the caller knows it.
        final: decisions of gates that are final, see :mod:`fastgate.losses`; sums are then in the parameters' order.

    Raises:
        ValueError: parameters of other gates than the model's.
    """
    means, weights, switchable = _weigh(gate_means(gates, final=final), parameters, final is not None)
    return 1 - (means.joined * weights).sum() / (switchable if total is None else total)


def under_layers(means: Mapping[str, Tensor], within: Mapping[str, str]) -> Mapping[str, Tensor]:
    """Decisions of channels times that of the layer they are in, for a closed layer closes its channels.

    Args:
        means: (mean) decisions by gate, `[gates]`, float or bool.
        within: of channel gates, the layer gate around them; see :class:`fastgate.pruning.costs.Costs`.
    """
    if not within:
        return means
    return {name: mean * means[within[name]] if name in within else mean for name, mean in means.items()}


def _weigh(means: GateMeans, costs: Mapping[str, Tensor], reorder: bool) -> tuple[GateMeans, Tensor, float | Tensor]:
    """The means, in the costs' order if asked for; the costs beside them, `[all gates]`; and the sum of these."""
    if {name: len(cost) for name, cost in costs.items()} != {name: len(mean) for name, mean in means.items()}:
        raise ValueError(
            f"costs: expected the gates {', '.join(means)}, got {', '.join(costs)} or other sizes; compute them for "
            "this model with fastgate.gate_costs(model, inputs)"
        )
    if reorder:
        means = _ordered(means, list(costs), "costs")
    if within := getattr(costs, "within", None):
        means = GateMeans(under_layers(means, within))
    weights = torch.cat([costs[name] for name in means])
    switchable = getattr(costs, "switchable", None)
    return means, weights.to(means.joined), weights.sum() if switchable is None else switchable


def _readable(value: float | Tensor) -> bool:
    """Whether the value can be had without waiting for a device or leaving a compiled graph."""
    return not isinstance(value, Tensor) or (value.device.type == "cpu" and not torch.compiler.is_compiling())
