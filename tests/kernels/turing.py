"""What the sm_75 emulator (`ptx.py`) finds, as JSON. Run in a process of its own without TRITON_INTERPRET:

python -m tests.kernels.turing matmul
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import triton
import triton.language as tl
from fastgate.kernels import _turing
from torch import Tensor

from tests.kernels import test_gate_head, test_gated_conv, test_gated_residual
from tests.kernels.budget import Launch, compile_launch, inspect
from tests.kernels.compare import assert_close_to_oracle, poisoned_memory
from tests.kernels.ptx import EmulatorError, emulate, emulated


@triton.jit
def matmul_kernel(
    c_ptr,
    a_ptr,
    b_ptr,
    m,
    n,
    k,
    TRANSPOSED: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """c [m, n] = a [m, k] (in memory [k, m] where TRANSPOSED) @ b [k, n]."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        p = start + tl.arange(0, BLOCK_K)
        if TRANSPOSED:
            inside = (p < k)[:, None] & (i < m)[None, :]
            a = tl.trans(tl.load(a_ptr + p[:, None] * m + i[None, :], mask=inside, other=0.0))
        else:
            a = tl.load(a_ptr + i[:, None] * k + p[None, :], mask=(i < m)[:, None] & (p < k)[None, :], other=0.0)
        b = tl.load(b_ptr + p[:, None] * n + j[None, :], mask=(p < k)[:, None] & (j < n)[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(c_ptr + i[:, None] * n + j[None, :], total, mask=(i < m)[:, None] & (j < n)[None, :])


MODES: dict[str, Callable[[], dict[str, Any]]] = {"hook": _turing.mma_options, "stock": dict, "upcast": dict}

# mode, (m, n, k), block of each, warps, a transposed in memory
MATMULS = [
    ("hook", (70, 64, 96), (64, 64, 32), 4, False),
    ("hook", (33, 17, 40), (32, 32, 32), 2, False),
    ("hook", (60, 16, 48), (64, 16, 16), 4, True),
    ("hook", (128, 61, 50), (128, 64, 32), 8, True),
    ("stock", (33, 17, 40), (32, 32, 32), 2, False),
    ("stock", (60, 16, 48), (64, 16, 16), 4, True),
    ("upcast", (70, 64, 96), (64, 64, 32), 4, False),
]


def matmul_launch(
    mode: str, sizes: tuple[int, int, int], blocks: tuple[int, int, int], warps: int, transposed: bool
) -> tuple[Launch, Tensor]:
    """A launch on random fp16 matrices, and its exact result."""
    m, n, k = sizes
    a, b = torch.randn(m, k).half(), torch.randn(k, n).half()
    arguments = {
        "c_ptr": torch.full((m, n), torch.nan),
        "a_ptr": a.t().contiguous() if transposed else a,
        "b_ptr": b,
        **dict(zip("mnk", sizes, strict=True)),
        "TRANSPOSED": transposed,
        "UPCAST": mode == "upcast",
        **dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True)),
    }
    name = f"{mode} {'x'.join(map(str, blocks))}{' transposed' if transposed else ''}"
    grid = (triton.cdiv(m, blocks[0]), triton.cdiv(n, blocks[1]))
    return Launch(name, matmul_kernel, arguments, {"num_warps": warps, **MODES[mode]()}, grid), a.double() @ b.double()


def relative_error(launch: Launch, exact: Tensor) -> float:
    return ((launch.arguments["c_ptr"].double() - exact).norm() / exact.norm()).item()


def matmul() -> list[dict[str, Any]]:
    """Cost and relative error of every matmul."""
    results = []
    for case in MATMULS:
        launch, exact = matmul_launch(*case)
        usage = inspect(launch.name, emulate(launch), 75)
        results.append({**asdict(usage), "error": relative_error(launch, exact)})
    return results


ORDERS: list[Callable[[list], Any]] = [iter, reversed]


def kernels() -> list[str]:
    """The library's kernels, forward and backward, against their fp64 meaning; raises where one is wrong."""
    launches: list[Launch] = []
    for order in ORDERS:
        torch.manual_seed(0)
        for per_channel, shape in ((False, (3, 5, 3, 3)), (False, (2, 70, 4, 6)), (True, (2, 3, 40, 41))):
            tensors = {
                "shortcut": torch.randn(shape).half(),
                "branch": torch.randn(shape).half().contiguous(memory_format=torch.channels_last),
                "gate": (torch.rand(shape[: 2 if per_channel else 1]) < 0.5).half(),
            }
            upstream = {"y": torch.randn(shape).half(), "pooled": torch.randn(shape[:2]).half()}
            plain, oracle = (
                test_gated_residual.run("torch", tensors, upstream, dtype, True, True)
                for dtype in (torch.float16, torch.float64)
            )
            with poisoned_memory(), emulated(launches, order=order):
                kernel = test_gated_residual.run("triton", tensors, upstream, torch.float16, True, True)
            assert_close_to_oracle(kernel, plain, oracle)
        for case in (
            test_gate_head.Case((5, 3, 4, 5), 1),
            test_gate_head.Case((4, 70, 3, 3), 70, hidden=5, channels_last=True),
            test_gate_head.Case((6, 17, 3, 5), 9, pooled=True),
            test_gate_head.Case((300, 2, 1, 1), 3),
            test_gate_head.Case((37, 3, 2, 2), 3, training=False),
        ):
            parts = test_gate_head.make(case, torch.float16)
            with poisoned_memory(), emulated(launches, order=order):
                kernel = test_gate_head.run("triton", case, None, parts)
            plain, oracle = (test_gate_head.run("torch", case, dtype, parts) for dtype in (None, torch.float64))
            cancels = {"dfc1_bias": "dfc1_weight"} if case.training else {}
            assert_close_to_oracle(kernel, plain, oracle, cancels=cancels)
        for conv in (
            test_gated_conv.Case(in_form="pairs", out_form="sample", live=(True, False)),
            test_gated_conv.Case((2, 17, 7, 7), 20, stride=2, in_form="batch", out_form="batch", x_last=True),
        ):
            inputs = {name: None if t is None else t.half() for name, t in conv.tensors().items()}
            dy = conv.gradient().half()
            with poisoned_memory(), emulated(launches, order=order):
                kernel = test_gated_conv.run("triton", conv, torch.float16, inputs, dy)
            plain, oracle = (
                test_gated_conv.run("torch", conv, dtype, inputs, dy) for dtype in (torch.float16, torch.float64)
            )
            assert_close_to_oracle(kernel, plain, oracle)
    for launch in launches:  # the last program leaves the counter ready for the next launch
        assert not launch.arguments.get("counter_ptr", torch.zeros(1)).any(), launch.name
    return sorted({launch.name for launch in launches})


def replaced(pattern: str, replacement: str, count: int = 0) -> Callable[[str], str]:
    """An edit of PTX; raises where there is nothing to damage."""

    def edit(ptx: str) -> str:
        text, found = re.subn(pattern, replacement, ptx, count=count)
        if not found:
            raise ValueError(f"nothing to damage: {pattern}")
        return text

    return edit


def without_counter_barrier(ptx: str) -> str:
    """Take out the barriers between the last store and the atomic that counts finished programs."""
    at = ptx.rindex("st.global", 0, ptx.index("atom."))
    before, between, after = ptx[:at], *ptx[at:].partition("atom.")[::2]
    return before + replaced(r"bar\.sync.*", "")(between) + "atom." + after


def damage() -> dict[str, Any]:
    """What comes of damaged code: the relative error of a matmul, or the emulator's message."""
    results: dict[str, Any] = {}

    def attempt(name: str, act: Callable[[], float | None]) -> None:
        try:
            results[name] = act()
        except (EmulatorError, NotImplementedError) as error:
            results[name] = str(error)

    def matmul(edit: Callable[[str], str]) -> float:
        launch, exact = matmul_launch(*MATMULS[1])
        emulate(launch, edit=edit)
        return relative_error(launch, exact)

    def head(edit: Callable[[str], str]) -> None:
        case = test_gate_head.Case((2, 5, 3, 3), 1)
        with emulated(edit=edit):
            test_gate_head.run("triton", case, None, test_gate_head.make(case, torch.float16))

    # the two registers of the first mma's first matrix change places
    swap = replaced(r"(mma\.sync\S+\s+\{[^}]*\},\s*\{)\s*(%\w+),\s*(%\w+)\s*(\})", r"\1 \3, \2 \4", count=1)
    attempt("nothing", lambda: matmul(str))
    attempt("nothing in a head", lambda: head(str))
    attempt("swapped registers", lambda: matmul(swap))
    attempt("no barriers", lambda: matmul(replaced(r"bar\.sync.*", "")))
    attempt("no predicate", lambda: matmul(replaced(r"@%p\d+(?= ld\.global)", "")))
    attempt("no barrier before the counter", lambda: head(without_counter_barrier))
    attempt("unknown instruction", lambda: matmul(replaced(r"m16n8k8", "m16n8k16", count=1)))
    return results


def scope() -> dict[str, Any]:
    """Tensor-core instructions with and without the mark, from one cache, and on sm_80."""
    bare, _ = matmul_launch("stock", *MATMULS[1][1:])
    hash_without_hook = compile_launch(bare, 75).hash
    launch, _ = matmul_launch(*MATMULS[1])  # installs the hook
    counts = [compile_launch(each, 75).asm["ptx"].count("mma.sync") for each in (launch, bare, launch, bare)]
    with_mark, without_mark = (compile_launch(each, 80).asm["ptx"].count("m16n8k16") for each in (launch, bare))
    refused = matmul_launch(*MATMULS[1])[0]
    refused.arguments["UPCAST"] = True
    try:
        compile_launch(refused, 75)
        message = ""
    except ValueError as error:
        message = str(error)
    same = compile_launch(bare, 75).hash == hash_without_hook
    return {"sm_75": counts, "sm_80": [with_mark, without_mark], "fp32": message, "same hash": same}


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps({"matmul": matmul, "kernels": kernels, "damage": damage, "scope": scope}[sys.argv[1]]()))
