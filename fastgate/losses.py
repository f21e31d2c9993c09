"""Losses on gate decisions: scalars with graph, computed from the decisions of the step's forwards.

Each takes a model, an iterable of gates, or the means that :func:`gate_means` gave for one of them (so that several
losses share them). The paper's objective is Eq. 10: task + lambda_polar * polarization + lambda_act * activation.
"""

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


def gate_means(gates: GateSource) -> GateMeans:
    """Mean decision of each gate over its calls: name -> `[gates]`, float32 or wider, with graph.

    In training these are all calls since the last loss, every row of each (a siamese network calls its gates twice in a
    step, one that folds clips into the batch has more rows than samples); else it is the last forward. Under
    :func:`fastgate.ops.synchronization.synchronized` they are those of all processes.

    An iterable holds gates, then named by position ("0", "1", ...), or the pairs of `named_gates`.

    Raises:
        ValueError: there is no gate, or one has not run yet; a live gate in training whose decisions have no graph any
            more, so that a loss would not train it.
    """
    if isinstance(gates, Mapping):
        return gates if isinstance(gates, GateMeans) else GateMeans(gates)
    items = named_gates(gates) if isinstance(gates, nn.Module) else gates
    named: dict[str, Gate] = dict(item if isinstance(item, tuple) else (str(i), item) for i, item in enumerate(items))
    if not named:
        raise ValueError("expected a model with gates, got none; add them with fastgate.attach(model, 'layer')")
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


def polarization(gates: GateSource) -> Tensor:
    """Disagreement of the samples: mean over gates of g (1 - g), g the mean decision (Eq. 8; Eq. 9 for channels).

    0 where all samples agree, at most 0.25. For channels the mean over a gate's channels comes first. The mini-batch
    mean stands for the mean over the data.
    """
    means = gate_means(gates)
    return means.over_gates(means.joined * (1 - means.joined))


def activation(gates: GateSource) -> Tensor:
    """Mean over gates of the mean decision (Eq. 11); for channels the mean over a gate's channels comes first."""
    means = gate_means(gates)
    return means.over_gates(means.joined)


def budget(
    gates: GateSource,
    target: float | Tensor,
    costs: Mapping[str, Tensor] | None = None,
    *,
    total: float | None = None,
) -> Tensor:
    """(open fraction - target)^2, the fraction weighted by what each gate (channel) switches.

    fraction = sum(costs * g) / sum(costs), g the mean decisions, so it is the share of the *gated* work; what ungated
    layers cost is not in it.

    Args:
        gates: a model, an iterable of gates, or their means.
        target: wanted fraction, 0 to 1. A tensor (scalar, on the gates' device) is taken as it is: to check it would
            mean to wait for the device.
        costs: name -> `[gates]`, from :func:`fastgate.gate_costs`; None weighs every gate (channel) alike.
        total: sum(costs), where the caller knows it.

    Raises:
        ValueError: a target outside 0 to 1, or costs of other gates than the model's.
    """
    if not isinstance(target, Tensor) and not 0 <= target <= 1:
        raise ValueError(f"target: expected a fraction between 0 and 1, got {target}")
    means = gate_means(gates)
    if costs is None:
        costs = {name: torch.ones_like(g) for name, g in means.items()}
    return (_open_share(means, costs, total) - target) ** 2


def capacity(gates: GateSource, parameters: Mapping[str, Tensor], *, total: float | None = None) -> Tensor:
    """1 - open share of the parameters that gates switch: what of the network's capacity is given up.

    Beside :func:`budget` it prefers, of gates that cost the same, those that hold more parameters.

    Args:
        gates: a model, an iterable of gates, or their means.
        parameters: name -> `[gates]`, from `fastgate.gate_costs(model, inputs, "params")`.
        total: sum(parameters), where the caller knows it, see :func:`budget`.

    Raises:
        ValueError: parameters of other gates than the model's.
    """
    return 1 - _open_share(gate_means(gates), parameters, total)


def _open_share(means: GateMeans, costs: Mapping[str, Tensor], total: float | None) -> Tensor:
    if costs.keys() != means.keys():
        raise ValueError(
            f"costs: expected the gates {', '.join(means)}, got {', '.join(costs)}; compute them for this model with "
            "fastgate.gate_costs(model, inputs)"
        )
    weights = torch.cat([costs[name].to(means.joined) for name in means])
    return (means.joined * weights).sum() / (weights.sum() if total is None else total)
