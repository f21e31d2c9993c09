"""`fastgate.train` with the user's own network and loaders."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastgate as fg
from tests.integrations.loops import make_data

QUICK: dict[str, Any] = {"epochs": 4, "open_until": 0.25, "anneal_until": 0.5, "settle_at": 0.75, "device": "cpu"}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    data = make_data()
    return DataLoader(data, 16, shuffle=True), DataLoader(TensorDataset(*data[:32]), 16)


def test_a_network_and_loaders(tmp_path: Path) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = fg.train(
        model, *loaders(), folder=tmp_path / "run", gating="channel", target=0.6, control="unpruned", **QUICK
    )
    rows = trained.summary["rows"]
    assert list(rows) == ["unpruned", "compact"] and rows["unpruned"]["accuracy"] is not None
    assert rows["compact"]["macs"] == pytest.approx(0.6 * rows["unpruned"]["macs"], rel=0.01)
    x = torch.randn(2, 3, 8, 8)
    assert fg.compare(trained.network, fg.load(tmp_path / "run" / "model.safetensors"), x) == 0.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(fg.named_gates(model)) == []
    again = fg.train(
        model, *loaders(), folder=tmp_path / "run", gating="channel", target=0.6, control="unpruned", resume=True,
        **QUICK,
    )  # fmt: skip
    assert fg.compare(trained.network, again.network, x) == 0.0


def test_names(tmp_path: Path) -> None:
    trained = fg.train("resnet8", "digits", folder=tmp_path, preset="demo", control="none", batch_size=128, **QUICK)
    assert trained.summary["rows"]["compact"]["accuracy"] > 0.2 and trained.folder == tmp_path


def test_what_is_refused(tmp_path: Path) -> None:
    train, test = loaders()
    for arguments, options, message in (
        ((make_model(), train), {}, "test: expected a loader if train is a loader"),
        (("resnet8", "digits", test), {}, "and none if train is the name of a data set"),
        ((fg.attach(make_model(), "layer"), train, test), {}, "model: expected a plain network, got one with gates"),
        ((make_model(), train, test), {"targt": 0.5}, "targt: expected an option .* did you mean target"),
        ((make_model(), train, test), {"control": "equal-macs"}, "control: equal-macs needs a network given by name"),
        ((make_model(), train, test), {"batch_size": 8}, "batch_size: expected 16, that of the loader, got 8"),
        ((make_model(), [(1, 2)], test), {}, "train: expected batches of two tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            fg.train(*arguments, folder=tmp_path / "run", **{**QUICK, **options})
    assert not (tmp_path / "run").exists()
