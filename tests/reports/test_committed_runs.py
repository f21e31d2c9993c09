"""Run folders of all versions so far are read: those in bench/results, which the README's tables come from."""

import ast
import json
import re
from pathlib import Path

import pytest

from fastgate import reports
from fastgate.reports.comparison import compare_runs
from fastgate.reports.html import write_report
from fastgate.reports.recipes import read_recipe
from fastgate.reports.runs import Phase, read_run
from fastgate.training.presets import get_preset
from fastgate.training.recipe import change, list_values, recipe_to_dict
from tests.reports.test_html import read_tables

RESULTS = Path(__file__).parents[2] / "bench" / "results"
RUNS = sorted(path.parent for path in RESULTS.glob("training/*/config.json"))
KEPT = sorted(path.parent for path in RESULTS.glob("controls/*/*/summary.json"))  # without config.json


@pytest.mark.parametrize("folder", [*RUNS, *KEPT], ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_a_report_says_what_the_folder_holds_and_nothing_more(folder: Path, tmp_path: Path) -> None:
    page = write_report([folder], tmp_path / "report.html")
    summary = json.loads((folder / "summary.json").read_text())
    header, *rows = read_tables(page)[0]
    assert [row[0] for row in rows] == list(summary["rows"])
    fields = {
        "top-1": "accuracy", "MACs": "macs", "latency": "latency_ms", "images/s": "images_per_second",
        "training time": "seconds_training", "training MACs": "macs_training", "training energy": "joules_training",
        "energy/image": "joules_per_image",
    }  # fmt: skip
    for row in rows:
        shown, true = dict(zip(header, row, strict=True)), summary["rows"][row[0]]
        for title, field in fields.items():
            if title in shown:
                assert (shown[title] == "-") == (field not in true), title
            else:
                assert all(field not in other for other in summary["rows"].values())
    share = summary["rows"]["compact"]["macs"] / summary["rows"]["unpruned"]["macs"]
    assert f"Asked for 50% of the MACs. The compact network has {share:.1%} of the unpruned" in page.read_text()
    assert 'class="doubt"' not in page.read_text()


@pytest.mark.parametrize("folder", [*RUNS, *KEPT], ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_it_is_compared(folder: Path) -> None:
    (group,) = compare_runs([folder])["groups"]
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    for name, measures in group["networks"].items():
        assert measures["accuracy"]["mean"] == rows[name]["accuracy"]
        assert (measures["macs_training"] is None) == ("macs_training" not in rows[name])
    assert group["share_reached"]["mean"] == rows["compact"]["macs"] / rows["unpruned"]["macs"]


def test_phases_of_a_version_that_did_not_write_them() -> None:
    run = read_run(RESULTS / "training/cifar10-resnet56-layer-h200")
    assert run.phases == [Phase("open", 1, 2), Phase("search", 3, 8), Phase("settled", 9, 20)]
    assert run.controls["equal-macs"].phases == []
    kept = read_run(RESULTS / "controls/digits/seed1")  # 0.1, 0.25 and 0.4 of 20 epochs
    assert kept.phases == [Phase("open", 1, 2), Phase("search", 3, 8), Phase("settled", 9, 20)]


def test_a_sub_network_trained_from_scratch_was_settled_from_the_start(tmp_path: Path) -> None:
    folder = RESULTS / "controls/digits/seed1"
    for name, file in (("summary.json", "summary.json"), ("metrics.jsonl", "metrics-retrain.jsonl")):
        (tmp_path / name).write_text((folder / file).read_text())
    assert read_run(tmp_path).phases == [Phase("settled", 1, 20)]


def test_a_folder_that_lacks_nearly_everything(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"recipe": {"epochs": 3}}')
    lines = [{"epoch": epoch, "train": {"loss": 1.0}, "eval": {"accuracy": 0.5}} for epoch in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report([tmp_path])
    conditions = {row[0]: row[1] for row in read_tables(page)[-2]}
    assert {conditions[name] for name in ("seed", "GPU", "versions", "variables", "precision")} == {"-"}
    assert conditions["system"] == "Python -, CUDA -, -"
    assert "not finished: 2 of 3 epochs are done" in page.read_text()
    assert "the runs are of a version that did not meter it" in page.read_text()
    header, _, row = read_tables(page)[0]
    assert dict(zip(header, row, strict=True))["top-1"] == "50.00%"
    assert not re.search(r"\bNone\b", page.read_text())


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_macs_of_gates_that_were_not_recorded_are_left_out(folder: Path, tmp_path: Path) -> None:
    recorded = "gate_macs" in json.loads((folder / "summary.json").read_text())
    (gates,) = (table for table in read_tables(write_report([folder], tmp_path / "report.html")) if table[0][0] == "#")
    assert ("MACs" in gates[0]) == recorded and "unanimity" in gates[0]


@pytest.mark.parametrize("file", sorted(Path(reports.__path__[0]).glob("*.py")), ids=lambda file: file.stem)
def test_reports_build_and_load_no_networks(file: Path) -> None:
    """What they say was measured when the run was: nothing they import could do it again."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    training = ("networks", "network_names", "pipeline", "trainer", "zoo")
    forbidden = {"fastgate", *(f"fastgate.training.{name}" for name in training)}
    forbidden |= {f"fastgate.pruning.{name}" for name in ("compaction", "costs", "latency", "storage")}
    assert not modules & forbidden
    assert not {module for module in modules if module.startswith("fastgate.models")}


def test_recipes_in_sections_and_flat_ones_say_the_same() -> None:
    """Whatever shape a recipe has, its facts are found; a section's own name is no field."""
    recipe = get_preset("cifar10-channel")
    flat = list_values(recipe)
    flat["target_macs"] = flat.pop("target")  # as the first version called it
    one, other = read_recipe(flat), read_recipe(recipe_to_dict(change(recipe, target=0.3)))
    for name in ("dataset", "network", "gating", "epochs", "seed", "precision", "cost", "open_until", "weights"):
        assert getattr(one, name) == getattr(other, name) is not None
    assert (one.target, other.target) == (0.5, 0.3)
    assert other.fields["dataset"] == "cifar10" and other.fields.keys() == list_values(recipe).keys()
