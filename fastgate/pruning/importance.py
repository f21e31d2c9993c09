"""The importance of layer gates: what to close where samples hold more open than the target allows."""

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgate.gates import named_gates
from fastgate.models.hooks import copy_network
from fastgate.modes import eval_mode
from fastgate.pruning.decisions import Decisions, freeze
from fastgate.pruning.targets import tolerance
from fastgate.values import Forward, call, inputs_of, tensors_in, to_device_of


def layer_importance(
    model: nn.Module,
    decisions: Decisions,
    batch: Any,
    costs: Mapping[str, Tensor],
    target: float,
    total: int,
    *,
    held: Container[str] = (),
    forward: Forward | None = None,
) -> dict[str, Tensor]:
    """Relative change of the network's outputs y when one open layer gate is closed: |y' - y|^2 / |y|^2, by gate.

    In eval mode, with all other gates frozen as decided; summed over the tensors of the output. Where gates have not
    learned the target, nearly all samples hold open more than it allows, and their votes hardly differ (96 and 99 %),
    while one block may matter far more than another: closing the one of 96 %, which downsamples, cost three to four
    points of accuracy (bench/results/search).

    Args:
        model: a network with gates; a copy of it runs.
        decisions: decisions of every gate.
        batch: a calibration batch, see :func:`fastgate.decide`.
        costs, target, total, held: see :func:`~fastgate.pruning.targets.meet_target`.
        forward: `(model, batch) -> outputs`, for networks with another calling convention.

    Returns:
        Float64 scalars by name of the open gates, without those of `held`; nan where outputs have other shapes, such as
        those of a detection network. Empty if the decisions do not exceed the target by more than the tolerance, or if
        there are channel gates.
    """
    if any(len(cost) > 1 for cost in costs.values()):
        return {}
    cost = total - sum(int(each.sum()) for name, each in costs.items() if not bool(decisions[name].open))
    if cost <= target * total + tolerance(costs, target, total, None):
        return {}
    frozen = copy_network(model)
    gates = dict(named_gates(frozen))
    freeze(frozen, {name: decisions[name] for name in gates})
    inputs = to_device_of(frozen, inputs_of(batch, forward), copied=True)

    def run() -> list[Tensor]:
        outputs = tensors_in(call(frozen, inputs, forward))
        return [y.double() for y in outputs if y.is_floating_point()]

    found = {}
    with torch.no_grad(), eval_mode(frozen), torch.compiler.set_stance("force_eager"):
        expected = run()
        for name, gate in gates.items():
            if name not in held and bool(decisions[name].open):
                gate.freeze(torch.zeros(1, dtype=torch.bool))
                found[name] = _relative_change(expected, run())
                gate.freeze(torch.ones(1, dtype=torch.bool))
    return found


def _relative_change(expected: list[Tensor], got: list[Tensor]) -> Tensor:
    """On the CPU; nan if shapes differ."""
    if [y.shape for y in expected] != [y.shape for y in got]:
        return torch.tensor(torch.nan, dtype=torch.float64)
    changes = [(b - a).square().sum() / a.square().sum().clamp_min(1e-30) for a, b in zip(expected, got, strict=True)]
    return sum(changes, start=torch.zeros((), dtype=torch.float64)).cpu()
