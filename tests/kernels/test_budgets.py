"""What the kernels cost on GPUs that are not here: no spills, little shared memory, no races by construction.

Compiled for sm_75, sm_80 and sm_90 at the tile sizes of real calls (`budget.py`, in a process without the interpreter).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.budget import counters_without_barrier, low_precision_atomics

# bytes per block: 64 KiB on sm_75; what a block may have at most on sm_80 and sm_90
SHARED = {75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024}


def run_without_interpreter(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("capability", "each"),
    [(75, "kernel"), *(pytest.param(capability, "launch", marks=pytest.mark.slow) for capability in SHARED)],
)
def test_kernels_fit(capability: int, each: str) -> None:
    usages = json.loads(run_without_interpreter("-m", "tests.kernels.budget", str(capability), each))
    assert {usage["name"].split()[-1] for usage in usages} == {
        "gate_head_fwd_kernel",
        "gate_head_bwd_hidden_kernel",
        "gate_head_bwd_kernel",
        "_gated_residual_fwd_kernel",
        "_gated_residual_bwd_kernel",
        "gated_conv_kernel",
        "gated_conv_wgrad_kernel",
    }
    for usage in usages:
        assert (usage["stack"], usage["local"]) == (0, 0), usage
        assert usage["shared"] <= SHARED[capability], usage
        assert usage["low_precision_atomics"] == [], usage
        assert usage["counters_without_barrier"] == 0, usage
        # convolutions on the tensor cores, on sm_75 by way of the stage hook; the others in fp32, not in TF32
        assert (usage["mma"] > 0) == ("gated_conv" in usage["name"] and "fp32" not in usage["name"]), usage


SPILLING = """
import triton, triton.language as tl, torch
from tests.kernels.budget import Launch, compile_launch, inspect

@triton.jit
def spills(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    a = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(a, tl.trans(a), input_precision="ieee") + tl.sum(a) * a)

@triton.jit
def low_precision(x_ptr, y_ptr):
    tl.atomic_add(y_ptr, tl.load(x_ptr))

half, single = (torch.empty(4, dtype=dtype, device="meta") for dtype in (torch.float16, torch.float32))
big = Launch("spills", spills, {"x_ptr": single, "y_ptr": single, "BLOCK": 128}, {"num_warps": 4})
usage = inspect("spills", compile_launch(big, 75), 75)
assert usage.stack > 0 or usage.local > 0, usage
assert usage.shared > 64 * 1024, usage
atomic = Launch("low", low_precision, {"x_ptr": half, "y_ptr": half}, {"num_warps": 1})
usage = inspect("low", compile_launch(atomic, 75), 75)
assert usage.low_precision_atomics, usage
"""


@pytest.mark.slow
def test_a_kernel_that_spills_takes_too_much_or_uses_low_precision_atomics_is_noticed(tmp_path: Path) -> None:
    script = tmp_path / "spilling.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[2])!r})\n{SPILLING}")
    assert run_without_interpreter(str(script)) == ""


def test_a_counter_without_its_barrier_is_noticed() -> None:
    good = "st.global.b32 [%rd1], %r1;\nbar.sync 0;\natom.global.gpu.acq_rel.add.s32 %r2, [%rd2], 1;"
    assert counters_without_barrier(good) == 0
    assert counters_without_barrier(good.replace("bar.sync 0;", "")) == 1


def test_low_precision_atomics_are_told_from_fp32_ones() -> None:
    assert low_precision_atomics("red.global.add.f32 [%rd1], %f1;\nRED.E.ADD.F32.FTZ.RN [R2], R4") == []
    assert low_precision_atomics("atom.global.add.noftz.f16 %h1, [%rd1], %h2;") != []
    assert low_precision_atomics("ATOMG.E.CAS.STRONG.GPU PT, R0, [R2], R4, R5") != []
