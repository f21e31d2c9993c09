"""The benchmarks run, and their report says what is in the file they wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import input_pipeline, report

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


def test_the_share_of_the_input_pipeline() -> None:
    row = input_pipeline.measure("digits", None, "resnet8", 128)
    made, trained = row["batch_milliseconds"], row["step_milliseconds"]
    assert made > 0 and trained > 0 and row["share"] == pytest.approx(made / (made + trained))
    assert len(row["rounds_milliseconds"]) == input_pipeline.ROUNDS
