"""The README's example runs as printed, and its numbers are those of the committed result files."""

import json
import re
from pathlib import Path

import torch
from torch import nn

import fastgate as fg

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    names = {"epochs": 4, "criterion": nn.CrossEntropyLoss(), "loader": [(images, labels)] * 2}
    exec(code[1], names)
    assert torch.isfinite(names["loss"])  # type: ignore[call-overload]
    assert fg.load(tmp_path / "small.safetensors").fc.out_features == 10


def test_the_table_is_what_the_result_files_hold() -> None:
    results = ROOT / "bench" / "results" / "training"
    control = None
    rows = iter(line for line in README.splitlines() if re.match(r"\|.*\| (unpruned|gated|compact) \|", line))
    for folder in ("cifar10-resnet20-layer", "cifar10-resnet20-channel", "digits-demo"):
        summary = json.loads((results / folder / "summary.json").read_text())
        for name, row in summary["rows"].items():
            accuracy = row["accuracy"]
            if accuracy is None:
                accuracy = control  # the two CIFAR-10 runs share their control
            elif folder == "cifar10-resnet20-layer" and name == "unpruned":
                control = accuracy
            cells = [cell.strip() for cell in next(rows).strip("|").split("|")][1:]
            assert cells == [
                name,
                f"{accuracy:.2%}",
                f"{row['open_ratio']:.1%}",
                f"{row['macs'] / 1e6:.2f} M",
                f"{row['parameters'] / 1e3:.0f} k",
                f"{row['latency_ms']:.2f} ms",
                f"{row['images_per_second']:,.0f}",
            ]
    assert next(rows, None) is None


def test_the_readme_is_short() -> None:
    assert README.count("\n") < 120


def test_the_table_from_weights_is_that_of_its_runs() -> None:
    lines = (ROOT / "bench/results/search/weights/table.md").read_text().splitlines()
    rows = [re.split(r"\s*\|\s*", line)[1:-1] for line in lines if line.startswith("| ")]
    runs = {(f"{row[1]}%", row[3], row[4]) for row in rows}
    table = README.partition("MACs of training |\n")[2].partition("\n\n")[0].splitlines()[1:]
    shown = [tuple(re.split(r"\s*\|\s*", line)[2:-1]) for line in table]
    assert len(shown) == 6 and set(shown) <= runs
