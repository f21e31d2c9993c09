"""Comparison of the outputs of two networks."""

from typing import Any

import torch
from torch import nn

from fastgate.modes import eval_mode
from fastgate.values import Forward, call, difference, to_device_of


def compare(masked: nn.Module, compacted: nn.Module, inputs: Any, *, forward: Forward | None = None) -> float:
    """Largest absolute difference between two networks' outputs on `inputs`, in eval mode; modes are restored.

    TF32 is disabled meanwhile, so that differences come from the networks and not from rounding. Each network gets a
    copy of the inputs on its own device.

    Args:
        masked, compacted: two networks whose outputs have the same structure: tensors and numbers in mappings, lists,
            tuples and dataclasses, nested at will.
        inputs: a tensor; a mapping of keyword arguments; a tuple of positional arguments; anything else, such as a list
            of images, is the only argument.
        forward: `(model, inputs) -> outputs`, for networks with another calling convention or with other outputs.

    Returns:
        The largest absolute difference between floating-point numbers; infinity if integers, bools or strings differ,
        or if only one network has a NaN or an infinity. Numbers that are NaN in both are skipped, with a warning.

    Raises:
        ValueError: outputs of different structures or shapes, outputs that cannot be compared, or nothing to compare.
    """
    torch_backends: Any = torch.backends  # its stubs lack cudnn.conv
    backends = (torch_backends.cuda.matmul, torch_backends.cudnn.conv)
    precisions = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), eval_mode(masked, compacted):
            expected, got = (
                call(model, to_device_of(model, inputs, copied=True), forward) for model in (masked, compacted)
            )
    finally:
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision
    return difference(expected, got)
