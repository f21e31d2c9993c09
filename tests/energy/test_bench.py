"""bench/energy_per_epoch.py on a CPU package: three networks side by side."""

import sys
from pathlib import Path

import pytest

from bench import energy_per_epoch
from fastgate.energy import rapl
from tests.energy.test_rapl import add_zone, burn


def test_energy_per_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    zone = add_zone(tmp_path / "powercap", "intel-rapl:0", "package-0")
    assert tmp_path / "powercap" == rapl.ROOT
    monkeypatch.setattr("fastgate.energy.meter.observe_ticks", lambda sources, clock: None)
    train_epoch = energy_per_epoch.train_epoch

    def train_and_burn(model, *rest) -> None:
        burn(zone, sum(p.numel() for p in model.parameters()) / 1000)
        train_epoch(model, *rest)

    evaluate = energy_per_epoch.evaluate

    def evaluate_and_burn(*arguments) -> None:
        burn(zone, 2)
        evaluate(*arguments)

    monkeypatch.setattr(energy_per_epoch, "train_epoch", train_and_burn)
    monkeypatch.setattr(energy_per_epoch, "evaluate", evaluate_and_burn)
    monkeypatch.setenv("COLUMNS", "200")
    options = ["--network", "resnet8", "--epochs", "1", "--device", "cpu", "--output", str(tmp_path / "e.json")]
    monkeypatch.setattr(sys, "argv", ["energy_per_epoch", *options])
    energy_per_epoch.main()
    text = capsys.readouterr().out
    joules = {line.split("│")[1].strip(): line.split("│")[3].strip() for line in text.splitlines() if "│" in line}
    assert joules.keys() == {"unpruned", "gated", "compact"}
    assert float(joules["compact"]) < float(joules["unpruned"]) < float(joules["gated"])
    assert "energy: rapl" in text
    assert (tmp_path / "e.json").stat().st_size > 1000
