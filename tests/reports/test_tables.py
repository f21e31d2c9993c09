"""Tables for the terminal."""

import io

from rich.console import Console

from fastgate.ops.choices import Choice
from fastgate.ops.gated_residual import ResidualCall
from fastgate.reports.tables import print_choices
from fastgate.tuning import Tuned

KIND = ResidualCall(
    256, 16, 32, 32, "bfloat16", "bfloat16", "bfloat16", True, False, True, False, gradient=True, live=True
)


def printed(choice: Choice) -> str:
    console = Console(file=io.StringIO(), width=180)
    print_choices([Tuned(KIND, choice)], console)
    return console.file.getvalue()


def test_choices_are_a_line_per_kind_of_call() -> None:
    times = {"torch": {"eager": 160.0, "captured": 45.1}, "triton": {"eager": 600.0, "captured": 23.1}}
    choice = Choice({"eager": "torch", "captured": "triton"}, times, {"torch": 0.001, "triton": 0.0031}, {})
    (line,) = [line for line in printed(choice).splitlines() if "gated_residual" in line]
    cells = [cell.strip() for cell in line.split("│")]
    assert cells[1:-1] == [
        "gated_residual", "256x16x32x32 bfloat16, NHWC, layer gate, backward", "45.1", "23.1", "triton", "160.0",
        "600.0", "torch", "3.1e-03",
    ]  # fmt: skip


def test_a_refused_candidate_has_no_times_and_a_reason() -> None:
    times = {"torch": {"eager": 160.0, "captured": 45.1}}
    choice = Choice(dict.fromkeys(("eager", "captured"), "torch"), times, {"torch": 0.0}, {"triton": "no such kernel"})
    text = printed(choice)
    assert "gated_residual 256x16x32x32 bfloat16, NHWC, layer gate, backward: triton refused: no such kernel" in text
    assert "600.0" not in text
