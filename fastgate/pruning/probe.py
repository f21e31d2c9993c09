"""One forward pass that is only looked at: on an example, in eval mode, with every gate open and nothing disturbed."""

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import nn

from fastgate.gates import named_gates
from fastgate.models.block import Gated
from fastgate.modes import eval_mode
from fastgate.values import to_device_of


def example_of(model: nn.Module, inputs: Any) -> Any:
    """The example inputs, copied to the model's device; for a size (C, H, W) one image of zeros in the model's dtype.

    A size (N, C, H, W) is that of one image too.

    Raises:
        ValueError: integers that are no such size.
    """
    if not isinstance(inputs, tuple | list) or not all(isinstance(n, Integral) for n in inputs):
        return to_device_of(model, inputs, copied=True)
    if len(inputs) not in (3, 4) or any(n < 1 for n in inputs):
        raise ValueError(
            f"inputs: expected (C, H, W) of one image, or example inputs (tensors), got {tuple(inputs)}; a tuple of "
            "numbers is a size"
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return to_device_of(model, torch.zeros(1, *(int(n) for n in inputs[-3:]), dtype=dtype))


@contextmanager
def open_for_probing(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients and without the gates that `attach` placed: every branch runs, as a plain one.

    Gates elsewhere run as they are, and keep the logits and decisions that they had. Modes and gates are restored.
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
    """Raise `ValueError` where a gate's block did not run: what it costs is then unknown, and not nothing."""
    if missed := [name for name, block in blocks.items() if block not in reached]:
        raise ValueError(
            f"gate {missed[0]!r}: its block did not run on these inputs, so that its cost is not known; give inputs "
            "(or forward=) that reach every gated block"
        )
