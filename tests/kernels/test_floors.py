"""Lower bounds of the kernels' times, computed from their machine code, stay near what the GPU's memory alone takes.

Batch 256, fp16, everything open, on the model of a T4 (`sass.py`): compiled, counted, never run. One representative of
each kernel is compiled in every run of the tests; the others are slow.
"""

import json
from typing import Any

import pytest

from tests.kernels import sass
from tests.kernels.test_budgets import run_without_interpreter

STAGES = ("resnet110-stage1", "resnet110-stage2", "resnet110-stage3")


def rows(*arguments: str) -> list[dict[str, Any]]:
    output = run_without_interpreter("-m", "bench.floors", "--json", "--capability", "75", *arguments)
    found = json.loads(output)
    assert found != []
    return found


def bound(row: dict[str, Any]) -> float:
    """The most that a row's lower bound may be of its floor."""
    if row["kernel"].startswith("residual"):
        return 1.1
    if row["kernel"] == "head forward":
        return 1.3  # without its serial ending, whose time this model does not know
    if row["layout"] == "NCHW":
        return 3.0
    if row["kernel"] == "conv wgrad":
        return 2.5
    return 2.2 if row["shape"].endswith("stage3") else 1.7


def check(found: list[dict[str, Any]]) -> None:
    for row in found:
        assert row["ratio"] <= bound(row), row
        assert row["spills"] == 0, row
        assert row["bound_us"] >= row["floor_us"] > 0, row


def test_one_of_each_kernel() -> None:
    cases = [
        "conv forward/pairs",
        "conv dgrad/live",
        "conv wgrad/pairs",
        "residual forward/channel",
        "head forward/layer",
    ]
    options = [word for case in cases for word in ("--case", case)]
    found = rows(*options, "--shape", "resnet110-stage2", "--layout", "NHWC")
    by_case = {f"{row['kernel']}/{row['gates']}": row for row in found}
    assert by_case.keys() == set(cases) and len(found) == len(cases)
    check(found)
    for case in cases[:3]:
        # vectors of 8 values: a gather of 2 bytes in the hot loop would be 8 times the loads
        assert by_case[case]["loads"].keys() <= {"LDG.128", "LDG.64"}, case
    # the gradient of a gate is summed over its tiles by another launch
    assert [by_case[case]["launches"] for case in cases[:3]] == [1, 2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_all_of_resnet110(layout: str) -> None:
    found = rows("--shape", "resnet110", "--layout", layout)
    assert {row["shape"] for row in found} == set(STAGES)
    assert len(found) == 3 * (3 * 5 + 3 * 2)
    check(found)


LISTING = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA 0x90 ;
        /*0020*/                   LDG.E.128.SYS R4, [R2] ;
        /*0030*/                   STG.E.SYS [R2], R8 ;
        /*0040*/                   HMMA.1688.F32 R8, R4, R6, R8 ;
        /*0050*/               @P1 BRA 0x20 ;
        /*0060*/                   LDG.E.U16.SYS R4, [R2] ;
        /*0070*/               @P2 BRA 0x20 ;
        /*0080*/                   EXIT ;
        /*0090*/                   LDG.E.SYS R4, [R2] ;
        /*00a0*/                   BRA 0x20 ;
        /*00b0*/                   BRA 0xb0;
        /*00c0*/                   NOP;
"""


def test_the_ending_is_what_follows_the_counter() -> None:
    code = sass.parse("""
        /*0000*/                   LDG.E.SYS R4, [R2] ;
        /*0010*/              @!P0 BRA 0x50 ;
        /*0020*/                   ATOMG.E.ADD.STRONG.GPU PT, R0, [R2], R4 ;
        /*0030*/               @P1 EXIT ;
        /*0040*/                   LDG.E.128.SYS R4, [R2] ;
        /*0050*/                   EXIT ;
    """)
    assert [each.address for each in sass.ending(code)] == [0x30, 0x40, 0x50]
    assert sass.ending(code[:2]) == []


def test_the_reader_of_machine_code() -> None:
    code = sass.parse(LISTING)
    assert [each.address for each in code][-1] == 0xA0  # without the padding
    assert code[2].bytes == 16 and code[6].bytes == 2 and code[9].bytes == 4
    assert sass.widths(code) == {"LDG.128": 1, "LDG.16": 1, "LDG.32": 1}
    (loop,) = sass.loops(code)  # the jump back from behind the exit is none
    assert [each.address for each in loop] == [0x20, 0x30, 0x40, 0x50, 0x60, 0x70]
    assert sass.hot_loop(code) == loop
    assert sass.macs(loop) == 1024 and sass.loaded(loop) == 32 * (16 + 2)
    parts = sass.busy(loop, sass.T4)
    # four schedulers share 6 instructions; 8 cycles of one tensor core; 512 + 128 + 128 bytes at 64 a cycle
    assert (parts["issue"], parts["tensor"], parts["memory"]) == (6 / 4, 8 / 4, 12)
