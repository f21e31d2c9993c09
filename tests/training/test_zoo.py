"""Networks by name: of this library, torchvision, timm and the user's own modules; with blocks and widths of choice."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

import fastgate as fg
from fastgate.training.zoo import find_network


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", lambda: fg.models.resnet20(7)),
        ("cifar:resnet20", lambda: fg.models.resnet20(7)),
        ("resnet8?widths=4,8,12&shortcut=pad", lambda: fg.models.resnet(8, 7, widths=(4, 8, 12), shortcut="pad")),
        ("resnet8?width=0.5", lambda: fg.models.resnet(8, 7, widths=(8, 16, 32))),
        ("torchvision:resnet18", lambda: torchvision.models.resnet18(num_classes=7)),
        ("torchvision.models:resnet18", lambda: torchvision.models.resnet18(num_classes=7)),
        ("timm:test_resnet", lambda: timm.create_model("test_resnet", num_classes=7)),
        ("timm:test_resnet.r160_in1k", lambda: timm.create_model("test_resnet", num_classes=7)),
    ],
)
def test_a_name_gives_the_packages_own_network(name: str, expected: object) -> None:
    """From the same seed, to the bit."""
    torch.manual_seed(3)
    network = find_network(name, 7)
    torch.manual_seed(3)
    theirs = expected().state_dict()  # type: ignore[operator]
    own = network.model.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
    assert network.model.training and network.notes == ()
    assert network.mean is network.std is network.image_size is None


@pytest.mark.parametrize(
    "name",
    [
        "resnet8?widths=4,8,12&shortcut=pad",
        "torchvision:resnet18?layers=2,1,1,1&width=0.25",
        "torchvision:squeezenet1_1",
        "timm:test_resnet?widths=8,16,16,24",
        "torchvision.models:squeezenet1_1",
    ],
)
def test_arguments_rebuild_the_architecture(tmp_path: Path, name: str) -> None:
    network = find_network(name, 5, in_channels=1)
    torch.save(network.arguments, tmp_path / "arguments.pt")
    arguments = torch.load(tmp_path / "arguments.pt", weights_only=True)
    again = find_network(**arguments)
    assert again.arguments == network.arguments and shapes(again.model) == shapes(network.model)
    assert network.model.eval()(torch.zeros(1, 1, 64, 64)).shape == (1, 5)


def test_options_as_a_mapping() -> None:
    """Text or numbers: the name they give is the same."""
    for widths in ("4,8,12", (4, 8, 12), [4, 8, 12]):
        network = find_network("resnet8", 10, options={"widths": widths})
        assert network.arguments["name"] == "resnet8?widths=4,8,12"
    with pytest.raises(ValueError, match="expected every option once, got widths twice"):
        find_network("resnet8?widths=4,8,12", 10, options={"widths": "4,8,12"})


# blocks and widths of ResNets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["resnet18", "resnext50_32x4d"])
def test_torchvisions_own_blocks_and_widths_change_nothing(base: str) -> None:
    """The remade network is the one that torchvision makes, with the same numbers from the same seed."""
    layers = "2,2,2,2" if base == "resnet18" else "3,4,6,3"
    torch.manual_seed(0)
    model = find_network(f"torchvision:{base}?layers={layers}&widths=64,128,256,512", 10).model
    torch.manual_seed(0)
    expected = torchvision.models.get_model(base, num_classes=10).state_dict()
    assert type(model) is torchvision.models.ResNet
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_blocks_and_widths_of_torchvision() -> None:
    model = find_network("torchvision:resnet18?layers=2,1,3,1&width=0.125", 10).model
    assert isinstance(model, torchvision.models.ResNet)
    stages = (model.layer1, model.layer2, model.layer3, model.layer4)
    assert [len(stage) for stage in stages] == [2, 1, 3, 1]
    assert [stage[-1].conv2.out_channels for stage in stages] == [8, 16, 32, 64]
    assert model.conv1.out_channels == model.bn1.num_features == 8
    # as in the full network, the first stage needs no shortcut of its own
    assert [stage[0].downsample is None for stage in stages] == [True, False, False, False]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_widths_of_bottlenecks() -> None:
    model = find_network("torchvision:resnext50_32x4d?layers=1,1,1,1&widths=32,64,128,256", 10).model
    assert isinstance(model, torchvision.models.ResNet)
    assert [model.layer1[0].conv2.out_channels, model.layer4[0].conv3.out_channels] == [64, 1024]
    assert model.layer1[0].conv2.groups == 32


def test_blocks_and_widths_of_timm() -> None:
    model = find_network("timm:resnet18?layers=1,2,1,1&width=0.125", 10).model
    assert isinstance(model, timm.models.resnet.ResNet)
    stages = (model.layer1, model.layer2, model.layer3, model.layer4)
    assert [len(stage) for stage in stages] == [1, 2, 1, 1]
    assert [stage[-1].conv2.out_channels for stage in stages] == [8, 16, 32, 64]


def test_a_chosen_network_is_saved_as_any_other(tmp_path: Path) -> None:
    model = find_network("torchvision:resnet18?layers=1,1,1,1&width=0.125", 10).model.eval()
    fg.save(model, tmp_path / "net.safetensors")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(fg.load(tmp_path / "net.safetensors")(x), model(x))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet8?layers=1", "expected options among width, widths, shortcut, got 'layers'"),
        ("resnet8?widths=4,8", "expected 3 widths for resnet8, one per stage, got 4,8"),
        ("torchvision:resnet18?layers=1,1,1", "expected 4 layers for resnet18, one per stage, got 1,1,1"),
        ("torchvision:resnet18?layers=1,1,0,1", "positive whole numbers such as 2,1,1,1, got '1,1,0,1'"),
        ("resnet8?width=-1", "expected the option width to be a positive factor such as 0.75, got '-1'"),
        ("resnet8?width=0.5&widths=4,8,12", r"expected width \(a factor\) or widths \(channels\), got both"),
        ("resnet8?width", r"expected options like \?layers=2,1,1,1&width=0\.75, got"),
        (
            "timm:resnext50_32x4d?layers=1,1,1,1&width=0.1",
            r"expected wider stages for .*, whose layer1.* has no",
        ),
        ("torchvision:resnext50_32x4d?layers=1,1,1,1&width=0.1", "expected wider stages for torchvision:resnext50"),
        ("resnet8?shortcut=none", "shortcut: expected one of conv, pad, got 'none'"),
        ("torchvision:regnet_x_400mf?width=0.5", "expected options for a ResNet, got torchvision:regnet_x_400mf"),
        ("timm:test_convnext?layers=1,1,1,1", "expected options for a ResNet, got timm:test_convnext"),
        ("torchvision.models:resnet18?width=0.5", "expected options among none for torchvision.models:resnet18"),
    ],
)
def test_options_that_cannot_be_met(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_network(name, 10)


# names that nothing has ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet18", r"did you mean torchvision:resnet18, timm:resnet18,"),
        ("resnt20", r"did you mean resnet20"),
        ("torchvision:resnet19", r"did you mean torchvision:resnet18"),
        ("torchvision:fcn_resnet50", r"did you mean torchvision:resnet50"),  # it segments
        ("timm:resnet50dd", r"did you mean timm:resnet50d"),
        ("torchvison:resnet18", r"but there is no module torchvison here; did you mean torchvision:resnet18"),
        ("cifar:resnet", r"did you mean resnet56, resnet44, resnet32"),
        ("cifar:resnet18", r"any 6n \+ 2.*did you mean resnet110, resnet56, resnet44"),
        ("qqqq", "no known name is similar"),
        ("", "no known name is similar"),
        ("a b:c", "no known name is similar"),
    ],
)
def test_unknown_names(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint) as error:
        find_network(name, 10)
    text = str(error.value)
    assert "torchvision:NAME, timm:NAME or package.module:function, got" in text and "\n" not in text


@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_names_of_networks_that_cannot_be_used() -> None:
    with pytest.raises(ValueError, match="got torchvision:inception_v3 with auxiliary classifiers"):
        find_network("torchvision:inception_v3", 10)
    with pytest.raises(
        ValueError, match=r"timm cannot make timm:resnet18\.nope without weights \(Invalid pretrained tag"
    ):
        find_network("timm:resnet18.nope", 10)
    with pytest.raises(ValueError, match="num_classes: expected a positive whole number, got 0"):
        find_network("resnet20", 0)
    with pytest.raises(ValueError, match="in_channels: expected a positive whole number, got '3'"):
        find_network("resnet20", 10, in_channels="3")  # type: ignore[arg-type]


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"needs the package timm \(.*\); pip install timm"):
        find_network("timm:resnet18", 10)
    with pytest.raises(ValueError, match=r"did you mean torchvision:resnet18"):
        find_network("resnet18", 10)


# networks of the user's own -----------------------------------------------------------------------------------------

MODULE = """
import torch
from torch import nn

import fastgate as fg

class Net(nn.Sequential):
    def __init__(self, num_classes=1000, in_channels=3):
        super().__init__(nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

def build(num_classes):
    return Net(num_classes)

def fixed():
    return Net(12).half()

def options(**kwargs):
    return Net(**kwargs)

def timm_style(num_classes, in_chans):
    return Net(num_classes, in_chans)

class Nets:
    small = Net

def mlp(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))

def inner_first():
    net = nn.Module()
    net.inner = nn.Conv2d(4, 4, 3)
    net.stem = nn.Conv2d(3, 4, 3)
    net.head = nn.Linear(4, 10)
    return net

def gated():
    return fg.attach(fg.models.resnet20(), "layer")

def broken(num_classes):
    raise RuntimeError("out of\\nluck")

def demanding(num_classes, depth):
    return Net(num_classes)

def nothing():
    return None

network = Net()
"""


@pytest.fixture
def mynet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """mynet.py in the current directory."""
    (tmp_path / "mynet.py").write_text(MODULE)
    (tmp_path / "bad.py").write_text("import os\nraise KeyError('no\\nkey')\n")
    (tmp_path / "needs.py").write_text("import a_package_that_is_missing\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield
    for name in ("mynet", "bad", "needs", "leaves"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("mynet")
@pytest.mark.parametrize(
    ("function", "in_channels", "notes"),
    [
        ("build", 3, []),
        ("Net", 1, []),
        ("Nets.small", 3, []),
        ("timm_style", 1, []),
        ("options", 3, []),
        ("mlp", 3, []),
        ("build", 1, ["the first convolution 0 (3 channels) was replaced by one of 1"]),
        ("fixed", 3, ["the classifier 3 (12 classes) was replaced by one of 10 classes"]),
        ("inner_first", 3, []),
        ("inner_first", 1, ["the first convolution stem (3 channels) was replaced by one of 1"]),
    ],
)
def test_a_function_in_the_current_directory(function: str, in_channels: int, notes: list[str]) -> None:
    network = find_network(f"mynet:{function}", 10, in_channels=in_channels)
    assert list(network.notes) == notes
    if function != "inner_first":  # which has no forward
        x = torch.zeros(2, in_channels, 8, 8, dtype=next(network.model.parameters()).dtype)
        assert network.model(x).shape == (2, 10)


@pytest.mark.usefixtures("mynet")
def test_an_own_network_takes_weights_of_another_number_of_classes(tmp_path: Path) -> None:
    state = find_network("mynet:Net", 12).model.state_dict()
    torch.save(state, tmp_path / "net.pt")
    network = find_network("mynet:Net", 10, weights="net.pt")
    assert network.notes == ("the classifier 3 (12 classes) was replaced by one of 10 classes, newly initialised",)
    assert torch.equal(network.model.state_dict()["0.weight"], state["0.weight"])


@pytest.mark.usefixtures("mynet")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mynet:biuld", r"mynet has no biuld; did you mean build\?"),
        ("mynet:broken", r"mynet:broken failed \(RuntimeError: out of\)"),
        ("mynet:demanding", r"mynet:demanding failed \(TypeError: .*missing 1 required positional argument: 'depth'\)"),
        ("mynet:nothing", r"expected mynet:nothing to return a torch\.nn\.Module, got a NoneType"),
        ("mynet:network", r"expected mynet:network to be a function or class that builds a network, got a Net"),
        ("mynet:gated", r"expected mynet:gated without gates, got one with 'layer1\.0\.gate'"),
        ("bad:build", r"bad cannot be imported \(KeyError: "),
        (
            "needs:build",
            r"needs cannot be imported \(ModuleNotFoundError: No module named 'a_package_that_is_missing'\)",
        ),
        ("leaves:build", r"leaves cannot be imported \(SystemExit: 3\)"),
        ("mynet.inner:build", r"there is no module mynet\.inner here"),
    ],
)
def test_functions_that_fail(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^network: .*{message}") as error:
        find_network(name, 10)
    assert "\n" not in str(error.value)
