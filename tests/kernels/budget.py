"""Compile every launch of the kernels' launchers for GPUs that are not here, and print what each costs as JSON.

Run in a process of its own without TRITON_INTERPRET (interpreted kernels have no binary):

    python -m tests.kernels.budget 75            # each launch
    python -m tests.kernels.budget 75 kernel     # the first launch of each kernel

The launchers run on meta tensors of real shapes with Triton's launch replaced by a recorder, so what is compiled has
the very tile sizes, warps and flags of a real call. Compiling needs the Triton wheel only, which carries ptxas and
cuobjdump.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from fastgate.kernels import _turing
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tests.kernels.sass import disassemble

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}
_LOW_PRECISION_ATOMIC = re.compile(
    r"\b(?:atom|red)\.\S*\.(?:f16|bf16)|\b(?:ATOMG?|REDG?)\.\S*(?:F16|BF16)|ATOMG?\.\S*CAS"
)


@dataclass(frozen=True)
class Launch:
    """One recorded launch: a kernel, its arguments by name, its options and its grid."""

    name: str
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Usage:
    """What one compiled launch needs on one architecture."""

    name: str
    capability: int
    registers: int
    stack: int  # bytes per thread: spills
    shared: int  # bytes per block
    local: int  # local-memory instructions: spills
    mma: int  # tensor-core instructions
    low_precision_atomics: list[str]
    counters_without_barrier: int


@contextmanager
def intercepted(handle: Callable[[Launch], Any], name: str = "", arch: int | None = None) -> Iterator[None]:
    """Hand every launch to `handle` instead of making it; `arch` is the GPU that launchers believe to be on."""
    original, capability = JITFunction.run, _turing.capability

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        options = {key: arguments.pop(key) for key in list(arguments) if key not in self.arg_names}
        size = grid(arguments) if callable(grid) else grid
        handle(Launch(f"{name} {self.fn.__name__}".strip(), self, arguments, options, tuple(size)))

    JITFunction.run = run
    if arch is not None:
        _turing.capability = lambda device: arch
    try:
        yield
    finally:
        JITFunction.run, _turing.capability = original, capability


@contextmanager
def recorded(launches: list[Launch], name: str, arch: int | None = None) -> Iterator[None]:
    """Append every launch to the list instead of making it."""
    with intercepted(launches.append, name, arch):
        yield


def compile_launch(launch: Launch, capability: int) -> Any:
    """Triton's compiled kernel, with the specialisation that real tensors (aligned to 16 bytes) would get."""
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}

    def typed(value: Any, place: tuple[int, ...], is_constexpr: bool = False) -> Any:
        if is_constexpr or value is None:
            constexprs[place] = value
            return "constexpr"
        if isinstance(value, tuple):  # a NamedTuple: its fields are the kernel's arguments
            return type(value)(*(typed(field, (*place, i)) for i, field in enumerate(value)))
        if isinstance(value, torch.Tensor):
            attributes[place] = [["tt.divisibility", 16]]
            return f"*{_TYPES[value.dtype]}"
        return "fp32" if isinstance(value, float) else "i32"

    for index, parameter in enumerate(launch.kernel.params):
        signature[parameter.name] = typed(launch.arguments[parameter.name], (index,), parameter.is_constexpr)
    return triton.compile(
        ASTSource(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"enable_fp_fusion": True, "num_stages": 1 if capability < 80 else 3, **launch.options},
    )


def counters_without_barrier(ptx: str) -> int:
    """How many counter atomics (acq_rel adds) are not preceded by a block barrier after the last store or label.

    Without one a thread may announce the block's results before the other threads have stored theirs.
    """
    bad, since_barrier = 0, True
    for line in ptx.splitlines():
        if re.search(r"\bbar(?:rier)?(?:\.cta)?\.sync", line):
            since_barrier = False
        elif "st.global" in line:
            since_barrier = True
        elif re.search(r"atom\S*\.acq_rel\S*\.add", line) and since_barrier:
            bad += 1
    return bad


def low_precision_atomics(assembly: str) -> list[str]:
    """Atomics on fp16 or bf16, or the compare-and-swap loops that stand in for them."""
    return sorted(set(_LOW_PRECISION_ATOMIC.findall(assembly)))


def inspect(name: str, compiled: Any, capability: int) -> Usage:
    """Read a compiled kernel's registers, stack, shared memory, spills and atomics."""
    code = disassemble(compiled)
    operations = Counter(each.name for each in code.instructions)
    return Usage(
        name=name,
        capability=capability,
        registers=code.registers,
        stack=code.stack,
        shared=compiled.metadata.shared,
        local=operations["STL"] + operations["LDL"],
        mma=operations["HMMA"] + operations["HGMMA"],
        low_precision_atomics=low_precision_atomics(code.text) + low_precision_atomics(compiled.asm["ptx"]),
        counters_without_barrier=counters_without_barrier(compiled.asm["ptx"]),
    )


def meta(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor.to(memory_format=torch.channels_last) if channels_last else tensor


# (samples, channels, height, width): the ends of ResNet-110 at batch 256, and stages 1 and 4 of ImageNet ResNet-50
SHAPES = {
    "stage1": (256, 16, 32, 32),
    "stage3": (256, 64, 8, 8),
    "resnet50-1": (64, 256, 56, 56),
    "resnet50-4": (64, 2048, 7, 7),
}


def gate_head_calls(dtype: torch.dtype, channels_last: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    from fastgate.kernels.gate_head import gate_head_bwd, gate_head_fwd

    for stage, (n, c, h, w) in SHAPES.items():
        # a wide head; more samples than a tile holds, and few of them, where it has room for many channels
        for kind, hidden, samples in (
            ("layer", 16, n), ("channel", 16, n), ("wide", 128, n), ("large", 16, 8 * n), ("few", 16, 8),
        ):  # fmt: skip
            x = meta(samples, c, h, w, dtype=dtype, channels_last=channels_last)
            w1, w2 = meta(hidden, c), meta(1 if kind == "layer" else c, hidden)

            def call(x: torch.Tensor = x, w1: torch.Tensor = w1, w2: torch.Tensor = w2) -> None:
                vector, b2 = meta(w1.shape[0]), meta(w2.shape[0])
                outs = gate_head_fwd(x, w1, vector, vector, vector, vector, vector, w2, b2, True, 0.1, 1e-5)
                decisions, logits, features, hidden_rows, mean, rstd = outs
                gate_head_bwd(
                    decisions, logits, logits, features, hidden_rows, mean, rstd, w1, vector, vector, w2,
                    x.shape[2] * x.shape[3], True, "restoring",
                )  # fmt: skip

            yield f"{stage} {kind}", call


def gated_residual_calls(dtype: torch.dtype, channels_last: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    from fastgate.kernels.gated_residual import gated_residual_bwd, gated_residual_fwd

    for stage, (n, c, h, w) in SHAPES.items():
        for kind, shape in (("layer", (n,)), ("channel", (n, c))):
            x, gate = meta(n, c, h, w, dtype=dtype, channels_last=channels_last), meta(*shape, dtype=dtype)

            def call(x: torch.Tensor = x, gate: torch.Tensor = gate) -> None:
                y, pooled = gated_residual_fwd(x, x, gate, True, True)
                gated_residual_bwd(y, pooled, y, x, gate, True, True)

            yield f"{stage} {kind}", call


# (samples, input channels, height, width), output channels, kernel size, stride: the ends of ResNet-110, a
# downsampling block, and ResNet-50's 3x3 and 1x1
CONVOLUTIONS = {
    "stage1": ((256, 16, 32, 32), 16, 3, 1),
    "stage3": ((256, 64, 8, 8), 64, 3, 1),
    "down": ((256, 16, 32, 32), 32, 3, 2),
    "resnet50-3x3": ((64, 512, 7, 7), 512, 3, 1),
    "resnet50-1x1": ((64, 256, 56, 56), 64, 1, 1),
}


def gated_conv_calls(dtype: torch.dtype, channels_last: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    from fastgate.kernels.gated_conv import gated_conv_dgrad, gated_conv_fwd, gated_conv_wgrad

    for stage, ((n, c, h, w), out, kernel, stride) in CONVOLUTIONS.items():
        x = meta(n, c, h, w, dtype=dtype, channels_last=channels_last)
        padding = kernel // 2
        dy = meta(n, out, (h - 1) // stride + 1, (w - 1) // stride + 1, dtype=dtype, channels_last=channels_last)
        weight = meta(out, c, kernel, kernel, dtype=dtype, channels_last=channels_last)

        def gate(form: str, channels: int) -> torch.Tensor | None:
            shape = {"samples": (n, 1), "batch": (1, channels), "pairs": (n, channels)}  # noqa: B023
            return None if form == "none" else meta(*shape[form], dtype=dtype)

        for kind in ("none", "samples", "pairs", "batch", "live"):
            form = "pairs" if kind == "live" else kind

            def call(
                x: torch.Tensor = x,
                dy: torch.Tensor = dy,
                weight: torch.Tensor = weight,
                gates: tuple[Any, Any] = (gate(form, c), gate(form, out)),
                options: tuple[int, int] = (stride, padding),
                live: bool = kind == "live",
            ) -> None:
                for write_closed in (True, False) if gates[1] is not None else (True,):
                    gated_conv_fwd(x, weight, *gates, *options, write_closed)
                gated_conv_dgrad(dy, weight, x, *gates, *options, live)
                gated_conv_wgrad(x, dy, weight, *gates, *options)

            yield f"{stage} {kind}", call


def launches_for(capability: int) -> list[Launch]:
    """Every launch of every operation: fp16 on sm_75, bf16 from sm_80 on; NCHW and channels_last."""
    launches: list[Launch] = []
    dtype = torch.float16 if capability < 80 else torch.bfloat16
    for calls in (gate_head_calls, gated_residual_calls, gated_conv_calls):
        # of the convolution both, whose code differs most between them
        for channels_last in (False, True) if calls is gated_conv_calls else (capability >= 80,):
            for name, call in calls(dtype, channels_last):
                with recorded(launches, f"{name} {'nhwc' if channels_last else 'nchw'} {_TYPES[dtype]}", capability):
                    call()
    return launches


def main(capability: int, each: str = "launch") -> None:
    """Print the usage of each launch on one architecture as JSON, or of the first one of each kernel."""
    launches = launches_for(capability)
    if each == "kernel":
        launches = list({launch.kernel: launch for launch in reversed(launches)}.values())
    usages = [inspect(launch.name, compile_launch(launch, capability), capability) for launch in launches]
    print(json.dumps([asdict(usage) for usage in usages]))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
