"""Description of this machine and installation for results, reports and bug reports: `python -m fastgate.env`."""

import importlib.metadata
import json
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGES = ("fastgate", "torch", "triton", "torchvision", "numpy", "fvcore", "safetensors", "nvidia-ml-py")


def package_version(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def cpu_name() -> str:
    """The processor's name as reported by the system."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_environment() -> dict[str, Any]:
    """Versions, processor, threads and GPUs as plain values; None for packages that are not installed."""
    import torch

    gpus = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"sm_{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return {
        "versions": {package: package_version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "variables": {name: value for name, value in os.environ.items() if name.startswith("FASTGATE_")},
    }


if __name__ == "__main__":
    print(json.dumps(describe_environment(), indent=2))
