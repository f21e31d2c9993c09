"""Ahead-of-time choice of the kernels that a network uses on this device: see :mod:`fastgate.ops.choices`."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fastgate import values
from fastgate.modes import random_state_kept
from fastgate.ops import choices
from fastgate.ops.measurement import Choice, Kind
from fastgate.values import Forward

# iterates over the kinds of calls to measure, and may display progress
Progress = Callable[[Sequence[Any]], Iterable[Any]]

# an early choice may change later calls: a kernel can pass pooled means on to the next gate head
_PASSES = 3


class Tuned(NamedTuple):
    """A kind of call that a network makes, and its measured choice: times in microseconds, by candidate."""

    kind: Kind
    choice: Choice


def tune(
    model: nn.Module,
    inputs: Any,
    *,
    modes: Sequence[str] = ("train", "eval"),
    forward: Forward | None = None,
    progress: Progress = iter,
) -> list[Tuned]:
    """Measure the operations that the model calls, ahead of time instead of at each one's first call.

    A copy of the model runs a forward on the inputs, and in train mode a backward, under the caller's autocast. Each
    kind of call without a stored choice is then checked against PyTorch, timed, and stored on disk. The model, its
    gradients and the random number generator state do not change.

    Args:
        model: a model on a CUDA device; on other devices fixed rules decide, and nothing is measured.
        inputs: example inputs: a tensor, a tuple of positional or a mapping of keyword arguments. Their sizes matter,
            their values do not.
        modes: `"train"`, `"eval"`, or both.
        forward: `(model, inputs) -> outputs`, for networks with another calling convention.
        progress: wraps the sequence of kinds to measure, as `rich.progress.track` does.

    Returns:
        the choice for each kind of call, measured now or earlier, in the order of first calls.

    Raises:
        ValueError: an unknown mode.
    """
    if unknown := set(modes) - {"train", "eval"}:
        raise ValueError(f"modes: expected 'train' and 'eval', got {', '.join(map(repr, sorted(unknown)))}")
    device = values.device_of(model)
    if device is None or choices.make_timer(device) is None:
        return []
    kinds: list[Kind] = []
    found: dict[Kind, Choice] = {}
    with random_state_kept(device):
        for _ in range(_PASSES):
            kinds = _calls(copy.deepcopy(model), inputs, modes, forward)
            unmeasured = [kind for kind in kinds if kind not in found]
            if not unmeasured:
                break
            for kind in progress(unmeasured):
                found[kind] = choices.find(kind, device)
    return [Tuned(kind, found[kind]) for kind in kinds]


def _calls(model: nn.Module, inputs: Any, modes: Sequence[str], forward: Forward | None) -> list[Kind]:
    """The kinds of calls that a model makes; the model may be modified."""
    with choices.collecting() as kinds:
        for mode in modes:
            model.train(mode == "train")
            with torch.inference_mode(False), torch.set_grad_enabled(mode == "train"):
                arguments = values.to_device_of(model, inputs, copied=True)
                outputs = values.tensors_in(values.call(model, arguments, forward))
                learned = [y for y in outputs if y.requires_grad]
                if learned:
                    torch.autograd.backward(learned, [torch.ones_like(y) for y in learned])
    return list(kinds)
