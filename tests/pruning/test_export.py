"""Compact networks as files of other runtimes: they compute the same there, or nothing is written."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastgate as fg
from bench.families import decide_at_random
from bench.zoo import ZOO, build
from fastgate.pruning.export import ExportedNetwork, OnnxNetwork, compare_runtimes
from fastgate.training.pipeline import Run, train
from tests.helpers import freeze_at_random, randomize_batch_norm
from tests.training.runs import TINY, run_cli

pytestmark = pytest.mark.filterwarnings("ignore:.*residual blocks get no gate:UserWarning")

# one of each family (tests/models/test_families.py); an export takes some seconds
ONE_OF_EACH = [
    ("torchvision/mobilenet_v3_small", "channel"),
    pytest.param("torchvision/regnet_x_400mf", "channel", marks=pytest.mark.slow),
    pytest.param("timm/resnetv2_50", "layer", marks=pytest.mark.slow),
    pytest.param("timm/convnext_atto", "channel", marks=pytest.mark.slow),
    pytest.param("timm/vit_tiny_patch16_224", "layer", marks=pytest.mark.slow),
    pytest.param("torchvision/swin_t", "layer", marks=pytest.mark.slow),
    pytest.param("torchvision/lraspp_mobilenet_v3_large", "channel", marks=pytest.mark.slow),
    ("transformers/resnet-basic", "layer"),
    pytest.param("transformers/vit", "channel", marks=pytest.mark.slow),
]


def small_resnet() -> nn.Module:
    model = randomize_batch_norm(fg.models.resnet(8, 10, gating="channel")).eval()
    freeze_at_random(model, "random")
    return fg.compact(model)


@pytest.mark.parametrize(("name", "gating"), ONE_OF_EACH)
def test_a_compact_network_of_each_family_computes_the_same_in_onnxruntime(
    name: str, gating: str, tmp_path: Path
) -> None:
    model = fg.attach(build(name), gating)
    decide_at_random(model)
    small, x = fg.compact(model), ZOO[name].inputs()
    difference = fg.export_onnx(small, x, tmp_path / "small.onnx")
    expected = fg_tensors(small, x)
    got = OnnxNetwork(tmp_path / "small.onnx")(x)
    first = got[0] if isinstance(got, tuple) else got
    # sums of fp32 in another order; the exporter itself refuses what is 1e-3 off
    assert difference <= 1e-4 * float(expected.abs().max())
    assert float((first - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def fg_tensors(model: nn.Module, x: Tensor) -> Tensor:
    from bench.zoo import tensors_of

    with torch.no_grad():
        return tensors_of(model(x))[0]


def test_any_number_of_images_and_a_fixed_one(tmp_path: Path) -> None:
    small, x = small_resnet(), torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        expected = small(x)
    fg.export_onnx(small, x[:1], tmp_path / "any.onnx", dynamic_batch=True)
    fg.export_onnx(small, x[:2], tmp_path / "two.onnx", metadata={"made of": "a test"})
    fg.export_pt2(small, x[:1], tmp_path / "any.pt2", dynamic_batch=True)
    two = OnnxNetwork(tmp_path / "two.onnx")
    assert two.metadata["made of"] == "a test"
    for network in (OnnxNetwork(tmp_path / "any.onnx"), two, ExportedNetwork(tmp_path / "any.pt2")):
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)
    rows = compare_runtimes({"a": small, "b": two}, x, one_by_one=True)
    assert rows["a"]["difference"] == 0 <= rows["b"]["difference"] <= 1e-4 and rows["b"]["latency_ms"] > 0
    assert list(tmp_path.glob(".*")) == []  # no temporary file


def test_half_precision(tmp_path: Path) -> None:
    small, x = small_resnet(), torch.randn(2, 3, 16, 16)
    difference = fg.export_onnx(small, x, tmp_path / "half.onnx", half=True)
    with torch.no_grad():
        largest = float(small(x).abs().max())
    assert 0 < difference < 0.05 * largest
    assert OnnxNetwork(tmp_path / "half.onnx")(x).dtype == torch.float32
    assert next(small.parameters()).dtype == torch.float32


@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_eight_bits(dynamic_batch: bool, tmp_path: Path) -> None:
    small, x = small_resnet(), torch.randn(6, 3, 16, 16)
    plain = fg.export_onnx(small, x[:2], tmp_path / "fp32.onnx", dynamic_batch=dynamic_batch)
    batches = torch.randn(40, 3, 16, 16).split(9)  # 9 is no multiple of what the file takes
    path, options = tmp_path / "int8.onnx", {"dynamic_batch": dynamic_batch, "metadata": {"made of": "a test"}}
    difference = fg.export_onnx(small, x[:2], path, int8=batches, **options)
    with torch.no_grad():
        expected = small(x)
    network = OnnxNetwork(path)
    # a weight of 8 bits is off by up to 0.4 % of the largest one of its channel, an activation by 0.2 % of their range,
    # in each of nine layers one after the other
    assert plain < difference < 0.1 * float(expected.abs().max())
    assert float((network(x) - expected).abs().max()) < 0.1 * float(expected.abs().max())
    assert network.metadata["made of"] == "a test" and network(x).dtype == torch.float32
    # four times fewer bytes of weights; scales and the nodes that apply them come on top
    assert path.stat().st_size < 0.5 * (tmp_path / "fp32.onnx").stat().st_size


def test_calibration_that_cannot_be_used_leaves_no_file(tmp_path: Path) -> None:
    model, x, path = fg.models.resnet(8, 10), torch.randn(4, 3, 8, 8), tmp_path / "a.onnx"
    for batches, message in (
        ([], "int8: expected calibration inputs, at least 4 samples in one of them, got none"),
        ([x[:3]], "int8: expected calibration inputs, at least 4 samples in one of them, got none"),
        ([(x, torch.zeros(4))], "int8: expected calibration inputs of 1 tensors, as inputs, got 2"),
        ([x[:, :, :7]], "int8: onnxruntime cannot quantize it with these inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            fg.export_onnx(model, x, path, int8=batches)
    with pytest.raises(ValueError, match="half, int8: expected at most one of them, got both"):
        fg.export_onnx(model, x, path, int8=[x], half=True)
    assert list(tmp_path.iterdir()) == []


def test_batch_norms_are_folded(tmp_path: Path) -> None:
    small, x = small_resnet(), torch.randn(2, 3, 16, 16)
    fused = fg.fuse(small, x)
    assert any(isinstance(m, nn.BatchNorm2d) for m in small.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    with torch.no_grad():
        # products of weights rounded once more
        assert fg.compare(small, fused, x) <= 1e-5 * float(small(x).abs().max())
    fg.save(fused, tmp_path / "fused.safetensors")
    assert fg.compare(fused, fg.load(tmp_path / "fused.safetensors"), x) == 0.0


class Twice(nn.Module):
    """Nothing here may be folded: a norm alone, a convolution whose result is read twice, a norm that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.alone, self.conv, self.norm = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.other, self.again = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.alone(x))
        return self.again(self.again(self.other(self.norm(y) + y)))


def test_what_cannot_be_folded_stays() -> None:
    model, x = randomize_batch_norm(Twice()).eval(), torch.randn(2, 3, 4, 4)
    fused = fg.fuse(model, x)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == 3
    assert fg.compare(model, fused, x) == 0.0


class Moody(nn.Module):
    """Computes otherwise while it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if torch.compiler.is_exporting() else x


class Lists(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2).mean()


class Uses(nn.Module):
    """Its code reads a weight that folding changes, or a norm that is gone."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.conv, self.norm, self.what = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), what

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y + (self.conv.weight.sum() if self.what == "weight" else self.norm.eps)


class OnTokens(nn.Module):
    """The norm is over the second dimension, the layer over the last."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


def test_folding_that_would_compute_something_else() -> None:
    tokens, x = randomize_batch_norm(OnTokens()).eval(), torch.randn(2, 5, 4)
    assert fg.compare(tokens, fg.fuse(tokens, x), x) == 0.0
    for what in ("weight", "eps"):
        with pytest.raises(ValueError, match="model: its batch norms cannot be folded, as other code uses them"):
            fg.fuse(randomize_batch_norm(Uses(what)).eval(), torch.randn(2, 3, 4, 4))
    hooked = randomize_batch_norm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))).eval()
    hooked[0].register_forward_hook(lambda module, args, result: 2 * result)
    x = torch.randn(2, 3, 4, 4)
    assert fg.compare(hooked, fg.fuse(hooked, x), x) == 0.0


def test_the_examples_of_the_user_stay(tmp_path: Path) -> None:
    x = torch.randn(2, 3)
    before = x.clone()
    assert fg.export_onnx(InPlace(), x, tmp_path / "a.onnx") <= 1e-6  # of a mean: no dimension is the samples'
    assert fg.export_pt2(InPlace(), x, tmp_path / "a.pt2") == 0.0
    fg.fuse(InPlace(), x)
    assert torch.equal(x, before)


class Mixing(nn.Module):
    """A sample's result depends on the others."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_any_number_of_samples_that_are_mixed(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    fg.export_onnx(Mixing(), x, tmp_path / "a.onnx", dynamic_batch=True)
    torch.testing.assert_close(OnnxNetwork(tmp_path / "a.onnx")(x[:2]), x[:2] - x[:2].mean(0))


def test_requests_that_cannot_be_honoured(tmp_path: Path) -> None:
    model, x = nn.Linear(3, 2), torch.randn(2, 3)
    with pytest.raises(ValueError, match="opset: expected one that the exporter supports, got 3; it writes"):
        fg.export_onnx(model, x, tmp_path / "a.onnx", opset=3)
    with pytest.raises(TypeError, match="metadata: expected strings, got int as 'a'"):
        fg.export_onnx(model, x, tmp_path / "a.onnx", metadata={"a": 1})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"path: expected a name ending in \.onnx, got a\.safetensors"):
        fg.export_onnx(model, x, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"path: expected a name ending in \.pt2, got a\.onnx"):
        fg.export_pt2(model, x, tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="model: expected a network with values, got one on the meta device"):
        fg.export_onnx(nn.Linear(3, 2, device="meta"), x, tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="of at least one sample, got one without a value"):
        fg.export_onnx(model, x[:0], tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="model: onnxruntime cannot run the exported network"):
        fg.export_onnx(model.bfloat16(), x.bfloat16(), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.pt2").write_text("no")
    with pytest.raises(ValueError, match=r"a\.pt2: expected a \.pt2 file"):
        ExportedNetwork(tmp_path / "a.pt2")


@pytest.mark.parametrize(("write", "name"), [(fg.export_onnx, "a.onnx"), (fg.export_pt2, "a.pt2")])
def test_what_is_refused_leaves_no_file(write: Any, name: str, tmp_path: Path) -> None:
    x, path = torch.randn(2, 3, 8, 8), tmp_path / name
    with pytest.raises(
        ValueError, match=r"model: expected a network without gates, got one with 3, .*fastgate.compact"
    ):
        write(fg.models.resnet(8, 10, gating="layer"), x, path)
    with pytest.raises(ValueError, match="model: the outputs of the exported network differ by 1"):
        write(Moody(), x, path)
    with pytest.raises(ValueError, match="model: PyTorch cannot export it as"):
        write(Lists(), x, path)
    with pytest.raises(ValueError, match=r"inputs: expected example inputs with tensors of .*got none"):
        write(nn.Identity(), {}, path)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_onnx(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_text("no")
    with pytest.raises(ValueError, match=r"a.onnx: expected an ONNX file"):
        OnnxNetwork(tmp_path / "a.onnx")
    with pytest.raises(FileNotFoundError, match=r"b.onnx: expected an ONNX file, found none"):
        OnnxNetwork(tmp_path / "b.onnx")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not there
    with pytest.raises(
        ModuleNotFoundError, match=r"onnxruntime is not installed; run `pip install 'fastgate\[export\]'`"
    ):
        fg.export_onnx(nn.Identity(), torch.zeros(1), tmp_path / "a.onnx")


def test_the_command_line(tmp_path: Path) -> None:
    run, onnx, pt2 = tmp_path / "run", tmp_path / "small.onnx", tmp_path / "small.pt2"
    train(Run(TINY, run))
    options = ("--onnx", onnx, "--pt2", pt2, "--dynamic-batch", "--fuse", "--check")
    done = run_cli("export", run, *options)
    assert done.returncode == 0, done.stderr
    assert "onnxruntime" in done.stdout and "torch.export" in done.stdout
    assert done.stdout.count("largest difference") == 3
    found = run_cli("evaluate", onnx)
    assert found.returncode == 0, found.stderr
    accuracy = json.loads((run / "summary.json").read_text())["rows"]["compact"]["accuracy"]
    assert f"{100 * accuracy:.2f}" in found.stdout

    eight = tmp_path / "eight.onnx"
    done = run_cli("export", run, "--onnx", eight, "--int8")
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(PyTorch|onnxruntime(?:, int8)?) .* ([\d.]+)%", done.stdout, re.M))
    assert rows["PyTorch"] == rows["onnxruntime"] == f"{100 * accuracy:.2f}"
    assert float(rows["onnxruntime, int8"]) == pytest.approx(100 * accuracy, abs=5)  # 18 of 360 images
    assert rows["onnxruntime, int8"] in run_cli("evaluate", eight).stdout

    fg.save(small_resnet(), tmp_path / "other.safetensors")
    for arguments, said in (
        ((run,), "--onnx, --pt2: expected a file to write, got neither"),
        ((run, "--pt2", pt2, "--fp16"), "--opset, --fp16, --int8: expected --onnx as well"),
        ((run, "--onnx", onnx, "--fp16", "--int8"), "--fp16, --int8: expected at most one of them, got both"),
        (
            (tmp_path / "other.safetensors", "--onnx", onnx),
            "does not contain the image size; pass --input-size C,H,W",
        ),
        ((tmp_path / "other.safetensors", "--onnx", onnx, "--input-size", "3,x"), "--input-size: expected C,H,W"),
    ):
        wrong = run_cli("export", *arguments)
        assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1) and said in wrong.stderr
    assert run_cli("export", tmp_path / "other.safetensors", "--onnx", onnx, "--input-size", "3,8,8").returncode == 0
