"""Measured time of a forward pass, several networks interleaved so that they share the machine's ups and downs."""

import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastgate.modes import eval_mode


def measure_latency(
    models: Mapping[str, nn.Module], inputs: Tensor, *, rounds: int = 30, warmup: int = 3
) -> dict[str, float]:
    """Median seconds of one forward pass of each model on `inputs`, in eval mode; modes are restored.

    Every round times each model once, in turn. On a GPU a pass ends when the device has finished it.

    Raises:
        ValueError: no rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode(), eval_mode(*models.values()):
        for turn in range(warmup + rounds):
            for name, model in models.items():
                _synchronize(inputs)
                start = time.perf_counter()
                model(inputs)
                _synchronize(inputs)
                if turn >= warmup:
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
