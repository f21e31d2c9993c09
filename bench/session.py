"""Everything worth running on a GPU machine, the most valuable first, within a time limit.

    python -m bench.session OUT [--minutes 9] [--only tests,tune,...] [--data-root DIR]

Each stage has its own time limit; its output and measurements are under OUT when it ends, and the next one begins if
there is time left. Without a GPU the same commands run at smaller sizes, so that mistakes in them show up beforehand.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.machine import describe_machine
from fastgate.files import write_atomically

CUDA = torch.cuda.is_available()
PYTEST = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
FASTGATE = [sys.executable, "-m", "fastgate"]

# tests that read machine code or run an emulator need no GPU
STATIC = ("test_budgets", "test_floors", "test_turing", "test_compare")


@dataclass
class Stage:
    """Commands that run in parallel, after those of the stage before; `limit` in seconds."""

    name: str
    limit: float
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)


def stages(out: Path, data_root: str | None) -> list[Stage]:
    """All stages, the most valuable first."""
    workers = str(max(2, (os.cpu_count() or 2) - 2))
    network = "resnet110" if CUDA else "resnet8"
    size = ["--network", network, "--batch-size", "256" if CUDA else "4"]
    precisions = ("bf16", "fp16") if CUDA else ("fp32",)
    tunes = [
        [*FASTGATE, "tune", *size, "--gating", gating, "--precision", precision]
        for precision in precisions
        for gating in ("layer", "channel")
    ]
    kernels = ["tests/ops/test_means.py", "tests/ops/test_choices.py", *(["tests/kernels"] if CUDA else [])]
    ignored = [f"--ignore=tests/kernels/{name}.py" for name in STATIC]
    found = [
        Stage("kernels", 90, [[*PYTEST, "-n", workers, *kernels, "-m", "not slow and not gpu", *ignored]]),
        # compiles what the next stage measures, all at once; its times are discarded
        Stage("compile", 90, tunes, {"FASTGATE_CACHE": str(out / "thrown-away")}),
        *(
            Stage(f"tune-{command[-3]}-{command[-1]}", 40, [command], {"FASTGATE_CACHE": str(out / "choices")})
            for command in tunes
        ),
        Stage(
            "step",
            90,
            [[*PYTEST, "bench/test_training_step.py", f"--benchmark-json={out / 'step.json'}"]],
            {"FASTGATE_CACHE": str(out / "choices")},
        ),
        Stage("gpu", 80, [[*PYTEST, "-n", "6", "-m", "gpu", "tests"]]),
        Stage(
            "bench",
            100,
            [
                [
                    *PYTEST, "bench/test_gate_head.py", "bench/test_gated_residual.py", "bench/test_gated_conv.py",
                    f"--benchmark-json={out / 'bench.json'}", "-k",
                    "resnet110 and batch256 and bfloat16 and not compile" if CUDA else "stage3 and eager",
                ]
            ],
        ),
    ]  # fmt: skip
    if data_root is not None or not CUDA:
        data = ["--dataset", "cifar10", "--data-root", data_root] if data_root else ["--dataset", "digits"]
        recipe = [
            *data, "--preset", "cifar10-layer", "--network", "resnet56" if CUDA else "resnet8", "--epochs",
            "20" if CUDA else "1", "--target-macs", "0.5", "--control", "equal-macs", "--output", str(out / "run"),
        ]  # fmt: skip
        found.append(Stage("train", 240, [[*FASTGATE, "train", *recipe]], {"FASTGATE_CACHE": str(out / "choices")}))
    return found


def run(stage: Stage, out: Path, seconds: float) -> dict[str, object]:
    """Run a stage's commands for at most `seconds`; the output of each goes to its own file."""
    start = time.monotonic()
    processes = []
    for i, command in enumerate(stage.commands):
        name = stage.name if len(stage.commands) == 1 else f"{stage.name}-{i}"
        with (out / f"{name}.log").open("w") as log:
            environment = {**os.environ, "COLUMNS": "180", **stage.environment}
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    codes: list[int | None] = []
    for process in processes:
        try:
            codes.append(process.wait(max(1.0, seconds - (time.monotonic() - start))))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            codes.append(None)
    return {"stage": stage.name, "codes": codes, "seconds": round(time.monotonic() - start, 1)}


def gather(out: Path) -> None:
    """Collect the measured choices in one file."""
    records = [json.loads(file.read_text()) for file in sorted((out / "choices").glob("choice-*.json"))]
    if records:
        write_atomically(out / "choices.json", json.dumps(records, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the number of stages that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", help="names of stages or their beginnings, comma-separated")
    parser.add_argument("--data-root", help="folder with the CIFAR files, for the training stage")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    wanted = None if options.only is None else options.only.split(",")
    done = []
    for stage in stages(out, options.data_root):
        left = end - time.monotonic()
        if wanted is not None and not any(stage.name.startswith(name) for name in wanted):
            continue
        if left < 20:
            done.append({"stage": stage.name, "codes": ["no time left"], "seconds": 0})
            continue
        done.append(run(stage, out, min(stage.limit, left)))
        gather(out)
        print(done[-1], flush=True)
        write_atomically(out / "session.json", json.dumps({"machine": describe_machine(), "stages": done}, indent=1))
    return sum(any(code != 0 for code in stage["codes"]) for stage in done)


if __name__ == "__main__":
    sys.exit(main())
