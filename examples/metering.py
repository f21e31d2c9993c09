"""Meter the energy of any code: `python examples/metering.py`. If nothing can be metered, it says why."""

import torch
import torchvision

import fastgate as fg

model = torchvision.models.resnet18(weights=None).eval()
images = torch.rand(8, 3, 64, 64)
meter = fg.EnergyMeter("cpu")  # RAPL; without "cpu": the visible NVIDIA GPUs (NVML), or RAPL if there are none
print(meter)

with meter.window("inference", items=20 * len(images)) as window, torch.inference_mode():
    for _ in range(20):
        model(images)
energy = window.result
print(f"{energy.seconds:.2f} s, {energy.joules} J, {energy.joules_per_item} J an image")
for warning in energy.warnings:
    print(f"warning: {warning}")
