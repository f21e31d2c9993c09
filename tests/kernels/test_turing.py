"""sm_75 without a GPU: fp16 dots reach its tensor cores, and what is compiled for it computes what it should.

The PTX runs in an emulator (`ptx.py`) in processes without the interpreter (`turing.py`).
"""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
from fastgate.kernels import _turing

from tests.kernels import test_gate_head, test_gated_conv
from tests.kernels.budget import Launch
from tests.kernels.compare import assert_close_to_oracle, poisoned_memory
from tests.kernels.jit import jitted
from tests.kernels.ptx import EmulatorError, Memory, Program, emulated
from tests.kernels.test_budgets import SHARED, run_without_interpreter


@pytest.fixture(autouse=True)
def no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTGATE_TURING_MMA", raising=False)


def check(name: str) -> Any:
    return json.loads(run_without_interpreter("-m", "tests.kernels.turing", name))


def test_matmul() -> None:
    results = check("matmul")
    assert {result["name"].split()[0] for result in results} == {"hook", "stock", "upcast"}
    for result in results:
        assert (result["mma"] > 0) == result["name"].startswith("hook"), result
        assert (result["stack"], result["local"]) == (0, 0), result
        assert result["shared"] <= SHARED[75], result
        assert result["error"] < 1e-6, result  # products of fp16 are exact in fp32


def test_kernels_of_the_library() -> None:
    assert check("kernels") == [
        "_gated_residual_bwd_kernel",
        "_gated_residual_fwd_kernel",
        "gate_head_bwd_hidden_kernel",
        "gate_head_bwd_kernel",
        "gate_head_fwd_kernel",
        "gated_conv_kernel",
        "gated_conv_wgrad_kernel",
    ]


@pytest.mark.gpu
def test_the_code_for_sm_75_runs_on_a_newer_gpu() -> None:
    launches: list[Launch] = []
    for conv in (
        test_gated_conv.Case((16, 16, 12, 12), 16, in_form="pairs", live=(True, False), x_last=True),
        test_gated_conv.Case((8, 70, 7, 9), 40, stride=2, in_form="batch", out_form="sample"),
    ):
        tensors = {name: None if t is None else t.half() for name, t in conv.tensors().items()}
        dy = conv.gradient().half()
        with poisoned_memory(), jitted(launches):
            kernel = test_gated_conv.run("triton", conv, torch.float16, tensors, dy)
        plain, oracle = (
            test_gated_conv.run("torch", conv, dtype, tensors, dy) for dtype in (torch.float16, torch.float64)
        )
        assert_close_to_oracle(kernel, plain, oracle)
    for head in (test_gate_head.Case((300, 16, 8, 8), 1), test_gate_head.Case((64, 70, 4, 4), 70, channels_last=True)):
        parts = test_gate_head.make(head, torch.float16)
        with poisoned_memory(), jitted(launches):
            kernel = test_gate_head.run("triton", head, None, parts)
        plain, oracle = (test_gate_head.run("torch", head, dtype, parts) for dtype in (None, torch.float64))
        assert_close_to_oracle(kernel, plain, oracle, cancels={"dfc1_bias": "dfc1_weight"})
    # on its tensor cores, by way of the hook
    marked = [launch.name for launch in launches if "allowed_dot_input_precisions" in launch.options]
    assert set(marked) == {"gated_conv_kernel", "gated_conv_wgrad_kernel"}


def test_damage_is_noticed() -> None:
    results = check("damage")
    assert results["nothing"] < 1e-6 and results["nothing in a head"] is None
    assert results["swapped registers"] > 0.1
    assert "no barrier between" in results["no barriers"]
    assert "outside every tensor" in results["no predicate"]
    assert "no barrier between" in results["no barrier before the counter"]
    assert "mma.sync.aligned.m16n8k16" in results["unknown instruction"]


def test_the_mark_decides_and_touches_nothing_else() -> None:
    results = check("scope")
    with_mark, without_mark, *again = results["sm_75"]
    assert with_mark > 0 and without_mark == 0 and again == [with_mark, without_mark]
    assert results["sm_80"][0] == results["sm_80"][1] > 0
    assert "not all dots" in results["fp32"]
    assert results["same hash"]  # of an unmarked kernel, before and after the hook was installed


def test_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    device, triton_hook = torch.device("cuda", 0), _turing.knobs.runtime.add_stages_inspection_hook
    monkeypatch.setattr(_turing.knobs.runtime, "add_stages_inspection_hook", triton_hook)
    assert _turing.plan_dot(torch.device("cpu"), torch.float16) == (False, {})
    for arch in (80, 90):
        monkeypatch.setattr(_turing, "capability", lambda device, arch=arch: arch)
        assert _turing.plan_dot(device, torch.float16) == (False, {})
    monkeypatch.setattr(_turing, "capability", lambda device: 75)
    assert _turing.plan_dot(device, torch.float32) == (False, {})
    assert _turing.plan_dot(device, torch.bfloat16) == (True, {})
    monkeypatch.setenv("FASTGATE_TURING_MMA", "0")
    assert _turing.plan_dot(device, torch.float16) == (True, {})
    monkeypatch.setenv("FASTGATE_TURING_MMA", "yes")
    with pytest.raises(ValueError, match="expected 0, 1 or unset"):
        _turing.plan_dot(device, torch.float16)
    assert _turing.knobs.runtime.add_stages_inspection_hook is triton_hook
    monkeypatch.delenv("FASTGATE_TURING_MMA")
    upcast, options = _turing.plan_dot(device, torch.float16)
    assert not upcast and options != {}


def test_an_unknown_version_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "9.9.0")
    assert not _turing.hook_wanted()
    monkeypatch.setenv("FASTGATE_TURING_MMA", "1")
    with pytest.raises(RuntimeError, match=r"this is Triton 9\.9\.0"):
        _turing.hook_wanted()


def test_another_tools_hook_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []

    def other(*arguments: Any) -> tuple[str, str] | None:
        calls.append(arguments)
        return None if arguments else ("key", "hash")

    runtime = _turing.knobs.runtime
    monkeypatch.setattr(runtime, "add_stages_inspection_hook", other)
    options = _turing.mma_options()
    hook = runtime.add_stages_inspection_hook
    _turing.mma_options()
    assert runtime.add_stages_inspection_hook is hook  # once
    assert hook() == ("key", "hash")
    stages = {"ttgir": other}
    hook("backend", stages, SimpleNamespace(**options), "language", 80)
    assert stages == {"ttgir": other} and len(calls) == 2


def test_the_interpreter_is_not_taken_for_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"), emulated():
        pass


HEAD = ".visible .entry k(\n\t.param .u64 .ptr .global .align 1 k_param_0\n)\n{\n"
REGISTERS = "\t.reg .pred %p<9>;\n\t.reg .b32 %r<9>;\n\t.reg .b64 %rd<9>;\n"
START = "ld.param.b64 %rd1, [k_param_0]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;"
SHARED_STORE = "shl.b32 %r2, %r1, 2; st.shared.b32 [%r2], %r1; "


def run_ptx(body: str, words: int = 64) -> np.ndarray:
    """Run a kernel of two warps on an array of its own."""
    out, memory = torch.zeros(words, dtype=torch.int32), Memory()
    address = memory.address(out)
    Program(f"{HEAD}{REGISTERS}{START}\n{body}\nret;\n}}\n", num_warps=2, shared_bytes=256).run((1,), memory, [address])
    memory.copy_back()
    return out.numpy()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("setp.gt.s32 %p1, %r1, 99; @%p1 popc.b32 %r3, %r1;", "popc.b32"),
        ("add.sat.s32 %r3, %r1, %r1;", "add.sat.s32"),
        ("ld.b32 %r3, [%rd3];", "ld.b32"),
        ("bar.sync 1, 64;", "bar.sync 1, 64"),
    ],
    ids=["instruction-not-reached", "modifier", "generic-address", "named-barrier"],
)
def test_what_is_not_known_is_refused(body: str, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        run_ptx(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"{SHARED_STORE} xor.b32 %r4, %r2, 128; ld.shared.b32 %r3, [%r4];", "another warp's store and this read"),
        (f"{SHARED_STORE} st.shared.b32 [0], %r1;", "store and this one of another value"),
        ("ld.shared.b32 %r3, [0]; st.shared.b32 [0], 7;", "another warp's read and this store"),
        ("st.global.b32 [%rd3], %r1; setp.eq.b32 %p1, %r1, 0; @%p1 atom.global.gpu.acq_rel.add.u32 %r3, [%rd1], 1;",
         "another warp's store and this release"),
        ("setp.gt.s32 %p1, %r1, 3; @%p1 bra $L1; mov.b32 %r3, 1; $L1: ret;", "divergent"),
        ("ld.global.b32 %r3, [%rd3+256];", "outside every tensor"),
        ("ld.global.v2.b32 {%r3, %r4}, [%rd3];", "misaligned"),
        ("ld.shared.b32 %r3, [256];", "out of bounds"),
        ("$L1: bra $L1;", "endless"),
    ],
    ids=["raw", "waw", "war", "release", "divergent", "outside", "misaligned", "shared-bounds", "endless"],
)  # fmt: skip
def test_what_a_gpu_would_do_wrong_is_an_error(body: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Program, "max_steps", 1000)
    with pytest.raises(EmulatorError, match=message):
        run_ptx(body)
    if "%r4, %r2, 128" in body:  # with the barrier it is right
        run_ptx(body.replace("xor", "bar.sync 0; xor"))


@pytest.mark.parametrize(
    ("instruction", "meaning"),
    [
        ("mul.hi.u32 %r3, %r2, -1431655765;", lambda i, v: (v * 0xAAAAAAAB >> 32)),
        ("mul.hi.s32 %r3, %r2, -1431655765;", lambda i, v: (signed(v) * signed(0xAAAAAAAB)) >> 32),
        ("shr.s32 %r3, %r2, 7;", lambda i, v: signed(v) >> 7),
        ("shr.u32 %r3, %r2, %r1;", lambda i, v: v >> i),
        ("shl.b32 %r3, %r2, %r1;", lambda i, v: v << i),
        ("rem.s32 %r3, %r2, 7;", lambda i, v: int(np.fmod(signed(v), 7))),
        ("div.s32 %r3, %r2, -7;", lambda i, v: int(signed(v) / -7)),
        ("bfe.u32 %r3, %r2, %r1, 5;", lambda i, v: v >> i & 31),
        ("bfe.s32 %r3, %r2, 3, 5;", lambda i, v: ((v >> 3 & 31) ^ 16) - 16),
        ("bfe.s32 %r3, %r2, 28, 9;", lambda i, v: signed(v) >> 28),
        ("bfi.b32 %r3, %r2, -1, 4, 8;", lambda i, v: 0xFFFFF00F | (v & 255) << 4),
        ("prmt.b32 %r3, %r2, %r1, 0x4012;", lambda i, v: v >> 16 & 255 | v & 0xFF00 | (v & 255) << 16 | i << 24),
        ("prmt.b32 %r3, %r2, 0, 0xBBBB;", lambda i, v: 0xFFFFFFFF if v >> 31 else 0),
        ("lop3.b32 %r3, %r2, %r1, 0xFF, 0x96;", lambda i, v: v ^ i ^ 0xFF),
        ("cvt.s32.s8 %r3, %r2;", lambda i, v: (v & 255 ^ 128) - 128),
        ("cvt.rn.f32.s32 %r4, %r2; cvt.rzi.s32.f32 %r3, %r4;", lambda i, v: min(int(np.float32(signed(v))), 2**31 - 1)),
        ("mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs2, %rs1};", lambda i, v: v >> 16 | v << 16),
        ("shfl.sync.bfly.b32 %r3, %r1, 16, 31, -1;", lambda i, v: i ^ 16),
        ("shfl.sync.up.b32 %r3, %r1, 3, 0, -1;", lambda i, v: i - 3 if i % 32 >= 3 else i),
        ("shfl.sync.idx.b32 %r3, %r1, 5, 31, -1;", lambda i, v: i // 32 * 32 + 5),
        ("shfl.sync.down.b32 %r3, %r1, 1, 0x181f, -1;", lambda i, v: i + 1 if i % 8 < 7 else i),
        ("setp.lt.u32 %p1, %r1, 9; setp.gt.or.u32 %p2, %r1, 60, %p1; selp.b32 %r3, 1, 0, %p2;",
         lambda i, v: int(i < 9 or i > 60)),
        ("mad.wide.s32 %rd4, %r2, %r2, %rd1; shr.u64 %rd4, %rd4, 32; cvt.u32.u64 %r3, %rd4;",
         lambda i, v: (signed(v) ** 2 + 256) >> 32),
        ("atom.shared.add.u32 %r4, [0], 1; mov.b32 %r3, 0; setp.eq.b32 %p1, %r1, 63; @%p1 add.s32 %r3, %r4, 2;",
         lambda i, v: 64 if i == 63 else 0),
    ],
)  # fmt: skip
def test_instructions(instruction: str, meaning: Any) -> None:
    # a value of mixed bits and both signs for each thread; fresh shared memory is 0xFFFFFFFF
    value = "mul.lo.s32 %r2, %r1, -1640531527; .reg .b16 %rs<9>;"
    got = run_ptx(f"{value} {instruction} st.global.b32 [%rd3], %r3;").view(np.uint32)
    expected = [meaning(i, i * 2654435769 & 0xFFFFFFFF) & 0xFFFFFFFF for i in range(64)]
    assert got.tolist() == expected


def signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value
