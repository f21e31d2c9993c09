"""Processes of their own that find the stand-in by LD_LIBRARY_PATH, as they would NVIDIA's; its time is real."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.energy.fake import T4, T4_TOO
from tests.training.runs import ENVIRONMENT, TINY_OPTIONS

# where torch is not installed: importing it raises
NO_TORCH = "import sys; sys.modules['torch'] = None\n"

METER_A_SECOND = """
import json, sys, time
import fastgate as fg
meter = fg.EnergyMeter()
with meter.window("sleep", items=10) as w:
    time.sleep(1)
result = w.result
trials = fg.measure_energy(lambda: time.sleep(0.01), min_seconds=0.2, trials=1, meter=meter)
torch = sys.modules.get("torch", "not imported")
print(json.dumps([result.to_dict(), trials[0].items, trials[0].joules, torch]))
"""


def run(code: str, *arguments: object, boards: str = "", library: Path | None = None, **variables: str):
    environment = {**ENVIRONMENT, **variables}
    environment.pop("LD_LIBRARY_PATH", None)
    if library is not None:
        environment |= {"LD_LIBRARY_PATH": str(library.parent), "FAKE_NVML_BOARDS": boards}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def fastgate(*arguments: object, **options):
    return run("import sys; sys.argv[0] = 'fastgate'; from fastgate.cli import main; main()", *arguments, **options)


def board(identity: tuple[str, str, str], watts: float, *, counter: bool = True) -> str:
    return f"{','.join(identity)},{watts},20000,{counter:d},1"


TWO_BOARDS = f"{board(T4, 70)};{board(T4_TOO, 35)}"


@pytest.mark.parametrize("prologue", ["", NO_TORCH], ids=["torch-not-imported", "torch-not-installed"])
def test_metering_without_torch(library: Path, prologue: str) -> None:
    done = run(prologue + METER_A_SECOND, library=library, boards=TWO_BOARDS)
    assert done.returncode == 0, done.stderr
    result, calls, joules, torch = json.loads(done.stdout)
    assert torch == ("not imported" if prologue == "" else None)
    assert result["source"] == "nvml-counter" and result["per_device"].keys() == {T4[0], T4_TOO[0]}
    # two ticks of 20 ms are the counter's part in the tolerance, the rest is the time between clock and counter
    assert result["joules"] == pytest.approx(105 * result["seconds"], abs=105 * 0.05)
    assert abs(result["joules"] - 105 * result["seconds"]) <= result["error_bound_joules"] + 1
    assert calls > 10 and joules > 0


@pytest.mark.parametrize(
    ("variable", "joules"), [("1", 35), (T4[0], 70), ("GPU-b", 35), ("1,-1", 35), ("", None), ("1,1", None)]
)
def test_visible_devices_of_a_process(library: Path, variable: str, joules: float | None) -> None:
    done = run(NO_TORCH + METER_A_SECOND, library=library, boards=TWO_BOARDS, CUDA_VISIBLE_DEVICES=variable)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)[0]
    assert result["joules"] == (None if joules is None else pytest.approx(joules, rel=0.06))


def test_the_public_names_that_need_torch_say_so() -> None:
    done = run(NO_TORCH + "import fastgate as fg; fg.EnergyMeter; fg.attach")
    assert done.returncode == 1
    assert "ModuleNotFoundError: import of torch halted" in done.stderr


@pytest.mark.parametrize("torch_installed", [True, False])
def test_probe(library: Path, torch_installed: bool) -> None:
    boards = f"{board(T4, 17)};{board(T4_TOO, 9, counter=False)}"
    if torch_installed:
        done = fastgate("energy", "probe", "--seconds", 1, library=library, boards=boards)
    else:
        code = NO_TORCH + "import runpy; runpy.run_module('fastgate.energy', run_name='__main__')"
        done = run(code, library=library, boards=boards)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)["gpu"]["devices"]
    assert first["counter"]["tick_seconds"] == pytest.approx(0.02, abs=0.005)
    assert first["cross_check"]["agrees"]
    assert (first["idle_watts"]["mean"], second["idle_watts"]["mean"]) == (17.0, 9.0)
    assert second["counter"]["available"] is False


def test_probe_on_a_machine_without_nvidia() -> None:
    done = fastgate("energy", "probe", "--seconds", "0.1")
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout)["gpu"]["available"], bool)
    refused = fastgate("energy", "probe", "--seconds", "0")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "error: seconds: expected a duration above 0, got 0.0\n"


def test_training_and_evaluating_where_nothing_can_be_metered(tmp_path: Path) -> None:
    if os.path.isdir("/sys/class/powercap/intel-rapl:0"):
        pytest.skip("this machine has RAPL")
    done = fastgate("train", *TINY_OPTIONS, "--epochs", "1", "--settle-at", "none", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert re.search(r"energy: not metered: cpu: no RAPL packages under /sys/class/powercap", done.stdout)
    (line,) = [json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert line["joules"] == {"train": None, "eval": None, "total": None}
    assert "no RAPL packages" in line["energy"]["warnings"][0] and line["energy"]["source"] == "unavailable"
    assert line["seconds"]["train"] > 0 and line["seconds"]["eval"] > 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["rows"]["gated"]["joules_training"] is None
    assert not (tmp_path / "run/energy.png").exists()
    done = fastgate("evaluate", tmp_path / "run", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("unknown") == 2 and "energy: not metered" in done.stdout
