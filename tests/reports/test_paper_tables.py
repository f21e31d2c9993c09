"""Results of the paper's tables as people read them, from measures made up here."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from rich.console import Console

from fastgate.paper.results import collect
from fastgate.paper.targets import TARGETS, plan_target
from fastgate.reports.gate_maps import draw_gate_map
from fastgate.reports.paper_tables import print_result, to_markdown, write_result


def measures(accuracy: float, flops: int, **others: Any) -> dict[str, Any]:
    recipe = {"dataset": "cifar10", "network": "resnet110", "epochs": 350, "seed": 1, "lambda_polar": "1"}
    return {
        **{"accuracy": accuracy, "live_accuracy": None, "open_ratio": 100.0, "open_range": None, "polarization": None},
        **{"flops": flops, "macs": flops - 10**6, "parameters": 10**6, "seconds": 3700.0, "joules": None},
        **{"energy": {"warnings": ["cpu: no counter"]}, "network": "resnet110", "control": None, "recipe": recipe},
        **{"conditions": "cifar10, one board", "date": "2026-11-23T00:00:00+00:00", "gates": [[]]},
        **others,
    }


def made_up(target: str, **others: dict[str, Any]) -> dict[str, Any]:
    """A result whose runs all measured the same, but those named in `others`; None there is a run still to come."""
    plan = plan_target(target, "full")
    measured = {run.name: measures(90.0, 200 * 10**6) for run in plan.runs}
    measured |= {run.name: measures(93.0, 250 * 10**6) for run in plan.runs if run.name.endswith("baseline")}
    for name, values in others.items():
        full_name = next(run.name for run in plan.runs if run.name.endswith(name))
        if values is None:
            del measured[full_name]
        else:
            measured[full_name] = values
    return collect(plan, measured)


def printed(result: dict[str, Any]) -> str:
    file = StringIO()
    print_result(result, Console(file=file, width=200))
    return file.getvalue()


def cells(page: str, name: str) -> list[list[str]]:
    """The paper's line and ours of a row, by heading."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    start = next(i for i, line in enumerate(lines) if name in line)
    return [dict(zip(lines[0], line, strict=True)) for line in lines[start : start + 2]]


def test_the_papers_row_lies_above_ours() -> None:
    ours = measures(92.0, 130 * 10**6, open_ratio=50.0, live_accuracy=92.5, joules=5e6)
    page = to_markdown(made_up("table2", **{"cifar10-resnet110-batch256-layer-lambda1": ours}))
    paper, here = cells(page, "layer pruned")
    assert [paper[h] for h in ("by", "top-1 %", "drop", "open %", "FLOPs M (rel)", "training", "energy")] == [
        *("paper", "92.82", "0.86", "53.70", "137.70 (0.54)", "", "")
    ]
    assert [here[h] for h in ("by", "top-1 %", "drop", "open %", "FLOPs M (rel)", "MACs M")] == [
        *("ours: resnet110", "92.00", "1.00", "50.00", "130.00 (0.52)", "129.00")
    ]
    assert (here["training"], here["energy"], here["live gates %"]) == ("1 h 01 min", "5 MJ", "92.50")
    assert "CIFAR-100" in page and "different gate positions" in page


def test_joules_that_nobody_metered_are_explained_below() -> None:
    page = to_markdown(made_up("table6"))
    assert "energy" not in cells(page, "2FC-after")[1]
    assert "- Energy not metered: cpu: no counter." in page


def test_a_range_is_shown_where_gates_are_not_unanimous() -> None:
    divided = measures(90.0, 10**8, open_ratio=50.0, open_range=(25.0, 75.0))
    paper, here = cells(to_markdown(made_up("table5", **{"layer-lambda0": divided})), "λ_polar = 0")
    assert (paper["open %"], here["open %"]) == ("18.52 - 53.70", "50.00 (25.00 - 75.00)")


def test_what_is_missing_says_why() -> None:
    reason = {"reason": "no plain network within 2%"}
    result = made_up("table4", **{"layer-lambda3-equal-macs": reason, "layer-lambda3-gumbel": None})
    text = printed(result)
    assert "ours: none, see below" in text and "ours: none yet" in text
    assert "plain ResNet, MACs of STE (CIFAR-10): no plain network within 2%." in text
    assert "Runs still to come: 1; the same command continues with them." in text


def test_quoted_rows_say_whose_they_are() -> None:
    text = printed(made_up("table3"))
    assert "AMC: He et al., 2018b, quoted in Table 3" in text
    assert cells(to_markdown(made_up("table3")), "AMC")[0]["by"] == "quoted"
    assert "92.42 ± 0.14" in text and "90.00 ± 0.00" in text
    assert "ours: resnet110, 5 seeds" in text


def test_a_narrow_terminal_and_a_pipe_get_whole_cells() -> None:
    file = StringIO()
    print_result(made_up("table2"), Console(file=file, width=80))
    lines = file.getvalue().splitlines()
    assert any("137.70 (0.54)" in line for line in lines)
    table = lines[1 : next(i for i, line in enumerate(lines) if line.startswith("- "))]
    assert max(map(len, table)) <= 80


@pytest.mark.parametrize("target", [name for name in TARGETS if name.startswith("table")])
def test_files_hold_the_result(target: str, tmp_path: Path) -> None:
    result = made_up(target)
    page = write_result(result, tmp_path)
    assert json.loads((tmp_path / f"{target}.json").read_text()) == json.loads(json.dumps(result))
    assert page.read_text() == to_markdown(result, tmp_path / f"{target}.png")
    assert imread(tmp_path / f"{target}.png").std() > 0.05  # something is drawn


@pytest.mark.parametrize("target", ["table2", "table3", "figure4"])
def test_flops_that_an_earlier_version_did_not_record_are_left_out(target: str, tmp_path: Path) -> None:
    plan = plan_target(target, "full")
    measured = {run.name: measures(90.0, 10**8) | {"flops": None} for run in plan.runs}
    result = collect(plan, measured, naive=[] if target == "figure4" else None)
    ours = [row["ours"] for row in result["rows"] if row["ours"] is not None]
    assert ours and all(row["flops"] is row["flops_share"] is row["flops_cut"] is None for row in ours)
    page = write_result(result, tmp_path).read_text()
    assert "nan" not in page and "None" not in page
    assert imread(tmp_path / f"{target}.png").std() > 0.05


def test_no_figure_of_an_unfinished_result(tmp_path: Path) -> None:
    write_result(made_up("table4", **{"layer-lambda3-gumbel": None}), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table4.json", "table4.md"]


def test_a_gate_map_shows_open_and_closed_layers(tmp_path: Path) -> None:
    one = {"name": "λ = 1", "first_epoch": 101, "changes": [102.0], "open_ratios": [[0.0, 1.0]] * 4}
    draw_gate_map([one], "title", tmp_path / "map.png")
    pixels = imread(tmp_path / "map.png")[..., :3].reshape(-1, 3)
    shares = {
        name: float((abs(pixels - color) < 0.02).all(1).mean())
        for name, color in {
            "closed": (0.267, 0.005, 0.329),
            "open": (0.993, 0.906, 0.144),
            "pink": (1, 0.08, 0.576),
        }.items()
    }
    assert shares["closed"] == pytest.approx(shares["open"], rel=0.2) and shares["open"] > 0.1
    assert 0 < shares["pink"] < 0.05
