"""Mean decisions of gates over the steps of an epoch, accumulated on the gates' device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgate.gates import Gate


class EpochMeans:
    """Accumulates vectors of mean decisions without synchronizing with their device.

    It adds in place, to the same tensors in every epoch, so that a step captured in a CUDA graph can be replayed.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._steps: Tensor | None = None

    @torch.no_grad()
    def add(self, means: Tensor) -> None:
        """Add a step's means, concatenated over all gates."""
        if self._sum is None or self._steps is None:
            self._sum, self._steps = torch.zeros_like(means), torch.zeros((), device=means.device)
        if self._sum.device != means.device:
            self._sum, self._steps = self._sum.to(means.device), self._steps.to(means.device)
        self._sum += means
        self._steps += 1

    @property
    def empty(self) -> bool:
        """Whether no step has been added since the last :meth:`clear`; synchronizes with the device."""
        return self._steps is None or not bool(self._steps)

    def by_gate(self, gates: Mapping[str, Gate], fixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The means so far, float64 `[gates]` on the CPU by gate; those of `fixed` gates are their decisions."""
        means = {name: opened.double() for name, opened in fixed.items()}
        if len(means) < len(gates):
            if self._sum is None or self._steps is None or self.empty:
                raise ValueError("metrics: expected a step whose loss includes search.loss(progress), got none yet")
            parts = (self._sum / self._steps).cpu().double().split([gate.gates for gate in gates.values()])
            means = {**dict(zip(gates, parts, strict=True)), **means}
        return {name: means[name] for name in gates}

    def clear(self) -> None:
        """Reset the sums."""
        if self._sum is not None and self._steps is not None:
            self._sum.zero_()
            self._steps.zero_()

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"sum": self._sum, "steps": self._steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state`."""
        self._sum, self._steps = (None if x is None else x.clone() for x in (state["sum"], state["steps"]))
