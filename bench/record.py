"""Run every benchmark, save the results and print the ratios: `python -m bench.record`.

Writes bench/results/<device>/<date>.json and a picture of it (see `bench.report`).
"""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench import report
from fastgate.env import describe_environment
from fastgate.files import write_atomically


def main() -> int:
    """Returns pytest's exit code; the file exists only if every benchmark's check passed."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else describe_environment()["cpu"]
    folder = Path(__file__).parent / "results" / name.lower().replace(" ", "-").replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.now(UTC):%Y-%m-%d}.json"
    temporary = path.with_suffix(".tmp")
    code = subprocess.call([sys.executable, "-m", "pytest", "bench", f"--benchmark-json={temporary}"])
    if code == 0:
        content = json.loads(temporary.read_text())
        for benchmark in content["benchmarks"]:
            benchmark["stats"].pop("data", None)  # the times of all rounds: megabytes that nothing reads
        write_atomically(path, json.dumps(content, indent=1) + "\n")
        temporary.unlink()
        print(f"wrote {path}")
        return report.main([str(path)])
    temporary.unlink(missing_ok=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
