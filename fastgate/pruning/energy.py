"""Measured energy of forward passes, interleaved over networks so that machine drift affects all equally."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgate.energy import EnergyMeter, measure_energy
from fastgate.modes import eval_mode


@dataclass(frozen=True)
class InferenceEnergy:
    """Joules per sample of one network; None, with the reason in the warnings, if they cannot be metered."""

    joules_per_sample: float | None
    source: str
    warnings: tuple[str, ...]


def measure_inference(
    models: Mapping[str, nn.Module], inputs: Tensor, *, min_seconds: float = 2.0, trials: int = 3
) -> dict[str, InferenceEnergy]:
    """Median joules per sample of each model's forward pass on `inputs` [N, ...], in eval mode.

    Meters the GPU that holds `inputs`, or the CPU packages; if neither can be metered, it returns immediately.

    Args:
        models: name -> network.
        inputs: one batch.
        min_seconds: shortest duration of a trial.
        trials: trials per network, in turn.
    """
    meter = EnergyMeter(inputs.device)
    try:
        if not meter.is_readable():
            with meter.window("nothing") as window:  # says why
                pass
            return dict.fromkeys(models, InferenceEnergy(None, window.result.source, window.result.warnings))
        with torch.inference_mode(), eval_mode(*models.values()):
            passes = {name: lambda model=model: model(inputs) for name, model in models.items()}
            results = measure_energy(passes, min_seconds, trials, warmup=3, meter=meter)
    finally:
        meter.close()
    found = {}
    for name in models:
        mine = [result for result in results if result.name == name]
        metered = [result for result in mine if result.joules_per_item is not None]
        warnings = tuple(dict.fromkeys(warning for result in mine for warning in result.warnings))
        per_call = statistics.median(result.joules_per_item or 0.0 for result in metered) if metered else None
        source = (metered or mine)[-1].source
        found[name] = InferenceEnergy(None if per_call is None else per_call / len(inputs), source, warnings)
    return found
