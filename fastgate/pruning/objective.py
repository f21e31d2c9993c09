"""The gate losses of a search: their weights over the epochs, and their values in a step."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastgate import losses, schedules
from fastgate.gates import Gate
from fastgate.ops import synchronization
from fastgate.pruning.config import WEIGHTS, SearchConfig
from fastgate.pruning.costs import Costs
from fastgate.pruning.means import EpochMeans


class Objective:
    """Polarization, activation, budget and capacity of a search's gates (:mod:`fastgate.losses`).

    Args:
        config: weights and target.
        epochs: total number of epochs.
        gates: all gates of the run, by name, in forward order.
        costs: the costs that the target refers to.
        parameters: number of parameters of every gate (channel).
        means: records the mean decisions of every step, except under :func:`torch.no_grad`.
    """

    def __init__(
        self,
        config: SearchConfig,
        epochs: int,
        gates: Mapping[str, Gate],
        costs: Costs,
        parameters: Costs,
        means: EpochMeans,
    ) -> None:
        self._config, self._epochs = config, epochs
        self._gates, self._costs, self._parameters, self._means = gates, costs, parameters, means
        self._weights = [schedules.parse(getattr(config, name)) for name in WEIGHTS]
        self._final: Mapping[str, Tensor] = {}
        self._on_device: dict[str, Mapping[str, Tensor]] = {}

    def fix(self, final: Mapping[str, Tensor]) -> None:
        """Take these decisions, bool `[gates]` by gate, for constants from now on."""
        self._final = dict(final)
        self._on_device.pop("final", None)

    def weights(self, epoch: float) -> list[float]:
        """The inputs of :meth:`terms` at a (fractional) epoch: the loss weights, then the target."""
        target = self._config.target_at(epoch / self._epochs)
        return [*(weight(epoch) for weight in self._weights), 1.0 if target is None else target]

    def terms(self, weights: Iterable[Any]) -> dict[str, tuple[Any, Tensor]]:
        """Gate losses of the last forward: name -> (weight, loss); empty if no gate is live."""
        live = {name: gate for name, gate in self._gates.items() if name not in self._final and not gate.frozen}
        if not live:
            return {}
        inside = synchronization.processes() > 1
        with nullcontext() if inside else synchronization.synchronized(batch_norms=False):
            means = losses.gate_means(live.items(), final=self._constants(live), order=self._gates)
        if torch.is_grad_enabled():
            self._means.add(means.joined.detach())
        polarization, activation, budget, capacity, target = weights
        terms = {
            "polarization": (polarization, losses.polarization(means)),
            "activation": (activation, losses.activation(means)),
        }
        if self._config.target is not None:
            costs, parameters = (
                self._placed(kind, means.joined.device, values)
                for kind, values in (("costs", self._costs), ("parameters", self._parameters))
            )
            terms["budget"] = (budget, losses.budget(means, target, costs))
            terms["capacity"] = (capacity, losses.capacity(means, parameters))
        return terms

    def _constants(self, live: Mapping[str, Gate]) -> Mapping[str, Tensor] | None:
        """The final decisions, on the device of the live gates."""
        if not self._final:
            return None
        device = next(p.device for gate in live.values() for p in gate.parameters())
        return self._placed("final", device, self._final)

    def _placed(self, kind: str, device: torch.device, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The values in fp32 on a device, copied there once."""
        kept = self._on_device.get(kind)
        if kept is None or next(iter(kept.values())).device != device:
            if isinstance(values, Costs):
                kept = values.to(device, torch.float32)
            else:
                kept = {name: value.to(device, torch.float32) for name, value in values.items()}
            self._on_device[kind] = kept
        return kept
