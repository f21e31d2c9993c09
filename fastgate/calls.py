"""Records the calls of a gate that a loss covers: all calls of a step, however often the network ran in it."""

import threading
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastgate.ops.dispatch import transforms_active


class _Call(torch.autograd.Function):
    """Identity on a call's decisions. Its node lives as long as the autograd graph that uses them."""

    @staticmethod
    def forward(ctx: Any, decisions: Tensor) -> Tensor:
        ctx.save_for_backward(decisions)
        return decisions.view_as(decisions)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def can_be_recorded() -> bool:
    """Whether the current forward counts as a new call, in plain eager autograd.

    A forward inside a backward pass is a recomputation for activation checkpointing; a compiler and `torch.func` keep
    no nodes.
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not transforms_active()
        and torch._C._current_graph_task_id() == -1
    )


class Calls:
    """Decisions of the calls since the last loss whose graph still exists.

    Nodes are held weakly: a forward whose outputs are dropped uses no memory and does not count. The replicas of
    `nn.DataParallel` share this object with their module, from several threads.
    """

    def __init__(self) -> None:
        self.latest: Tensor | None = None  # the decisions that the last call returned
        self._nodes: list[weakref.ref[Any]] = []
        self._counted = False  # by a loss: the next call starts a new step
        self._lock = threading.Lock()

    def add(self, decisions: Tensor) -> Tensor:
        """Record a call by its decisions (with graph); use the returned tensor in their place."""
        # no-op hooks: those of activation checkpointing would recompute the forward for the saved tensors
        with saved_tensors_hooks(_as_it_is, _as_it_is):
            decisions = _Call.apply(decisions)
        with self._lock:
            kept = [] if self._counted else [node for node in self._nodes if node() is not None]
            self._nodes, self._counted = [*kept, weakref.ref(decisions.grad_fn)], False
        return decisions

    def decisions(self) -> list[Tensor]:
        """Recorded decisions with graph, in call order; empty if the last call's graph has been freed."""
        found: list[Tensor] = []
        for reference in self._nodes:
            node = reference()
            with suppress(RuntimeError):  # backward has freed it
                found += [] if node is None else node.saved_tensors
        return found

    def count(self) -> None:
        """Note that a loss has used the decisions."""
        self._counted = True
