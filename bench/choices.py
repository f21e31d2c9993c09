"""Measure the ways of computing a gated convolution on this device and enter them in `fastgate/ops/measured.json`.

    python -m bench.choices

Takes a minute or two on a CPU. `impl="auto"` reads the table.
"""

import json
import statistics
import sys
import time
from datetime import UTC, datetime
from typing import Any

import torch
from rich.progress import track

from bench.machine import describe_machine
from bench.timing import Call
from fastgate.files import write_atomically
from fastgate.functional import gated_conv2d
from fastgate.ops.gated_conv import gated_conv2d_gathered
from fastgate.ops.measured import TABLE, device_key

FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.0)
ROUNDS = 7
# channels and side of the map: the stages of CIFAR ResNets and of ImageNet ResNet-50
SHAPES = {"cifar": [(16, 32), (32, 16), (64, 8)], "imagenet": [(64, 56), (128, 28), (256, 14), (512, 7)]}


def calls() -> list[dict[str, Any]]:
    """What to measure: the fields of `fastgate.ops.measured.Call`."""
    cuda = torch.cuda.is_available()
    found = []
    for network, batch in (("cifar", 256), ("imagenet", 64 if cuda else 8)):
        for channels, side in SHAPES[network]:
            for gates in ("batch", "samples", "pairs") if cuda else ("batch", "samples"):
                for dtype in ("float32", "float16", "bfloat16") if cuda else ("float32",):
                    for training in (False, True):
                        found.append(
                            {
                                "gates": gates, "dtype": dtype, "training": training, "kernel": 3, "stride": 1,
                                "batch": batch, "in_channels": channels, "out_channels": channels,
                                "pixels": side * side,
                            }
                        )  # fmt: skip
    return found


def measure_call(call: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The call with `us`: microseconds of "dense", and of the other paths by open fraction."""
    n, c, side = call["batch"], call["in_channels"], round(call["pixels"] ** 0.5)
    dtype = getattr(torch, call["dtype"])
    x, weight = torch.randn(n, c, side, side, dtype=dtype), torch.randn(call["out_channels"], c, 3, 3, dtype=dtype)
    layout = {"device": device, "memory_format": torch.channels_last}
    x, weight = (t.to(**layout).requires_grad_(call["training"]) for t in (x, weight))
    shape = {"batch": (1, c), "samples": (n, 1), "pairs": (n, c)}[call["gates"]]
    paths: dict[Any, Call] = {}
    for fraction in FRACTIONS:
        gate = (torch.rand(shape).flatten().argsort().reshape(shape) < fraction * shape[0] * shape[1]).to(device, dtype)
        if fraction == 0.5:  # it does not depend on what is open
            paths["dense", None] = lambda gate=gate: gated_conv2d(x, weight, in_gate=gate, impl="torch")
        if call["gates"] != "pairs":
            paths["gathered", fraction] = lambda gate=gate: gated_conv2d_gathered(x, weight, gate, None, 1, 1)
        if device.type == "cuda":
            paths["triton", fraction] = lambda gate=gate: gated_conv2d(x, weight, in_gate=gate, impl="triton")

    def step(path: Call) -> None:
        with torch.set_grad_enabled(call["training"]):
            y = path()
            if call["training"]:
                torch.autograd.grad(y, (x, weight), torch.ones_like(y))
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds: dict[Any, list[float]] = {key: [] for key in paths}
    for turn in range(ROUNDS + 2):
        for key, path in paths.items():  # in turns, so that all share the machine's ups and downs
            start = time.perf_counter()
            step(path)
            if turn >= 2:
                seconds[key].append(time.perf_counter() - start)
    us: dict[str, Any] = {}
    for (path, fraction), values in seconds.items():
        microseconds = round(statistics.median(values) * 1e6, 1)
        if fraction is None:
            us[path] = microseconds
        else:
            us.setdefault(path, {})[str(fraction)] = microseconds
    return {**call, "us": us}


def main() -> int:
    """Replace this device's entry; the others stay."""
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [measure_call(call, device) for call in track(calls(), "measuring", transient=True)]
    table = json.loads(TABLE.read_text())
    machine = describe_machine()
    conditions = {key: machine[key] for key in ("versions", "cpu", "gpus", "torch_threads", "commit")}
    table[device_key(device)] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "conditions": conditions, "rows": rows}
    write_atomically(TABLE, json.dumps(table, indent=1) + "\n")
    print(f"{device_key(device)}: {len(rows)} rows in {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
