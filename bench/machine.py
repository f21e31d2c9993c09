"""The description of the machine in result files: versions, commit, and the GPU's driver, clocks and power limit."""

import subprocess
from pathlib import Path
from typing import Any

import torch

from fastgate.env import describe_environment


def describe_machine() -> dict[str, Any]:
    """`describe_environment` and the commit, with a `+` if the working tree differs from it."""
    described = describe_environment()
    described["commit"] = _commit()
    for index, gpu in enumerate(described["gpus"]):
        gpu.update(_gpu_state(index))
    return described


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository: a copy of the tree
        return None


def _gpu_state(index: int) -> dict[str, Any]:
    """Driver, clocks (MHz) and power limit (W) of torch's device; by UUID, since NVML numbers devices differently."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"nvml": str(error)}
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        return {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "sm_clock_max_mhz": pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_limit_w": pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000,
        }
    except pynvml.NVMLError as error:
        return {"nvml": str(error)}
    finally:
        pynvml.nvmlShutdown()
