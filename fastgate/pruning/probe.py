"""A forward pass for inspection: on an example, in eval mode, with every gate open and without side effects."""

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import nn

from fastgate.gates import named_gates
from fastgate.models.block import Gated
from fastgate.modes import eval_mode
from fastgate.values import tensors_in, to_device_of, with_tensors


def example_of(model: nn.Module, inputs: Any) -> Any:
    """Copy example inputs to the model's device; a size (C, H, W) gives one image of zeros in the model's dtype.

    A size (N, C, H, W) gives one image too.

    Raises:
        ValueError: integers that are not such a size.
    """
    if not isinstance(inputs, tuple | list) or not all(isinstance(n, Integral) for n in inputs):
        return to_device_of(model, inputs, copied=True)
    if len(inputs) not in (3, 4) or any(n < 1 for n in inputs):
        raise ValueError(
            f"inputs: expected (C, H, W) of one image, or example inputs (tensors), got {tuple(inputs)}; a tuple of "
            "numbers is interpreted as a size"
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return to_device_of(model, torch.zeros(1, *(int(n) for n in inputs[-3:]), dtype=dtype))


def random_like(example: Any) -> Any:
    """The example with normally distributed values in its floating-point tensors, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(x.shape, generator=generator).to(x) if x.is_floating_point() else x for x in tensors_in(example)
    ]
    return with_tensors(example, tensors)


class FirstKept:
    """Iterates once over batches and keeps the first."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self.first: Any = None

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            if self.first is None:
                self.first = batch
            yield batch


@contextmanager
def open_for_probing(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients and without the gates placed by `attach`, so that every branch runs as a plain one.

    Other gates run as they are, but keep their previous logits and decisions. Modes and gates are restored.
    """
    last = {gate: (gate.logits, gate.decisions) for _, gate in named_gates(model)}
    gates = {module: module.own_gate for module in model.modules() if isinstance(module, Gated)}
    try:
        with torch.no_grad(), eval_mode(model):
            for block in gates:
                block.set_gate(None)
            yield
    finally:
        for block, gate in gates.items():
            block.set_gate(gate)
        for gate, (logits, decisions) in last.items():
            gate.logits, gate.decisions = logits, decisions


def check_reached(blocks: Mapping[str, nn.Module], reached: Container[nn.Module]) -> None:
    """Raise `ValueError` if a gate's block did not run: its cost is then unknown, not 0."""
    if missed := [name for name, block in blocks.items() if block not in reached]:
        raise ValueError(
            f"gate {missed[0]!r}: its block did not run on these inputs, so that its cost is unknown; pass inputs "
            "(or forward=) that reach every gated block"
        )
