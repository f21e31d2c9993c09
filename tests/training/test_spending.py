"""Joules of a run: per epoch, training and evaluation apart, over interruptions, in metrics, summary and table."""

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastgate.energy import Energy, EnergyMeter, rapl
from fastgate.energy.sums import add_energies
from fastgate.pruning.energy import measure_inference
from fastgate.reports.figures import draw_energy
from fastgate.reports.tables import print_evaluation, print_summary
from fastgate.training import callbacks, pipeline
from fastgate.training.checkpoint import load_checkpoint
from fastgate.training.data import load_dataset
from fastgate.training.pipeline import Run, train
from fastgate.training.recipe import change
from fastgate.training.spending import Spending
from fastgate.training.trainer import Interrupted
from tests.energy.test_rapl import add_zone, burn
from tests.training.runs import TINY, checkpoint_state, differences, trainer_of


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CPU package that uses energy on demand; its counter has no tick to find."""
    zone = add_zone(tmp_path / "powercap", "intel-rapl:0", "package-0")
    monkeypatch.setattr(rapl, "ROOT", tmp_path / "powercap")
    monkeypatch.setattr("fastgate.energy.meter.observe_ticks", lambda sources, clock: None)
    return zone


@pytest.fixture
def burning(package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every training step costs 2 J, every pass over an evaluation batch 5 J."""
    step, evaluate = callbacks.RunProgress.step, pipeline.evaluate

    def step_and_burn(self: Any) -> None:
        burn(package, 2)
        step(self)

    def evaluate_and_burn(*arguments: Any, **options: Any) -> dict[str, float]:
        burn(package, 5)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(callbacks.RunProgress, "step", step_and_burn)
    monkeypatch.setattr(pipeline, "evaluate", evaluate_and_burn)
    return package


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_joules_per_epoch(burning: Path, tmp_path: Path) -> None:
    trainer = trainer_of(TINY, load_dataset("digits"), tmp_path)
    trainer.fit()
    per_epoch = 2.0 * len(trainer.train_loader)
    lines = metrics(tmp_path)
    assert [line["joules"] for line in lines] == [
        {"train": per_epoch, "eval": 5.0, "total": (per_epoch + 5) * (i + 1)} for i in range(4)
    ]
    assert all(line["energy"]["source"] == "rapl" for line in lines)
    assert lines[0]["energy"]["error_bound_joules"] == {"train": None, "eval": None}
    assert "the error bound is unknown" in lines[0]["energy"]["warnings"][0]


def test_an_interrupted_epoch_counts_all_its_parts(burning: Path, tmp_path: Path) -> None:
    data = load_dataset("digits")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    undisturbed = trainer_of(TINY, data, whole)
    undisturbed.fit()
    first = trainer_of(TINY, data, parts)
    train_epoch = first._train_epoch

    def interrupt_in_the_second_epoch(interrupted: list[bool]) -> None:
        if first.epoch == 1:
            interrupted.append(True)
        train_epoch(interrupted)

    first._train_epoch = interrupt_in_the_second_epoch  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        first.fit()
    saved = load_checkpoint(parts / "checkpoint.pt")
    spent = saved["callbacks"]["Metering"]["train"]["microjoules"]
    assert (saved["epoch"], saved["step"], spent) == (1, 1, 2_000_000)
    burn(burning, 1000)  # while no run is running
    trainer_of(TINY, data, parts, resume=True).fit()
    assert [line["joules"] for line in metrics(parts)] == [line["joules"] for line in metrics(whole)]
    assert differences(checkpoint_state(whole), checkpoint_state(parts)) == []


def test_metering_changes_no_bit(burning: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_dataset("digits")
    for name in ("metered", "unmetered"):
        (tmp_path / name).mkdir()
        trainer_of(TINY, data, tmp_path / name).fit()
        monkeypatch.setattr(rapl, "ROOT", tmp_path)
    assert metrics(tmp_path / "metered")[0]["joules"]["train"] is not None
    assert metrics(tmp_path / "unmetered")[0]["joules"]["train"] is None
    assert differences(checkpoint_state(tmp_path / "metered"), checkpoint_state(tmp_path / "unmetered")) == []


def test_an_unknown_epoch_makes_the_total_unknown(burning: Path, tmp_path: Path) -> None:
    trainer = trainer_of(change(TINY, epochs=3, settle_at=None), load_dataset("digits"), tmp_path)
    original = EnergyMeter.window

    def window(self: EnergyMeter, name: str, items: int | None = None) -> Any:
        made = original(self, name, items)
        if name == "train" and trainer.epoch == 1:
            self.unavailable["cpu:package-0"] = RuntimeError("lost")  # type: ignore[assignment]
        else:
            self.unavailable.clear()
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EnergyMeter, "window", window)
        trainer.fit()
    lines = metrics(tmp_path)
    assert [line["joules"]["train"] is None for line in lines] == [False, True, False]
    assert [line["joules"]["total"] is None for line in lines] == [False, True, True]


def energy(devices: dict[str, int | None], *, bound: float | None = 0.5, seconds: float = 1.0) -> Energy:
    """A window in which these devices used the given joules."""
    known = None if None in devices.values() else sum(value or 0 for value in devices.values()) * 1_000_000
    sources = {key: "rapl" if key.startswith("cpu") else "nvml-counter" for key in devices}
    joules = {key: None if value is None else float(value) for key, value in devices.items()}
    return Energy("train", seconds, None, joules, sources, known, bound, tuple(f"{key}: warm" for key in devices))


def test_processes_with_a_gpu_each_add_up() -> None:
    total = add_energies(
        [("a", energy({"GPU-1": 3})), ("a", energy({"GPU-2": 4}, seconds=2)), ("b", energy({"GPU-3": 5}))]
    )
    assert total.per_device == {"GPU-1": 3, "GPU-2": 4, "GPU-3": 5}
    assert (total.joules, total.seconds, total.error_bound_joules, total.source) == (12, 2, 1.5, "nvml-counter")
    assert total.warnings == ("GPU-1: warm", "GPU-2: warm", "GPU-3: warm")


def test_a_device_that_several_processes_meter_counts_once() -> None:
    shared = energy({"GPU-1": 3})
    assert add_energies([("a", shared), ("a", energy({"GPU-1": 4}))]).joules == 3
    packages = energy({"cpu:package-0": 3, "cpu:package-1": 4})
    assert add_energies([("a", packages), ("a", packages)]).joules == 7
    # packages of two machines have the same names
    both = add_energies([("a", packages), ("a", packages), ("b", packages)])
    assert both.joules == sum(value or 0 for value in both.per_device.values()) == 14
    assert both.sources.keys() == both.per_device.keys()


def test_joules_of_processes_are_unknown_once_one_is() -> None:
    total = add_energies([("a", energy({"GPU-1": 3})), ("b", energy({"GPU-2": None}, bound=None))])
    assert total.joules is None and total.error_bound_joules is None
    assert total.per_device == {"GPU-1": 3, "GPU-2": None}


def test_an_epoch_is_unknown_while_the_counter_of_one_device_has_not_moved() -> None:
    spending = Spending()
    still = energy({"GPU-1": 300, "GPU-2": None})
    spending.add(replace(still, microjoules=300_000_000))  # known as far as it goes, like a window below a tick
    assert (spending.microjoules, spending.joules) == (300_000_000, None)
    # an interruption in between loses nothing of this
    spending = Spending(**json.loads(json.dumps(asdict(spending))))
    spending.add(energy({"GPU-1": 100, "GPU-2": 700}))
    assert spending.joules == 1100.0
    spending.add(energy({"GPU-1": 100, "GPU-2": None}))
    assert spending.joules is None and spending.per_device == {"GPU-1": 500.0, "GPU-2": None}


def text_of(print_: Any, value: dict[str, Any]) -> str:
    out = io.StringIO()
    print_(value, Console(file=out, width=200))
    return out.getvalue()


def test_summary_and_table(burning: Path, tmp_path: Path) -> None:
    run = Run(change(TINY, control="unpruned", compact_training=False), tmp_path / "run")

    def forward_and_burn(*_: Any) -> None:
        if not torch.is_grad_enabled() and torch.is_inference_mode_enabled():
            burn(burning, 1)

    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *rest: forward_and_burn(*rest) if hasattr(module, "fc") else None
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(measure_inference, "__kwdefaults__", {"min_seconds": 0.05, "trials": 2})
            summary = train(run)
    finally:
        hook.remove()
    steps = 4 * len(trainer_of(TINY, load_dataset("digits"), tmp_path / "other").train_loader)
    for name in ("gated", "unpruned"):
        row = summary["rows"][name]
        assert (row["joules_training"], row["joules_evaluation"]) == (2.0 * steps, 20.0)
    assert "joules_training" not in summary["rows"]["compact"]
    # 1 J per forward pass of 256 images
    assert all(row["joules_per_image"] == pytest.approx(1 / 256) for row in summary["rows"].values())
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary
    text = text_of(print_summary, summary)
    assert "energy: rapl" in text
    lines = [line for line in text.splitlines() if "3.91 mJ" in line]
    assert len(lines) == 3 and f"{2 * steps / 4:.3g} J" in lines[1] and "5 J" in lines[1]
    assert lines[2].count("not trained") == 3
    assert draw_energy({"gated": run.folder, "unpruned": run.folder / "control-unpruned"}, tmp_path / "energy.png")
    assert (tmp_path / "energy.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rapl, "ROOT", tmp_path / "nowhere")
    trainer_of(change(TINY, epochs=1, settle_at=None), load_dataset("digits"), tmp_path).fit()
    assert not draw_energy({"gated": tmp_path}, tmp_path / "energy.png")
    assert not (tmp_path / "energy.png").exists()


def test_table_of_an_evaluation() -> None:
    result = {
        "path": "x", "dataset": "digits", "accuracy": 0.5, "loss": 1.0, "macs": 1, "parameters": 1,
        "latency_ms": 1.0, "images_per_second": 1.0, "joules_per_image": 0.002,
        "energy": {"source": "nvml-counter", "warnings": ["[hot]"]},
    }  # fmt: skip
    text = text_of(print_evaluation, result)
    assert "2 mJ" in text and "500" in text and "energy: nvml-counter" in text and "[hot]" in text
    text = text_of(print_evaluation, {**result, "joules_per_image": None})
    assert text.count("unknown") == 2 and "energy: not metered" in text
