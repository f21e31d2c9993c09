"""Tables for the terminal: 80 columns wide, whole numbers, one table for all runs of a comparison."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastgate.ops.gated_residual import ResidualCall
from fastgate.ops.measurement import Choice
from fastgate.reports.comparison import compare_runs
from fastgate.reports.paper_tables import print_result
from fastgate.reports.quantities import format_si
from fastgate.reports.tables import print_choices, print_comparison, print_evaluation, print_summary
from fastgate.reports.timing import doubt_times
from fastgate.tuning import Tuned

RESULTS = Path(__file__).parents[2] / "bench" / "results"
SUMMARIES = sorted(RESULTS.glob("training/*/summary.json")) + sorted(RESULTS.glob("controls/*/*/summary.json"))
KIND = ResidualCall(
    256, 16, 32, 32, "bfloat16", "bfloat16", "bfloat16", True, False, True, False, gradient=True, live=True
)


def printed(print_: Any, value: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_(value, console)
    return console.file.getvalue()


def tables(text: str) -> list[dict[str, list[str]]]:
    """First cell -> the other cells, for every table; a table is what lies around a rule, up to a line of words."""
    found: list[dict[str, list[str]]] = []
    previous = ""
    inside = False
    for line in text.splitlines():
        if line.startswith("───"):
            found.append({})
            inside = True
            assert len(line) <= 80 and len(previous) <= 80
        elif inside and (cells := re.split(r" {2,}", line.strip())) and len(cells) > 1:
            assert len(line) <= 80
            found[-1][cells[0]] = cells[1:]
        elif line.strip():
            inside = False
        previous = line
    return found


@pytest.mark.parametrize("file", SUMMARIES, ids=lambda file: f"{file.parents[1].name}-{file.parent.name}")
def test_summaries_of_all_versions_fit(file: Path) -> None:
    summary = json.loads(file.read_text())
    text = printed(print_summary, summary)
    first, *_ = tables(text)
    assert list(first) == list(summary["rows"])
    for name, row in summary["rows"].items():
        accuracy = "untrained" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f}"
        assert first[name] == [
            *(accuracy, f"{100 * row['open_ratio']:.1f}", format_si(row["macs"]), format_si(row["parameters"])),
            *(f"{row['latency_ms']:.3f}", "-", f"{row['images_per_second']:,.0f}"),
        ]
    share = summary["rows"]["compact"]["macs"] / summary["rows"]["unpruned"]["macs"]
    assert f"target: asked for 50% of the MACs, reached {share:.1%}" in text
    assert "busy" not in text  # what was not recorded is not doubted either


@pytest.mark.parametrize("target", [None, 0.4])
def test_the_cost_that_the_target_is_of(target: float | None) -> None:
    summary = json.loads(SUMMARIES[-1].read_text())
    # sections, and another cost
    summary["recipe"] = {
        "data": {"dataset": "digits"}, "model": {"network": "resnet20"}, "run": {"epochs": 3, "seed": 1},
        "search": {"target": target, "cost": "params", "gating": "layer"},
    }  # fmt: skip
    rows = summary["rows"]
    share = rows["compact"]["parameters"] / rows["unpruned"]["parameters"]
    text = printed(print_summary, summary)
    assert "resnet20 on digits, 3 epochs, seed 1" in text
    assert (f"asked for 40% of the parameters, reached {share:.1%}" in text) == (target is not None)
    assert target is not None or "asked for" not in text


def test_the_spread_of_times_and_a_busy_machine() -> None:
    summary = json.loads(SUMMARIES[-1].read_text())
    for row in summary["rows"].values():
        row["latency_ms"], row["latency_ms_quartiles"] = 1.0, [0.99, 1.05]
        row["images_per_second"], row["images_per_second_quartiles"] = 100.0, [98.0, 101.0]
        row["load_average"] = 1.0
    assert "0.990\N{EN DASH}1.050" in printed(print_summary, summary) and "busy" not in printed(print_summary, summary)
    summary["rows"]["compact"]["latency_ms_quartiles"] = [0.95, 1.10]
    text = printed(print_summary, summary)
    assert "busy machine: the quartiles of latency lie 15% (compact) of the median apart" in text
    assert "quiet machine" in text and "load" not in text
    assert len(tables(text)[0]["compact"]) == 7  # still one table
    for row in summary["rows"].values():
        row["load_average"] = 1.25 * summary["environment"]["cpu_cores"] + 0.1
    assert "; the load average was " in printed(print_summary, summary)
    assert doubt_times({"a": {"load_average": 99.0}}, {}) == ""  # cores that nobody knows


def test_comparisons_are_one_table() -> None:
    comparison = compare_runs(sorted(RESULTS.glob("training/cifar10*")))
    text = printed(print_comparison, comparison)
    (table,) = tables(text)
    assert len(comparison["groups"]) == 4
    assert [key for key in table if key.isdigit()] == ["1", "2", "3", "4"]
    assert table["3"] == ["unpruned", "84.41", "+1.34", "40.8 M", "1,902", "-", "1,727"]
    for number, group in enumerate(comparison["groups"], 1):
        (line,) = [line for line in text.splitlines() if line.startswith(f"{number}: ")]
        assert group["folders"][0] in line and "asked for 50% of the MACs, reached" in line


def test_seeds_are_taken_together() -> None:
    folders = sorted(RESULTS.glob("controls/digits/seed?"))
    comparison = compare_runs(folders)
    (group,) = comparison["groups"]
    kept = json.loads((RESULTS / "controls/digits/comparison.json").read_text())["groups"][0]
    assert group["networks"] == kept["networks"] and group["seeds"] == kept["seeds"] and group["differs"] == {}
    text = printed(print_comparison, comparison)
    (table,) = tables(text)
    assert table["random"] == ["99.17±0.68", "+0.72±0.97", "1.35 M", "12,298", "38.1 G", "11"]
    assert "; seeds 1, 2, 3, 4, 5;" in text


def test_an_evaluation_fits() -> None:
    result = {
        "path": "x" * 100, "dataset": "cifar100", "accuracy": 0.98889, "loss": 10.12345, "macs": 125_747_840,
        "parameters": 25_557_032, "latency_ms": 103.25, "latency_ms_quartiles": [102.1, 104.9],
        "images_per_second": 126_305.4, "images_per_second_quartiles": [126_000.0, 127_000.0],
        "load_average": 0.0, "joules_per_image": 0.00225, "energy": {"source": "nvml-counter", "warnings": []},
    }  # fmt: skip
    text = printed(print_evaluation, result)
    (table,) = tables(text)
    assert table == {"98.89": ["10.1235", "126 M", "25.6 M", "103.2", "126,305", "2.25 mJ", "444"]}
    assert "quartiles over the rounds 102.1\N{EN DASH}104.9 ms" in text
    assert text.splitlines()[0] == f"{'x' * 100} on cifar100"  # a path to copy


def test_a_table_of_the_paper_fits() -> None:
    result = json.loads((RESULTS / "paper/short/table2.json").read_text())
    text = printed(print_result, result)
    cells = {cell for line in text.splitlines() for cell in re.split(r" {2,}", line.strip())}
    assert {"47.62 (15.48 - 69.35)", "255.30 (1.00)", "7 min 26 s", "CIFAR-10: channel pruned"} <= cells
    assert len(tables(text)) == 2


def test_choices_are_a_row_per_kind_of_call() -> None:
    times = {"torch": {"eager": 160.0, "captured": 45.1}, "triton": {"eager": 600.0, "captured": 23.1}}
    choice = Choice({"eager": "torch", "captured": "triton"}, times, {"torch": 0.001, "triton": 0.0031}, {})
    text = printed(print_choices, [Tuned(KIND, choice)])
    lines = [re.split(r" {2,}", line.strip()) for line in text.splitlines()[1:]]
    assert max(map(len, text.splitlines()[1:])) <= 80
    assert lines[0] == ["call", "launched", "torch us", "triton us", "chosen", "difference"]
    assert lines[2] == ["gated_residual", "in a graph", "45.1", "23.1", "triton", "3.1e-03"]
    assert lines[3] == ["256x16x32x32 bfloat16,", "eager", "160.0", "600.0", "torch"]
    assert lines[4] == ["NHWC, layer gate, backward"]


def test_a_refused_candidate_has_no_times_and_a_reason() -> None:
    times = {"torch": {"eager": 160.0, "captured": 45.1}}
    choice = Choice(dict.fromkeys(("eager", "captured"), "torch"), times, {"torch": 0.0}, {"triton": "no such kernel"})
    text = printed(print_choices, [Tuned(KIND, choice)])
    assert "gated_residual 256x16x32x32 bfloat16, NHWC, layer gate, backward: triton refused: no such kernel" in text
    assert "600.0" not in text
