"""Run every benchmark and keep the numbers: `python -m bench.record` writes bench/results/<device>/<date>.json."""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from fastgate.env import describe_environment


def main() -> int:
    """Returns pytest's exit code; the file exists only if every benchmark's check passed."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else describe_environment()["cpu"]
    folder = Path(__file__).parent / "results" / name.lower().replace(" ", "-").replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.now(UTC):%Y-%m-%d}.json"
    temporary = path.with_suffix(".tmp")
    code = subprocess.call([sys.executable, "-m", "pytest", "bench", f"--benchmark-json={temporary}"])
    if code == 0:
        temporary.replace(path)
        print(f"wrote {path}")
    else:
        temporary.unlink(missing_ok=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
