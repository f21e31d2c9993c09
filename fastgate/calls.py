"""The calls of a gate that a loss is about: all of one step, whether the network ran once or several times in it."""

import threading
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastgate.ops.dispatch import transforms_active


class _Call(torch.autograd.Function):
    """The identity on a call's decisions. Its node lives as long as the graph of what was computed from them."""

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
    """Whether a forward now is a call of its own, in plain eager autograd.

    Inside a backward pass it is a repetition for activation checkpointing; a compiler or `torch.func` keep no nodes.
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not transforms_active()
        and torch._C._current_graph_task_id() == -1
    )


class Calls:
    """Decisions of the calls since the last loss, as far as their graph is still there.

    Nodes are held weakly: a forward whose outputs are dropped costs no memory and does not count. The replicas of
    `nn.DataParallel` share the object with their module, from several threads.
    """

    def __init__(self) -> None:
        self.latest: Tensor | None = None  # the decisions that the last call handed out
        self._nodes: list[weakref.ref[Any]] = []
        self._counted = False  # by a loss: the next call begins a new step
        self._lock = threading.Lock()

    def add(self, decisions: Tensor) -> Tensor:
        """Record a call, by decisions with graph; they are to be used as they are returned."""
        # hooks that do nothing: those of activation checkpointing would run the forward pass again for what is saved
        with saved_tensors_hooks(_as_it_is, _as_it_is):
            decisions = _Call.apply(decisions)
        with self._lock:
            kept = [] if self._counted else [node for node in self._nodes if node() is not None]
            self._nodes, self._counted = [*kept, weakref.ref(decisions.grad_fn)], False
        return decisions

    def decisions(self) -> list[Tensor]:
        """With graph, in the order of the calls; empty where the last call's graph is gone or has been used."""
        found: list[Tensor] = []
        for reference in self._nodes:
            node = reference()
            with suppress(RuntimeError):  # backward has freed it
                found += [] if node is None else node.saved_tensors
        return found

    def count(self) -> None:
        """A loss has taken the decisions."""
        self._counted = True
