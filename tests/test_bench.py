"""The benchmarks run, and their report says what is in the file they wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import report
from bench.scaling import add_run
from tests.training.runs import run_parallel

ROOT = Path(__file__).parents[1]


def run_benchmarks(*arguments: str) -> None:
    # pytest-benchmark measures nothing in a process that believes to be a worker of xdist
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_recorded_run_becomes_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    run_benchmarks("bench/test_gated_residual.py", f"--benchmark-json={file}", "-k", "stage3")
    medians = {
        tuple(b["extra_info"][key] for key in ("kind", "mode", "provider", "open_fraction")): b["stats"]["median"]
        for b in json.loads(file.read_text())["benchmarks"]
    }
    records = report.ratios(report.read_rows(file)[0])
    assert records != []
    for record in records:
        ours = medians[record["kind"], record["mode"], "fastgate", record["open_fraction"]]
        assert record["vs"] == pytest.approx(
            {
                "eager": medians[record["kind"], record["mode"], "eager", 0.5] / ours,
                "ungated": medians["none", record["mode"], "ungated", 1.0] / ours,
            }
        )
    assert report.main([str(file)]) == 0
    printed = capsys.readouterr().out
    assert "resnet110-stage3-batch64-float32" in printed
    assert f"{records[0]['vs']['eager']:.2f}x" in printed
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_of_another_kind_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.json"
    file.write_text("{}")
    assert report.main([str(file)]) == 2
    assert "expected a file written by python -m bench.record" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["test_gate_head", "test_compact"])
def test_benchmarks_run_without_timing(name: str) -> None:
    run_benchmarks(f"bench/{name}.py", "--benchmark-disable", "-k", "stage3 or 0.5-1")


def test_scaling_adds_a_run_of_two_processes_to_its_file(tmp_path: Path) -> None:
    file = tmp_path / "scaling.json"
    arguments = ["--network", "resnet8", "--batch-size", "8", "--steps", "1", "--rounds", "1", "--device", "cpu"]
    result = run_parallel(2, "-m", "bench.scaling", *arguments, "--output", file)
    assert result.returncode == 0, result.stderr
    content = json.loads(file.read_text())
    rows = content["runs"]["2"]["rows"]
    assert {name: row["images"] for name, row in rows.items()} == {
        "shared": 8,
        "shared, own statistics": 8,
        "a batch each": 16,
    }
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 for row in rows.values())
    runs = add_run(file, content["options"], 4, {"rows": rows})
    assert runs.keys() == {"2", "4"} == json.loads(file.read_text())["runs"].keys()
    with pytest.raises(ValueError, match="expected runs of .*'steps': 2.*choose another --output"):
        add_run(file, {**content["options"], "steps": 2}, 1, {"rows": rows})
