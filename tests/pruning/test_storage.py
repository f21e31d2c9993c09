import json
import os
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import fastgate as fg
from fastgate.digests import digest
from fastgate.pruning.storage import read_metadata
from tests.helpers import (
    GATINGS,
    PlainBlock,
    assert_same_state,
    freeze_at_random,
    gated_resnet,
    gating_ids,
    randomize_batch_norm,
    state_copy,
)

FILES = Path(__file__).parent / "files"


def assert_loads_equal(model: nn.Module, path: Path, x: Tensor, **options: object) -> nn.Module:
    """Save and load: same text, same tensors to the bit, same outputs to the bit, eval mode."""
    fg.save(model, path)
    loaded = fg.load(path, **options)
    assert_same_state(loaded, model.state_dict())
    assert [(n, p.dtype, p.shape) for n, p in loaded.named_parameters()] == [
        (n, p.dtype, p.shape) for n, p in model.named_parameters()
    ]
    assert not any(module.training for module in loaded.modules())
    mode = model.training
    wanted = model.eval()(x)
    model.train(mode)
    assert torch.equal(loaded(x), wanted)
    return loaded


@pytest.mark.parametrize("shortcut", ["conv", "pad"])
@pytest.mark.parametrize("mode", ["mixed", "none"])
@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_compact_networks_come_back_bit_equal(
    tmp_path: Path, gating: tuple[str, str], mode: str, shortcut: str
) -> None:
    model = gated_resnet(14, gating, shortcut)
    freeze_at_random(model, mode)
    compacted = fg.compact(model)
    loaded = assert_loads_equal(compacted, tmp_path / "model.safetensors", torch.randn(2, 3, 12, 12))
    assert repr(loaded) == repr(compacted)
    # what was loaded can be trained on and saved again
    loaded.train()(torch.randn(4, 3, 12, 12)).square().mean().backward()
    fg.save(loaded, tmp_path / "again.safetensors")


@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_gated_networks_come_back_frozen_or_live(tmp_path: Path, gating: tuple[str, str]) -> None:
    model = gated_resnet(8, gating, init_logit=None, hidden_features=5, estimator="gumbel", temperature=0.5)
    freeze_at_random(model)
    list(fg.named_gates(model))[1][1].unfreeze()
    model.train()
    model(torch.randn(4, 3, 8, 8))  # decisions with a graph lie around: they are no part of the network
    loaded = assert_loads_equal(model, tmp_path / "model.safetensors", torch.randn(4, 3, 8, 8))
    assert model.training
    gates = list(zip(fg.named_gates(model), fg.named_gates(loaded), strict=True))
    for (name, gate), (loaded_name, twin) in gates:
        assert name == loaded_name and gate.frozen == twin.frozen
        assert (twin.estimator, twin.temperature, twin.hidden_features) == ("gumbel", 0.5, 5)
        assert not gate.frozen or torch.equal(gate.open, twin.open)
    # the life of a network goes on where it stopped
    freeze_at_random(loaded)
    assert fg.compare(loaded, fg.compact(loaded), torch.randn(2, 3, 8, 8)) < 1e-4


@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_torchvision_networks_come_back(tmp_path: Path, gating: tuple[str, str]) -> None:
    model = fg.attach(randomize_batch_norm(torchvision.models.resnet18(num_classes=4)).eval(), *gating)
    freeze_at_random(model, "mixed")
    assert_loads_equal(fg.compact(model), tmp_path / "model.safetensors", torch.randn(1, 3, 32, 32))


def test_flattening_gates_come_back(tmp_path: Path) -> None:
    model = fg.models.resnet(8, gating="channel", spatial_size=(8, 8)).eval()
    loaded = assert_loads_equal(model, tmp_path / "model.safetensors", torch.randn(2, 3, 8, 8))
    assert [gate.spatial_size for _, gate in fg.named_gates(loaded)] == [(8, 8), (4, 4), (2, 2)]


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    model = fg.models.resnet(8)
    model.layer2.requires_grad_(False)
    loaded = assert_loads_equal(model, tmp_path / "model.safetensors", torch.randn(2, 3, 8, 8))
    wanted = {name: not name.startswith("layer2.") for name, _ in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in loaded.named_parameters()} == wanted


def test_a_loaded_network_does_not_depend_on_its_file_any_more(tmp_path: Path) -> None:
    path, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    fg.save(fg.models.resnet(8), path)
    loaded = fg.load(path)
    state = state_copy(loaded)
    fg.save(fg.models.resnet(8), other)
    # in place, as cp and rsync --inplace write
    with path.open("r+b") as file:
        file.write(other.read_bytes())
    assert_same_state(loaded, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    model = gated_resnet(8, ("channel", "middle")).to(dtype)
    freeze_at_random(model, "mixed")
    assert_loads_equal(fg.compact(model), tmp_path / "model.safetensors", torch.randn(2, 3, 8, 8).to(dtype))


def test_special_values_come_back_to_the_bit(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    bits = torch.tensor([[-0.0, float("inf"), 1e-45, float("nan")]])
    with torch.no_grad():
        model.weight.copy_(bits)
    fg.save(model, tmp_path / "model.safetensors")
    loaded = fg.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded.weight.view(torch.int32), bits.view(torch.int32))


LINEAR = {"class": "torch.nn.modules.linear:Linear", "arguments": {"in_features": 3, "out_features": 2, "bias": True}}

LAYERS = [
    nn.Conv2d(
        2, 4, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, bias=False, padding_mode="reflect"
    ),
    nn.Conv2d(2, 4, 3, padding="same"),
    nn.ConvTranspose2d(2, 3, 2, stride=2, output_padding=1),
    nn.BatchNorm2d(2, eps=1e-3, momentum=None, affine=False),
    nn.BatchNorm2d(2, track_running_stats=False),
    nn.GroupNorm(1, 2, eps=1e-4),
    nn.LayerNorm((2, 8, 8), elementwise_affine=False),
    nn.MaxPool2d(2, 1, padding=1, ceil_mode=True),
    nn.AvgPool2d((2, 3), count_include_pad=False),
    nn.AdaptiveAvgPool2d((None, 3)),
    nn.LeakyReLU(0.3),
    nn.GELU("tanh"),
    nn.ELU(0.5),
    nn.PReLU(2),
    nn.ReLU6(inplace=True),
    nn.Softmax(dim=1),
    nn.Dropout(0.25),
    nn.Upsample(scale_factor=2, mode="nearest"),
    nn.PixelShuffle(1),
    nn.ZeroPad2d((1, 0, 2, 0)),
    nn.Flatten(),
    nn.Identity(),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_layers_of_torch_come_back_with_their_arguments(tmp_path: Path, layer: nn.Module) -> None:
    x = torch.randn(3, 2, 8, 8)
    model = nn.Sequential(layer)
    loaded = assert_loads_equal(model, tmp_path / "model.safetensors", x)
    # a wrong argument may show in training only
    torch.manual_seed(1)
    wanted = model.train()(x)
    torch.manual_seed(1)
    assert torch.equal(loaded.train()(x), wanted)
    assert_same_state(loaded, model.state_dict())


def strides(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tensor.stride() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_the_memory_format_comes_back(tmp_path: Path, gating: tuple[str, str]) -> None:
    model = gated_resnet(8, gating).to(memory_format=torch.channels_last)
    freeze_at_random(model)
    x = torch.randn(3, 3, 16, 16).to(memory_format=torch.channels_last)
    for network in (model, fg.compact(model)):
        loaded = assert_loads_equal(network, tmp_path / "model.safetensors", x)
        assert strides(loaded) == strides(network)
        assert loaded.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_any_order_of_dimensions_comes_back_and_gaps_are_closed(tmp_path: Path) -> None:
    tensors = {
        "transposed": torch.randn(3, 4).t(),
        "channels_last_3d": torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
        "one_pixel": torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.0),
        "with_gaps": torch.randn(4, 6)[:, ::2],
        "expanded": torch.randn(3, 1).expand(3, 2),
    }
    model = nn.ParameterDict(tensors)
    fg.save(model, tmp_path / "model.safetensors")
    loaded = fg.load(tmp_path / "model.safetensors")
    assert_same_state(loaded, model.state_dict())
    wanted = {**strides(model), "with_gaps": (3, 1), "expanded": (2, 1)}
    assert strides(loaded) == wanted


@pytest.mark.parametrize("stride", [[1, 1], [0, 1], [-3, 1], [300000000000, 1], [3], "31", [3.0, 1.0]], ids=str)
def test_strides_that_do_not_fit_are_refused(tmp_path: Path, stride: object) -> None:
    path = tmp_path / "odd.safetensors"
    described = json.dumps({"network": LINEAR, "frozen": [], "strides": {"weight": stride}})
    metadata = {"format": "fastgate-network", "version": "1", "architecture": described}
    save_file({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, path, metadata)
    with pytest.raises(ValueError, match=r"odd\.safetensors: "):
        fg.load(path)


def test_files_of_before_are_still_read() -> None:
    # written by the library of 26 November 2026, which knew no strides and no attributes but plain ones
    with pytest.warns(UserWarning, match=r"safetensors: a network file of an earlier version, which cannot be checked"):
        gated, compacted = (fg.load(FILES / f"version1-{kind}.safetensors") for kind in ("gated", "compact"))
    assert sum(1 for _ in fg.named_gates(gated)) == 3 and not dict(fg.named_gates(compacted))
    assert compacted.layer2[0].in_index.tolist() == [1]
    # up to the order of sums; the outputs are of unit size
    assert fg.compare(gated, compacted, torch.randn(2, 3, 8, 8)) < 1e-5
    rebuilt = fg.compact(gated)
    assert_same_state(compacted, rebuilt.state_dict())
    assert repr(compacted) == repr(rebuilt)


class Scaled(nn.Module):
    """A class of the user's own: children, a parameter, a buffer, plain and private attributes, optional children."""

    def __init__(self, channels: int, scale: float, names: list[str]) -> None:
        super().__init__()
        self.body = nn.ModuleList([PlainBlock(channels) for _ in names])
        self.bias = nn.Parameter(torch.randn(channels, 1, 1))
        self.register_parameter("unused", None)
        self.register_buffer("offset", torch.arange(channels)[:, None, None])
        self.register_buffer("nothing", None)
        self.head = None
        self.scale, self.names, self.flag, self.label = scale, names, True, "kept"
        self.size, self._shift = (5, [5, (None,)]), 0.25

    def forward(self, x: Tensor) -> Tensor:
        for block in self.body:
            x = block(x)
        return self.scale * x + self.bias + self.offset + self._shift if self.flag and self.head is None else x


def test_classes_of_the_user_are_passed_to_load(tmp_path: Path) -> None:
    model, path, x = Scaled(3, 1.5, ["a", "b"]), tmp_path / "model.safetensors", torch.randn(2, 3, 5, 5)
    loaded = assert_loads_equal(model, path, x, classes=[Scaled, PlainBlock])
    assert isinstance(loaded, Scaled)
    assert (loaded.scale, loaded.names, loaded.flag, loaded.label) == (1.5, ["a", "b"], True, "kept")
    # tuples and lists are told apart, also within each other
    assert loaded.size == (5, [5, (None,)]) and loaded._shift == 0.25
    assert loaded.offset.dtype == torch.int64 and loaded.unused is None and loaded.nothing is None
    for classes in ([], [Scaled]):
        with pytest.raises(
            ValueError, match=r"is not from fastgate, torch\.nn, torchvision, timm; pass it as load\(path, classes"
        ):
            fg.load(path, classes=classes)


def test_classes_may_be_any_iterable(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    fg.save(nn.Sequential(PlainBlock(3), PlainBlock(3)), path)
    loaded = fg.load(path, classes=iter([PlainBlock]))
    assert [type(block) for block in loaded] == [PlainBlock, PlainBlock]


FRESH_PROCESS = """
import builtins, pickle, sys
import torch
import fastgate
from safetensors.torch import load_file

def refuse(*args, **kwargs):
    raise RuntimeError("load used pickle")

for name in ("load", "loads", "Unpickler", "_Unpickler"):
    setattr(pickle, name, refuse)
torch.load = torch.serialization.load = refuse
folder = sys.argv[1]
expected = load_file(f"{folder}/expected.safetensors")
for name in sorted(key.partition(":")[0] for key in expected if key.endswith(":x")):
    model = fastgate.load(f"{folder}/{name}.safetensors")
    with torch.no_grad():
        output = model(expected[f"{name}:x"])
    print(name, torch.equal(output, expected[f"{name}:y"]), all(g.frozen for _, g in fastgate.named_gates(model)))
"""


def test_networks_come_back_bit_equal_in_a_fresh_process_without_pickle(tmp_path: Path) -> None:
    expected = {}
    for gating in GATINGS:
        model = gated_resnet(14, gating)
        freeze_at_random(model, "mixed")
        x = torch.randn(3, 3, 10, 10)
        for kind, network in (("gated", model), ("compact", fg.compact(model))):
            name = f"{kind}-{gating_ids(gating)}"
            fg.save(network, tmp_path / f"{name}.safetensors")
            with torch.no_grad():
                expected.update({f"{name}:x": x.clone(), f"{name}:y": network(x)})
    save_file(expected, tmp_path / "expected.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(tmp_path)],
        cwd=tmp_path,
        # the same number of threads as here: how a convolution splits its sums may depend on it
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = sorted(key.removesuffix(":x") for key in expected if key.endswith(":x"))
    assert len(names) == 8 and done.stdout.splitlines() == [f"{name} True True" for name in names]


def test_the_file_is_plain_safetensors_with_the_callers_metadata(tmp_path: Path) -> None:
    model, path = fg.models.resnet(8), tmp_path / "model.safetensors"
    fg.save(model, path, metadata={"dataset": "digits", "accuracy": "0.97"})
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == sorted(model.state_dict())
        metadata = file.metadata()
    architecture = json.loads(metadata["architecture"])
    assert metadata["format"] == "fastgate-network" and architecture["network"]["class"].endswith(":ResNet")
    assert architecture["frozen"] == []
    assert read_metadata(path) == {"dataset": "digits", "accuracy": "0.97"}
    assert isinstance(fg.load(str(path)), fg.models.ResNet)
    for key in ("format", "version", "architecture", "sha256"):
        with pytest.raises(ValueError, match=f"metadata: '{key}' is reserved for fastgate"):
            fg.save(model, path, metadata={key: "mine"})


# files that are no networks


def valid_bytes(tmp_path: Path) -> bytes:
    path = tmp_path / "valid.safetensors"
    fg.save(nn.Linear(3, 2), path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:5], id="within-the-length"),
        pytest.param(lambda data: data[:40], id="within-the-header"),
        pytest.param(lambda data: data[:-1], id="one-byte-short"),
        pytest.param(lambda data: data + b"\0", id="one-byte-long"),
        pytest.param(lambda data: struct.pack("<Q", 2**60) + data[8:], id="absurd-length"),
        pytest.param(lambda data: b"PK\x03\x04 a zip archive, as torch.save writes", id="foreign"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damage(valid_bytes(tmp_path)))
    with pytest.raises(
        ValueError, match=r"damaged\.safetensors: expected a \.safetensors file, got damaged or other data"
    ):
        fg.load(path)


def test_a_missing_file_and_a_folder_are_no_network_files(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("none.safetensors", "folder.safetensors"):
        with pytest.raises(FileNotFoundError, match=rf"{name}: expected a network file written by fastgate\.save"):
            fg.load(tmp_path / name)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "expected format 'fastgate-network' version 2, got None"),
        ({"format": "pt"}, "expected format 'fastgate-network' version 2, got 'pt'"),
        ({"format": "fastgate-network", "version": "3"}, "expected .* version 2, got 'fastgate-network' version '3'"),
        ({"format": "fastgate-network", "version": "2"}, "its contents are not what was written"),
        ({"format": "fastgate-network", "version": "1"}, r"its architecture cannot be rebuilt here \('architecture'\)"),
        (
            {"format": "fastgate-network", "version": "1", "architecture": "[]"},
            "its architecture cannot be rebuilt here",
        ),
        (
            {"format": "fastgate-network", "version": "1", "architecture": "{"},
            "its architecture cannot be rebuilt here",
        ),
    ],
    ids=[
        "no-metadata",
        "other-format",
        "newer-version",
        "no-checksum",
        "no-architecture",
        "architecture-is-a-list",
        "architecture-is-no-json",
    ],
)
def test_foreign_safetensors_are_refused(tmp_path: Path, metadata: dict | None, message: str) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, path, metadata)
    with pytest.raises(ValueError, match=rf"foreign\.safetensors: {message}"):
        fg.load(path)


def test_every_part_of_the_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    fg.save(nn.Linear(3, 2), path, metadata={"dataset": "digits"})
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in ("weight", "bias")}
    architecture = metadata["architecture"].replace('"frozen": []', '"frozen": ["bias"]')
    for other in ({"dataset": "cifar10"}, {"architecture": architecture}, {"more": "of it"}):
        save_file(tensors, path, {**metadata, **other})
        for read in (fg.load, read_metadata):
            with pytest.raises(ValueError, match=r"model\.safetensors: its contents are not what was written"):
                read(path)
    save_file({**tensors, "bias": -tensors["bias"]}, path, metadata)
    with pytest.raises(ValueError, match=r"model\.safetensors: its contents are not what was written"):
        fg.load(path)


def value_of(value: object) -> dict:
    """An architecture with an attribute that is written so."""
    nothing: dict = {"parameters": {}, "buffers": {}, "children": {}}
    return {"class": "torch.nn.modules.container:ModuleDict", "attributes": {"note": value}, **nothing}


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({**LINEAR, "arguments": {"in_features": 4, "out_features": 2, "bias": True}}, "size mismatch for weight"),
        ({**LINEAR, "arguments": {"in_features": 3, "out_features": 2, "bias": False}}, 'Unexpected key.* "bias"'),
        ({**LINEAR, "arguments": {"colour": 1}}, "colour"),
        ({**LINEAR, "class": "torch.nn.modules.linear:Lineal"}, "Lineal"),
        ({**LINEAR, "class": "torch.nn.nothing:Linear"}, r"torch\.nn\.nothing"),
        # a file must not be able to call what is no module, however it is reached
        ({"class": "os:system", "arguments": {"command": "true"}}, "its class os:system is not from fastgate"),
        ({"class": "torch.nn.modules.module:warnings.warn", "arguments": {}}, "expected a class of modules"),
        (
            {"class": "fastgate.pruning.storage:os.system", "arguments": {"command": "true"}},
            "expected a class of modules",
        ),
        (value_of({"enum": ["enum:Enum", "x"]}), "its class enum:Enum is not from fastgate"),
        (value_of({"enum": ["torch.nn.modules.linear:Linear", "x"]}), "expected a class of Enum"),
        (value_of({"dtype": "manual_seed"}), "expected the name of a dtype"),
        (value_of({"call": "os:system"}), "a value of kind 'call'"),
        (value_of({}), "odd.safetensors"),
        ({"class": "timmy.models:Linear", "arguments": {}}, "its class timmy.models:Linear is not from fastgate"),
    ],
    ids=[
        "size",
        "missing",
        "argument",
        "class",
        "module",
        "os",
        "function",
        "through-an-import",
        "enum",
        "no-enum",
        "dtype",
        "kind",
        "no-kind",
        "prefix",
    ],
)
def test_an_architecture_that_does_not_fit_is_refused(tmp_path: Path, architecture: dict, message: str) -> None:
    path = tmp_path / "odd.safetensors"
    described = json.dumps({"network": architecture, "frozen": []})
    metadata = {"format": "fastgate-network", "version": "1", "architecture": described}
    save_file({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, path, metadata)
    with pytest.raises(ValueError, match=message):
        fg.load(path)


NOTHING: dict = {"attributes": {}, "parameters": {}, "buffers": {}, "children": {}}
MODULE = {"class": "torch.nn.modules.container:Sequential", **NOTHING}


def nested(depth: int) -> dict:
    description = MODULE
    for _ in range(depth):
        description = {**MODULE, "children": {"0": description}}
    return description


def constructed(name: str, **arguments: object) -> dict:
    return {"class": name, "arguments": arguments}


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        # constructors that open files, ask a hub, or work for as long as they are told to
        (
            constructed(
                "timm.task.distillation:DistillationTeacher", model_name_or_module="local-dir:/tmp", num_classes=2
            ),
            "expected no arguments for timm.task.distillation:DistillationTeacher, whose constructor must not be",
        ),
        (
            constructed("fastgate.models.resnet:ResNet", depth=6_000_002),
            "expected no arguments for fastgate.models.res",
        ),
        (
            constructed("torchvision.ops.misc:MLP", in_channels=1, hidden_channels=[1]),
            "expected no arguments for torchv",
        ),
        (
            constructed("torch.nn.modules.rnn:LSTM", input_size=1, hidden_size=1, num_layers=10**7),
            "expected no arguments for torch.nn.modules.rnn:LSTM",
        ),
        (
            constructed("torch.nn.modules.rnn:RNNBase", mode="LSTM", input_size=1, hidden_size=1, num_layers=10**7),
            "expected no arguments for torch.nn.modules.rnn:RNNBase",
        ),
        (
            constructed("torch.nn.modules.transformer:Transformer", num_encoder_layers=10**7),
            "expected no arguments for torch.nn.modules.transformer:Transformer",
        ),
        (
            constructed("torch.nn.modules.activation:MultiheadAttention", embed_dim=4, num_heads=1),
            "expected no arguments for torch.nn.modules.activation:MultiheadAttention",
        ),
        # where memory is taken
        (
            constructed("torch.nn.modules.linear:Linear", in_features=10**9, out_features=1, device="cpu"),
            "got 'device'",
        ),
        (constructed("torch.nn.modules.linear:Linear", in_features=3, out_features=2, dtype="x"), "got 'dtype'"),
        (
            constructed("torch.nn.modules.linear:Linear", in_features=10**12, out_features=10**6),
            "rebuilt|size mismatch",
        ),
        (constructed("torch.nn.modules.linear:Linear", in_features=10**30, out_features=1), "cannot be rebuilt here"),
        (
            {**MODULE, "parameters": {"weight": {"shape": [10**9, 10], "dtype": "float32"}}},
            "size mismatch for weight|Missing key",
        ),
        # errors of every kind
        (
            constructed("torch.nn.modules.conv:Conv2d", in_channels=3, out_channels=2, kernel_size=1, groups=0),
            "groups",
        ),
        (constructed("torch.nn.modules.pixelshuffle:PixelShuffle", upscale_factor={"set": [[]]}), "rebuilt here"),
        (constructed("torch.nn.modules.flatten:Unflatten", dim=1, unflattened_size=3), "rebuilt here"),
        # classes by another name, and modules that are programs
        (
            constructed("torch.nn.modules.module:torch.optim.sgd.SGD", params={}),
            "its class torch.nn.modules.module:torch.optim.sgd.SGD|expected a class of modules",
        ),
        ({**MODULE, "class": "torch.nn:Sequential"}, "expected the name torch.nn.modules.container:Sequential"),
        (
            {**MODULE, "class": "fastgate.pruning.architecture:nn.Sequential"},
            "expected the name torch.nn.modules.container:Sequential of a class, got fastgate",
        ),
        ({**MODULE, "class": "fastgate.__main__:Sequential"}, "expected a class of a module, got fastgate.__main__"),
        # what every module has
        *(
            ({**MODULE, "attributes": {name: "x"}}, f"got {name!r}, which every module has")
            for name in ("__class__", "__dict__", "_parameters", "forward", "eval", "training", "_load_from_state_dict")
        ),
        # depth and count
        (nested(5000), "expected up to 100000 modules in up to 100 levels, got more|recursion"),
        (nested(100), "expected up to 100000 modules in up to 100 levels, got more"),
        (
            {**MODULE, "children": {str(i): MODULE for i in range(100_000)}},
            "expected up to 100000 modules in up to 100",
        ),
        (value_of(json.loads("[" * 900 + "]" * 900)), "rebuilt here|size mismatch|Missing|Unexpected"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_no_file_makes_load_work_for_it(tmp_path: Path, architecture: dict, message: str) -> None:
    path = tmp_path / "attack.safetensors"
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)  # to write it
    described = json.dumps({"network": architecture, "frozen": []})
    sys.setrecursionlimit(limit)
    header = {"format": "fastgate-network", "version": "2", "architecture": described}
    tensors = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    save_file(tensors, path, {**header, "sha256": digest([header, tensors])})  # who attacks knows the checksum
    began, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message) as raised:
        fg.load(path)
    assert str(raised.value).startswith(f"{path}: ")
    # the largest description here is one of 14 MB, and importing timm takes seconds
    assert time.process_time() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1_000_000  # KiB


def test_setters_of_a_class_do_not_run(tmp_path: Path) -> None:
    fg.save(WithSetter(), tmp_path / "model.safetensors")
    called.clear()
    fg.load(tmp_path / "model.safetensors", classes=[WithSetter])
    assert set(called) <= {"training"}  # which eval() sets


called: list[str] = []


class WithSetter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0

    def __setattr__(self, name: str, value: object) -> None:
        called.append(name)
        super().__setattr__(name, value)

    def register_buffer(self, *args: object, **kwargs: object) -> None:
        called.append("register_buffer")


# networks that cannot be saved


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Unsaved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(3), persistent=False)
        self.register_buffer("none", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean


def test_buffers_outside_of_the_state_come_back(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), Unsaved()), torch.randn(2, 3)
    fg.save(model, tmp_path / "model.safetensors")
    loaded = fg.load(tmp_path / "model.safetensors", classes=[Unsaved])
    assert torch.equal(loaded(x), model(x))
    assert list(loaded.state_dict()) == list(model.state_dict()) == ["0.weight", "0.bias"]


class Versioned(nn.Linear):
    """What it does with the state of an earlier version, or of none, is not to happen."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *arguments: Any) -> None:
        assert metadata.get("version") == 2
        super()._load_from_state_dict(state, prefix, metadata, *arguments)


def test_the_state_is_that_of_this_version(tmp_path: Path) -> None:
    model = nn.Sequential(Versioned(3, 3))
    fg.save(model, tmp_path / "model.safetensors")
    loaded = fg.load(tmp_path / "model.safetensors", classes=[Versioned])
    assert fg.compare(model, loaded, torch.randn(2, 3)) == 0.0
    mnasnet = torchvision.models.mnasnet0_5(num_classes=3).eval()  # changes itself by the version of a state
    fg.save(mnasnet, tmp_path / "mnasnet.safetensors")
    assert fg.compare(mnasnet, fg.load(tmp_path / "mnasnet.safetensors"), torch.randn(1, 3, 32, 32)) == 0.0


class Unplain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self._mean = nn.Conv2d(3, 3, 1), torch.zeros(3)

    def predict(self, x: Tensor) -> Tensor:
        return self.conv(x - self._mean[:, None, None])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Tied, "model: expected every tensor once, got tensors that share memory"),
        # .contiguous() of each makes two copies
        (lambda: Tied().to(memory_format=torch.channels_last), "tensors that share memory; clone the"),
        (Unplain, "cannot describe Unplain: its attribute '_mean': a Tensor is not a plain value, and its code"),
    ],
    ids=["shared-tensors", "shared-channels-last", "unplain-attribute"],
)
def test_what_cannot_be_saved_is_refused_and_leaves_no_file(
    tmp_path: Path, build: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fg.save(build(), tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["model", "model.pt", "model.safetensors.tmp", ".safetensors"])
def test_the_name_says_what_the_file_is(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"path: expected a name ending in \.safetensors, got {name}"):
        fg.save(nn.Linear(1, 1), tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "model.safetensors"
    old = fg.models.resnet(8)
    fg.save(old, path)
    data = path.read_bytes()

    def fail(*args: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail) if step == "fsync" else patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            fg.save(fg.models.resnet(8, 100), path)
    assert path.read_bytes() == data and os.listdir(tmp_path) == ["model.safetensors"]
    assert_same_state(fg.load(path), old.state_dict())


@pytest.mark.gpu
def test_shared_tensors_are_seen_on_a_device(tmp_path: Path) -> None:
    # .cpu() of each makes two copies
    with pytest.raises(ValueError, match="tensors that share memory"):
        fg.save(Tied().cuda(), tmp_path / "model.safetensors")


@pytest.mark.gpu
def test_a_network_on_a_device_comes_back_on_the_cpu(tmp_path: Path) -> None:
    model = gated_resnet(8, ("channel", "before"))
    freeze_at_random(model, "mixed")
    compacted = fg.compact(model)
    state = {name: tensor.clone() for name, tensor in compacted.state_dict().items()}
    fg.save(compacted.cuda(), tmp_path / "model.safetensors")
    assert_same_state(fg.load(tmp_path / "model.safetensors"), state)
