"""Choosing ahead of time which kernels a network uses on this device: see :mod:`fastgate.ops.choices`."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fastgate import values
from fastgate.ops import choices
from fastgate.ops.choices import Choice, Kind
from fastgate.values import Forward

# goes through the kinds of calls that are to be measured; shows how far it is, if it likes
Progress = Callable[[Sequence[Any]], Iterable[Any]]

# what is chosen first may change what is called next: means of a map travel from a kernel to the next gate head
_PASSES = 3


class Tuned(NamedTuple):
    """A kind of call that a network makes, and what was found for it: times in microseconds, candidates by name."""

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
    """Measure the operations that the model calls, on its device, now instead of when each is first called.

    A copy of the model runs forward on the inputs, in train mode backward as well, under the autocast of the caller.
    Each kind of call that nothing is known of is then compared with PyTorch and timed, and remembered on disk. The
    model, its gradients and random numbers stay as they are.

    Args:
        model: on a CUDA device; on another one nothing is measured, as rules decide there.
        inputs: as the model is called: a tensor, a tuple of positional or a mapping of keyword arguments. Sizes count,
            values do not.
        modes: of training or of inference, or both.
        forward: calls the model where its inputs do not say how: (model, inputs) -> outputs.
        progress: wraps the sequence of kinds to be measured, as `rich.progress.track` does.

    Returns:
        what was found, now or before, for each kind of call in the order of the first ones, with the choices made.

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
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for _ in range(_PASSES):
            kinds = _calls(copy.deepcopy(model), inputs, modes, forward)
            unmeasured = [kind for kind in kinds if kind not in found]
            if not unmeasured:
                break
            for kind in progress(unmeasured):
                found[kind] = choices.find(kind, device)
    return [Tuned(kind, found[kind]) for kind in kinds]


def _calls(model: nn.Module, inputs: Any, modes: Sequence[str], forward: Forward | None) -> list[Kind]:
    """The kinds of calls that a model, which may be changed, makes."""
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
