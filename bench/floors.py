"""Static cost of the kernels on GPUs that are not at hand, against the physical lower bound: `python -m bench.floors`.

Every launch is compiled for sm_75 and sm_90 at the sizes of real calls, and its machine code is counted
(`tests/kernels/sass.py` has the rates of a T4 and an H100, and the assumptions). Nothing is measured.

- floor: reading each input and writing each output once from and to DRAM, or the multiply-adds on the tensor cores,
  whichever takes longer.
- bound: the busiest unit of a multiprocessor, without stalls and with everything open, or DRAM. A real call takes
  longer; if the ratio of bound to floor is already high, "limit" is the bottleneck.

Latency, the tail of the last wave of programs, and the serial end of the gate head are not included. Writes
bench/results/static/floors.json and prints it as a table.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from fastgate.files import write_atomically
from tests.kernels import sass
from tests.kernels.budget import Launch, compile_launch, meta, recorded

RESULT = Path(__file__).parent / "results" / "static" / "floors.json"


class Shape(NamedTuple):
    """The maps of a stage of residual blocks; its convolution is 3x3, with equal input and output channels."""

    name: str
    batch: int
    channels: int
    side: int

    @property
    def bytes(self) -> int:
        """Size of one fp16 map."""
        return 2 * self.batch * self.channels * self.side**2

    @property
    def macs(self) -> int:
        """Multiply-adds of the dense 3x3 convolution."""
        return self.batch * self.side**2 * 9 * self.channels**2


SHAPES = {
    shape.name: shape
    for shape in (
        *(Shape(f"resnet110-stage{i}", 256, c, side) for i, (c, side) in enumerate([(16, 32), (32, 16), (64, 8)], 1)),
        *(
            Shape(f"resnet50-stage{i}", 64, c, side)
            for i, (c, side) in enumerate([(64, 56), (128, 28), (256, 14), (512, 7)], 1)
        ),
    )
}
GATES = ("none", "samples", "batch", "pairs", "live")  # live: pairs that require grad


@dataclass(frozen=True)
class Case:
    """One call of a launcher."""

    kernel: str
    gates: str
    prepare: Callable[[Shape, bool], Callable[[], Any]]  # the call on meta tensors of a shape, channels last or not
    maps: int  # read or written
    loaded: int  # maps among them that are read
    macs: int = 1  # of the dense convolution


def cases() -> Iterator[Case]:
    """Every kernel with every form of its gates."""
    from fastgate.kernels import gate_head, gated_conv, gated_residual

    def tensors(shape: Shape, last: bool) -> tuple[torch.Tensor, torch.Tensor]:
        n, c, side = shape[1:]
        x = meta(n, c, side, side, dtype=torch.float16, channels_last=last)
        return x, meta(c, c, 3, 3, dtype=torch.float16, channels_last=last)

    def gate(gates: str, shape: Shape) -> torch.Tensor | None:
        n, c = shape.batch, shape.channels
        size = {"samples": (n, 1), "batch": (1, c), "pairs": (n, c), "live": (n, c), "layer": (n,), "channel": (n, c)}
        return meta(*size[gates], dtype=torch.float16) if gates in size else None

    def forward(shape: Shape, last: bool, gates: str) -> Callable[[], Any]:
        x, weight = tensors(shape, last)
        # a gate of the output that requires grad is applied afterwards
        outs = None if gates == "live" else gate(gates, shape)
        return partial(gated_conv.gated_conv_fwd, x, weight, gate(gates, shape), outs, 1, 1, True)

    def dgrad(shape: Shape, last: bool, gates: str) -> Callable[[], Any]:
        x, weight = tensors(shape, last)
        both = (gate(gates, shape), gate(gates, shape))
        return partial(gated_conv.gated_conv_dgrad, x, weight, x, *both, 1, 1, gates == "live")

    def wgrad(shape: Shape, last: bool, gates: str) -> Callable[[], Any]:
        x, weight = tensors(shape, last)
        return partial(gated_conv.gated_conv_wgrad, x, x, weight, gate(gates, shape), gate(gates, shape), 1, 1)

    def residual_forward(shape: Shape, last: bool, gates: str) -> Callable[[], Any]:
        x, _ = tensors(shape, last)
        return partial(gated_residual.gated_residual_fwd, x, x, gate(gates, shape), True, True)

    def residual_backward(shape: Shape, last: bool, gates: str) -> Callable[[], Any]:
        x, _ = tensors(shape, last)
        pooled = meta(shape.batch, shape.channels)
        return partial(gated_residual.gated_residual_bwd, x, pooled, x, x, gate(gates, shape), True, True)

    def head(shape: Shape, last: bool, gates: str) -> Callable[[], Any]:
        x, _ = tensors(shape, last)
        out = 1 if gates == "layer" else shape.channels
        vector = meta(16)
        weights = (meta(16, shape.channels), vector, vector, vector, vector, vector, meta(out, 16), meta(out))
        return partial(gate_head.gate_head_fwd, x, *weights, True, 0.1, 1e-5)

    for gates in GATES:
        yield Case("conv forward", gates, partial(forward, gates=gates), 2, 1)
        maps = 3 if gates == "live" else 2  # with x, for the gradient of the gate
        yield Case("conv dgrad", gates, partial(dgrad, gates=gates), maps, maps - 1)
        yield Case("conv wgrad", gates, partial(wgrad, gates=gates), 2, 2)
    for gates in ("layer", "channel"):
        yield Case("residual forward", gates, partial(residual_forward, gates=gates), 3, 2, 0)
        yield Case("residual backward", gates, partial(residual_backward, gates=gates), 5, 3, 0)
        yield Case("head forward", gates, partial(head, gates=gates), 1, 1, 0)


@dataclass(frozen=True)
class Row:
    """The cost of one call on one GPU."""

    kernel: str
    gates: str
    shape: str
    layout: str
    gpu: str
    floor_us: float
    bound_us: float
    ratio: float
    limit: str  # the busiest unit
    instructions_per_mac: float | None  # of a thread, per multiply-add of the dense convolution
    instructions_per_byte: float | None  # of a thread, per byte read or written
    loads: dict[str, int]  # of the hot loop, by width in bits
    launches: int
    registers: int
    spills: int  # bytes per thread
    shared: int  # bytes per block


class _Launches(TorchDispatchMode):
    """Counts the operations of PyTorch that would launch a kernel on a GPU."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        name = function.name().removeprefix("aten::").split(".")[0]
        view = isinstance(result, torch.Tensor) and result._is_view()
        # zeros of int32 are the counters of `_launch.counter`, which on a GPU persist between calls
        counters = name in ("zeros", "zero_") and result.dtype == torch.int32
        if not (view or counters or name.startswith(("empty", "new_empty", "detach", "_local_scalar", "to"))):
            self.count += 1
        return result


def measure(case: Case, shape: Shape, last: bool, gpu: sass.Gpu) -> Row:
    """Compile the call's kernels and count their instructions."""
    launches: list[Launch] = []
    call = case.prepare(shape, last)
    with _Launches() as others, recorded(launches, "", gpu.capability):
        call()
    parts: Counter[str] = Counter()
    instructions = spills = registers = shared = 0.0
    loads: Counter[str] = Counter()
    dram = case.maps * shape.bytes
    floor = max(dram / gpu.dram, case.macs * shape.macs / (4 * gpu.mma_macs) / gpu.multiprocessors / gpu.hertz)
    for launch in launches:
        compiled = compile_launch(launch, gpu.capability)
        code = sass.disassemble(compiled)
        runs, hot = executions(launch, code.instructions, case.loaded * shape.bytes)
        for body, times in runs:
            for part, cycles in sass.busy(body, gpu).items():
                parts[part] += times * cycles
            instructions += times * len(body) * 32
        loads.update(sass.widths(hot))
        spills, registers = max(spills, code.stack), max(registers, code.registers)
        shared = max(shared, compiled.metadata.shared)
        partial = launch.arguments.get("partial_ptr")
        dram += 0 if partial is None else 2 * partial.numel() * partial.element_size()
    seconds = {part: gpu.seconds(cycles) for part, cycles in parts.items()} | {"DRAM": dram / gpu.dram}
    limit = max(seconds, key=seconds.__getitem__)
    return Row(
        kernel=case.kernel,
        gates=case.gates,
        shape=shape.name,
        layout="NHWC" if last else "NCHW",
        gpu=gpu.name,
        floor_us=round(1e6 * floor, 2),
        bound_us=round(1e6 * seconds[limit], 2),
        ratio=round(seconds[limit] / floor, 2),
        limit=limit,
        instructions_per_mac=round(instructions / shape.macs, 3) if case.macs else None,
        instructions_per_byte=None if case.macs else round(instructions / (case.maps * shape.bytes), 3),
        loads=dict(loads),
        launches=len(launches) + others.count,
        registers=int(registers),
        spills=int(spills),
        shared=int(shared),
    )


def executions(
    launch: Launch, code: list[sass.Instruction], loaded: int
) -> tuple[list[tuple[list[sass.Instruction], float]], list[sass.Instruction]]:
    """([(instructions, number of warps that execute them)], the hot loop).

    The hot loop runs as often as the launch's multiply-adds require or, if it has none, the `loaded` bytes; a loop
    around it, in the weight gradient, once for each sample of each tile; the rest once. Code that only the last program
    of each tile runs, whose time is latency (the gate head has one for all samples), is counted for that program.
    """
    warps = math.prod(launch.grid) * launch.options["num_warps"]
    ending = sass.ending(code)
    last = launch.options["num_warps"] * (math.prod(launch.grid[:2]) if "TILE" in launch.arguments else 1)
    hot = sass.hot_loop(code, without=ending)
    samples = [body for body in sass.loops(code) if hot and body is not hot and set(hot) < set(body)]
    around = [each for each in code if each not in hot and any(each in body for body in samples)]
    rest = [each for each in code if each not in hot and each not in around and each not in ending]
    runs = [(rest, float(warps)), (ending, float(last))]
    if samples:
        turns = launch.arguments["n_samples"] * launch.grid[0] * launch.grid[1] * launch.options["num_warps"]
        runs.append((around, turns))
    if hot:
        total = multiply_adds(launch)
        count = sass.macs if total else sass.loaded
        outside = sum(count(body) * times for body, times in runs)
        runs.append((hot, max(0.0, (total or loaded) - outside) / count(hot)))
    return runs, hot or code


def multiply_adds(launch: Launch) -> int:
    """Multiply-adds of a launch of the convolution with everything open, padding of tiles included; 0 for others."""
    a, tile = launch.arguments, launch.arguments.get("TILE")
    if tile is None:
        return 0
    per_step = tile.m * tile.n * tile.k
    if "n_samples" in a:
        steps = triton.cdiv(a["DY"].height * a["DY"].width, tile.k)
        return launch.grid[0] * launch.grid[1] * a["n_samples"] * steps * per_step
    return launch.grid[0] * a["TAPS"].rows * a["TAPS"].columns * triton.cdiv(a["SRC"].channels, tile.k) * per_step


def print_rows(rows: list[Row], console: Console) -> None:
    """One table per GPU and layout."""
    for gpu, layout in dict.fromkeys((row.gpu, row.layout) for row in rows):
        table = Table(title=f"{gpu}, {layout}, fp16: static, no silicon")
        for name in ("kernel", "gates", "shape", "floor us", "bound us", "ratio", "limit", "instr", "loads", "launches",
                     "regs", "spills"):  # fmt: skip
            table.add_column(name, justify="left" if name in ("kernel", "gates", "shape", "limit") else "right")
        for row in rows:
            if (row.gpu, row.layout) == (gpu, layout):
                rate = row.instructions_per_mac
                table.add_row(
                    row.kernel, row.gates, row.shape, f"{row.floor_us:.1f}", f"{row.bound_us:.1f}", f"{row.ratio:.2f}",
                    row.limit, f"{row.instructions_per_byte:.2f}/B" if rate is None else f"{rate:.2f}/MAC",
                    " ".join(f"{count} {width}" for width, count in row.loads.items()), str(row.launches),
                    str(row.registers), str(row.spills),
                )  # fmt: skip
        console.print(table)


def main() -> int:
    """Print the table; without a filter, also write it."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.call([sys.executable, "-m", "bench.floors", *sys.argv[1:]], env=environment)
    parser = argparse.ArgumentParser(description="Static costs of the kernels against their floors; nothing is run.")
    parser.add_argument("--case", action="append", help="only these kernels and gates, for example 'conv wgrad/*'")
    parser.add_argument("--shape", help="only shapes whose names begin with this, for example resnet110")
    parser.add_argument("--layout", choices=("NCHW", "NHWC"))
    parser.add_argument("--capability", type=int, choices=tuple(sass.GPUS))
    parser.add_argument("--json", action="store_true", help="print rows as JSON and write nothing")
    options = parser.parse_args()
    rows = [
        measure(case, shape, layout == "NHWC", gpu)
        for capability, gpu in sass.GPUS.items()
        if options.capability in (None, capability)
        for layout in ("NHWC", "NCHW")
        if options.layout in (None, layout)
        for case in cases()
        if any(fnmatch(f"{case.kernel}/{case.gates}", pattern) for pattern in options.case or ["*"])
        for shape in SHAPES.values()
        if shape.name.startswith(options.shape or "")
    ]
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
        return 0
    print_rows(rows, Console(width=200))
    if not any(vars(options).values()):
        content = {
            "what": "static, no silicon: bounds computed from compiled code and assumed rates; nothing was measured",
            "triton": triton.__version__,
            "gpus": [asdict(gpu) for gpu in sass.GPUS.values()],
            "rows": [asdict(row) for row in rows],
        }
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(RESULT, json.dumps(content, indent=1) + "\n")
        print(f"wrote {RESULT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
