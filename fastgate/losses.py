"""Losses on gate decisions: scalars with graph, computed from the decisions of the last forward.

Each takes a model, an iterable of gates, or the means that :func:`gate_means` gave for one of them (so that several
losses share them). The paper's objective is Eq. 10: task + lambda_polar * polarization + lambda_act * activation.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fastgate.gates import Gate, named_gates
from fastgate.ops.synchronization import all_mean, processes

GateSource = nn.Module | Iterable[Gate] | Iterable[tuple[str, Gate]] | Mapping[str, Tensor]


def gate_means(gates: GateSource) -> Mapping[str, Tensor]:
    """Mean decision of each gate over the samples of the last forward: name -> `[gates]`, with graph.

    Under :func:`fastgate.ops.synchronization.synchronized` these are the samples of all processes.

    An iterable holds gates, then named by position ("0", "1", ...), or the pairs of `named_gates`.

    Raises:
        ValueError: there is no gate, or one has not run yet.
    """
    if isinstance(gates, Mapping):
        return gates
    items = named_gates(gates) if isinstance(gates, nn.Module) else gates
    named: dict[str, Gate] = dict(item if isinstance(item, tuple) else (str(i), item) for i, item in enumerate(items))
    if not named:
        raise ValueError("expected a model with gates, got none; add them with fastgate.attach(model, 'layer')")
    means = {}
    for name, gate in named.items():
        if gate.decisions is None:
            raise ValueError(f"gate {name!r} has no decisions yet; run the model's forward before its gate losses")
        means[name] = gate.decisions.reshape(-1, gate.gates).mean(0)
    if processes() > 1:  # one exchange for all gates
        parts = all_mean(torch.cat(list(means.values()))).split([len(mean) for mean in means.values()])
        means = dict(zip(means, parts, strict=True))
    return means


def polarization(gates: GateSource) -> Tensor:
    """Disagreement of the samples: mean over gates of g (1 - g), g the mean decision (Eq. 8; Eq. 9 for channels).

    0 where all samples agree, at most 0.25. For channels the mean over a gate's channels comes first. The mini-batch
    mean stands for the mean over the data.
    """
    return torch.stack([(g * (1 - g)).mean() for g in gate_means(gates).values()]).mean()


def activation(gates: GateSource) -> Tensor:
    """Mean over gates of the mean decision (Eq. 11); for channels the mean over a gate's channels comes first."""
    return torch.stack([g.mean() for g in gate_means(gates).values()]).mean()


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
        total: sum(costs), where the caller knows it: costs on a GPU have to be waited for to add them up.

    Raises:
        ValueError: a target outside 0 to 1, or costs of other gates than the model's.
    """
    if not isinstance(target, Tensor) and not 0 <= target <= 1:
        raise ValueError(f"target: expected a fraction between 0 and 1, got {target}")
    means = gate_means(gates)
    if costs is None:
        costs = {name: torch.ones_like(g) for name, g in means.items()}
    elif costs.keys() != means.keys():
        raise ValueError(
            f"costs: expected the gates {', '.join(means)}, got {', '.join(costs)}; compute them for this model with "
            "fastgate.gate_costs(model, input_size)"
        )
    if total is None:
        total = sum(float(c.sum()) for c in costs.values())
    used = torch.stack([(g * costs[name].to(g)).sum() / total for name, g in means.items()]).sum()
    return (used - target) ** 2
