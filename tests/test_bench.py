"""The benchmarks run, and their report says what is in the file they wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import fastgate as fg
from bench import input_pipeline, report, tries, worth
from bench.record_gates import read_gates, record_gates
from bench.scaling import add_run
from bench.test_gated_conv import Convolution, make_gate
from fastgate.reports.comparison import compare_runs
from fastgate.training.callbacks import Checkpoints
from fastgate.training.data import Batches
from fastgate.training.networks import load_network
from fastgate.training.pipeline import Run, start_trainer
from fastgate.training.recipe import change, recipe_to_dict
from fastgate.training.trainer import Trainer
from tests.training.runs import TINY, run_parallel

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


def made_up_file(folder: Path, rows: list[dict]) -> Path:
    file = folder / "made-up.json"
    benchmarks = [{"extra_info": row, "stats": {"median": row.pop("us") * 1e-6}} for row in rows]
    file.write_text(json.dumps({"benchmarks": benchmarks, "machine_info": {}}))
    return file


def test_gates_of_real_runs_have_no_curve(tmp_path: Path) -> None:
    conv = {"op": "gated_conv", "case": "made-up", "mode": "forward"}
    rows = [
        {**conv, "kind": kind, "open_fraction": fraction, "provider": provider, "us": us}
        for kind, fraction in (("pairs", 0.5), ("settled", 0.4), ("recorded", 0.3))
        for provider, us in (("fastgate", 60.0), ("dense", 100.0))
    ]
    times = report.relative_times(report.read_rows(made_up_file(tmp_path, rows))[0])
    assert times == {("pairs", "made-up", "forward", "fastgate"): {0.5: pytest.approx(0.6)}}


@pytest.mark.parametrize("name", ["amd-epyc/2026-11-22", "nvidia-h200/2026-11-27", "nvidia-h200/step"])
def test_tables_fit_a_terminal_and_pictures_a_page(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = ROOT / "bench" / "results" / f"{name}.json"
    assert report.main([str(file), "--picture", str(tmp_path / "a.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines and max(map(len, lines)) <= 100 and not any("…" in line for line in lines)
    assert any(line.startswith("│") for line in lines) == (tmp_path / "a.png").exists() == ("step" not in name)
    if (tmp_path / "a.png").exists():
        width, height = Image.open(tmp_path / "a.png").size
        assert height <= 1.5 * width  # A4


@pytest.mark.parametrize("batch", [64, 256, 300])
def test_recorded_gates_differ_from_sample_to_sample(batch: int) -> None:
    for stage, channels in ((1, 16), (2, 32), (3, 64)):
        conv = Convolution("resnet110", stage, batch, channels, 8)
        gate = make_gate(conv, "recorded", None, torch.float32, torch.device("cpu"))
        assert gate.shape == (batch, channels) and set(gate.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(gate[256:], gate[: max(0, batch - 256)])
        varying = (gate.mean(0) > 0) & (gate.mean(0) < 1)
        assert varying.sum() >= channels // 4, stage


def checkpoints(trainer: Trainer) -> Checkpoints:
    (found,) = (callback for callback in trainer.callbacks if isinstance(callback, Checkpoints))
    return found


def test_gates_are_recorded_as_the_network_decides(tmp_path: Path) -> None:
    options = {"network": "resnet14", "epochs": 1, "open_until": 0.0, "anneal_until": 0.0, "settle_at": None}
    run = Run(change(TINY, gating="channel", init_logit=None, **options), tmp_path)
    dataset = run.load_data()
    trainer = start_trainer(run, dataset, resume=False)
    trainer.fit()
    with torch.no_grad():
        for gate in trainer.search.gates.values():  # whatever it has learned: some open for all, some for none
            gate.fc2.bias[:8] += torch.tensor([100.0, -100.0] * 4)
    checkpoints(trainer)._save(trainer)
    record_gates(tmp_path, tmp_path, tmp_path / "gates.npz")
    recorded, conditions = read_gates(tmp_path / "gates.npz")
    model, _ = load_network(tmp_path / "checkpoint.pt")
    with torch.no_grad():
        model.eval()(next(iter(Batches(dataset, dataset.test, 256)))[0])
    gates = dict(fg.named_gates(model))
    for stage, opened in recorded.items():
        decisions = gates[f"layer{stage}.1.gate"].decisions
        assert 0 < decisions.mean() < 1
        assert torch.equal(opened, decisions == 1)
    assert conditions["recipe"] == recipe_to_dict(run.recipe)
    for gate in trainer.search.gates.values():
        gate.freeze(torch.ones(gate.gates, dtype=torch.bool))
    checkpoints(trainer)._save(trainer)
    with pytest.raises(ValueError, match="expected a run of live channel gates, got gating 'channel' or frozen ones"):
        record_gates(tmp_path, tmp_path)


def test_a_file_of_another_kind_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.json"
    file.write_text("{}")
    assert report.main([str(file)]) == 2
    assert "expected a file written by python -m bench.record" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["test_gate_head", pytest.param("test_compact", marks=pytest.mark.slow)])
def test_benchmarks_run_without_timing(name: str) -> None:
    run_benchmarks(f"bench/{name}.py", "--benchmark-disable", "-k", "stage3 or 0.5-1")


def test_the_share_of_the_input_pipeline() -> None:
    row = input_pipeline.measure("digits", None, "resnet8", 128)
    made, trained = row["batch_milliseconds"], row["step_milliseconds"]
    assert made > 0 and trained > 0 and row["share"] == pytest.approx(made / (made + trained))
    assert len(row["rounds_milliseconds"]) == input_pipeline.ROUNDS


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
    with pytest.raises(ValueError, match=r"expected runs of .*'steps': 2.*choose another --output"):
        add_run(file, {**content["options"], "steps": 2}, 1, {"rows": rows})


@pytest.mark.parametrize("study", sorted(path.parent.name for path in worth.RESULTS.glob("*/table.md")))
def test_tables_of_the_search_are_those_of_its_runs(study: str, tmp_path: Path) -> None:
    results = worth.read_results(study)
    worth.write_table(results, tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text() == (worth.RESULTS / study / "table.md").read_text()
    # `fastgate compare` reads the runs: its mean is the table's
    for way in {result.way for result in results}:
        folders = [worth.RESULTS / study / way / f"seed{seed}" for seed in worth.finished_seeds(study)]
        (group,) = compare_runs(folders)["groups"]
        own = next(result for result in results if result.name == way)
        networks = group["networks"]
        assert networks["compact" if "compact" in networks else "unpruned"]["macs"]["mean"] == own.mean("macs")


def test_decisions_by_the_loss_close_what_adds_nothing() -> None:
    """A block that only adds noise costs accuracy while it is open; the rule needs no gate that has learned this."""
    torch.manual_seed(0)
    model = fg.attach(fg.models.resnet(14, 4), "layer")
    noisy = model.get_submodule("layer2.1")
    with torch.no_grad():
        noisy.get_submodule("bn2").weight.fill_(100.0)
    search = fg.GateSearch(model, (3, 8, 8), torch.optim.SGD(fg.parameter_groups(model), lr=0.1), epochs=2)
    search.begin_epoch(0)
    x = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        noisy.gate.freeze(torch.zeros(1, dtype=torch.bool))
        labels = model(x).argmax(1)  # what the network says without that block
        noisy.gate.freeze(torch.ones(1, dtype=torch.bool))
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    decisions, spent = tries.decide_by_loss(model, search, [(x, labels)])
    assert not decisions["layer2.1.gate"].open.any()
    left = search.costs.of({name: decision.open for name, decision in decisions.items()}) / search.costs.total
    assert abs(left - tries.WHOLE_BLOCKS) <= max(int(cost) for cost in search.costs.values()) / search.costs.total
    assert spent % (64 * search.macs) == 0 and spent >= 2 * 64 * search.macs
    after = dict(model.named_buffers())
    assert all(torch.equal(buffer, after[name]) for name, buffer in statistics.items())
