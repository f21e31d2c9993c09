"""Weights from files and from the packages' own caches, fitted to other classes and channels or refused."""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor, nn

import fastgate as fg
from fastgate.training.weights import find_classifiers, load_weights, replace_classifier
from fastgate.training.zoo import Network, find_network
from tests.helpers import draw_masks, randomize_batch_norm

NET = "resnet8?widths=4,8,12"


def state_of(num_classes: int = 10, **options: Any) -> dict[str, Tensor]:
    return randomize_batch_norm(find_network(NET, num_classes, **options).model).state_dict()


def assert_loaded(network: Network, state: dict[str, Tensor], *, apart: tuple[str, ...] = ()) -> None:
    own = network.model.state_dict()
    assert own.keys() == state.keys()
    assert [name for name in own if not torch.equal(own[name], state[name])] == list(apart)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_a_file_of_the_same_network(tmp_path: Path, suffix: str) -> None:
    state, path = state_of(), tmp_path / f"net{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    network = find_network(NET, 10, weights=path)
    assert_loaded(network, state)
    assert network.notes == ()
    assert network.mean is network.std is network.image_size is None  # a file does not tell


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_a_checkpoint_with_more_in_it(tmp_path: Path, key: str) -> None:
    state, path = state_of(), tmp_path / "checkpoint.pt"
    torch.save({"epoch": 3, key: state, "optimizer": {"state": {}}}, path)
    assert_loaded(find_network(NET, 10, weights=str(path)), state)


def test_a_prefix_is_dropped_and_said(tmp_path: Path) -> None:
    """Of DistributedDataParallel, and of whatever else a network was wrapped in."""
    state, path = state_of(), tmp_path / "net.pt"
    torch.save(OrderedDict((f"module._orig_mod.{name}", tensor) for name, tensor in state.items()), path)
    network = find_network(NET, 10, weights=path)
    assert_loaded(network, state)
    assert network.notes == tuple(
        f"the prefix '{prefix}' of the names in {path} was dropped" for prefix in ("module.", "_orig_mod.")
    )


def test_a_classifier_of_another_size_is_left_out(tmp_path: Path) -> None:
    state, path = state_of(100), tmp_path / "net.pt"
    torch.save(state, path)
    torch.manual_seed(1)
    fresh = find_network(NET, 10).model.state_dict()
    torch.manual_seed(1)
    network = find_network(NET, 10, weights=path)
    kept = ("fc.weight", "fc.bias")
    assert_loaded(network, {**state, **{name: fresh[name] for name in kept}})
    assert network.notes == ("the classifier fc (100 classes) was replaced by one of 10 classes, newly initialised",)


def test_weights_for_colour_are_summed_for_grey(tmp_path: Path) -> None:
    """A grey image gives what the same image gave in three equal channels."""
    path = tmp_path / "net.pt"
    torch.save(state_of(), path)
    colour = find_network(NET, 10, weights=path).model.eval()
    network = find_network(NET, 10, weights=path, in_channels=1)
    assert network.notes == ("the weights of the first convolution conv1 were summed over their 3 channels",)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(network.model.eval()(x), colour(x.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(
    ("state", "wrong"),
    [
        ({"widths": "4,8,16"}, r"layer3\.0\.conv1\.weight \[16, 8, 3, 3\] instead of \[12, 8, 3, 3\], .* and \d+ more"),
        ({"shortcut": "pad"}, r"layer2\.0\.shortcut\.0\.weight is missing, (.* is missing, ?){0}"),
    ],
)
def test_a_file_of_another_network(tmp_path: Path, state: dict[str, str], wrong: str) -> None:
    path, widths = tmp_path / "net.pt", {"widths": "4,8,12", **state}
    torch.save(find_network("resnet8", 10, options=widths).model.state_dict(), path)
    with pytest.raises(
        ValueError, match=f"weights: .*net.pt does not fit the network: {wrong}.*; is it from a network other"
    ) as e:
        find_network(NET, 10, weights=path)
    assert "\n" not in str(e.value) and str(e.value).count("layer") == 4


def test_more_in_the_file_than_in_the_network(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save({**state_of(), "extra.weight": torch.zeros(1)}, path)
    with pytest.raises(
        ValueError, match=r"does not fit the network: extra\.weight is unexpected; is it from a network other"
    ):
        find_network(NET, 10, weights=path)


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"weights: expected a file, found none at .*missing\.pth"):
        find_network(NET, 10, weights=tmp_path / "missing.pth")
    with pytest.raises(ValueError, match=r"expected none, default or a file ending in \.pth, .*, got imagenet"):
        find_network(NET, 10, weights="imagenet")
    with pytest.raises(ValueError, match="weights: expected default only for networks of torchvision or timm"):
        find_network(NET, 10, weights="default")
    for content in ([1, 2], {"epoch": 3}, {}):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=r"weights: expected a state dict in .*other\.pt.*, got a"):
            find_network(NET, 10, weights=tmp_path / "other.pt")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file(tmp_path: Path, suffix: str) -> None:
    state, path = state_of(), tmp_path / f"net{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"<html>not found</html>"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"weights: expected tensors in .*, got a damaged file") as error:
            find_network(NET, 10, weights=path)
        assert "\n" not in str(error.value)


class Dangerous:
    """Unpickling it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.folder,)


def test_no_code_in_a_file_is_run(tmp_path: Path) -> None:
    for write in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))):
        path = tmp_path / "net.pt"
        write({"state_dict": Dangerous(tmp_path / "made")}, path)
        with pytest.raises(ValueError, match="got a damaged file or other objects") as error:
            find_network(NET, 10, weights=path)
        assert "\n" not in str(error.value) and not (tmp_path / "made").exists()


def test_files_that_fastgate_saved(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    model = find_network(NET, 10).model
    fg.save(model, path)
    assert_loaded(find_network(NET, 10, weights=path), model.state_dict())
    gated = fg.attach(model, "channel")
    masks = draw_masks(gated, "one")
    for name, gate in fg.named_gates(gated):
        gate.freeze(masks[name])
    fg.save(fg.compact(gated), path)
    with pytest.raises(ValueError, match=r"does not fit the network: .*; fastgate\.save wrote .* with fastgate\.load"):
        find_network(NET, 10, weights=path)


def test_names_of_old_densenets() -> None:
    """torchvision's files have norm.1 where its networks have norm1."""
    make = torchvision.models.DenseNet
    old, new = (randomize_batch_norm(make(4, (1, 2), 8, num_classes=5)) for _ in range(2))
    names = {name: name.replace("norm", "norm.").replace("conv", "conv.") for name in old.state_dict()}
    state = {names[name] if "denselayer" in name else name: tensor for name, tensor in old.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    assert load_weights(new, state, 5, "the file", "") == ()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(old.eval()(x), new.eval()(x))


# the size is that of the images which the network insists on
@pytest.mark.parametrize(
    ("make", "size"),
    [
        (f"torchvision:{name}", 224)
        for name in ("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "maxvit_t")
    ]
    + [(f"torchvision:{name}", 64) for name in ("mobilenet_v2", "mobilenet_v3_small", "resnet18")]
    + [(f"torchvision:{name}", 64) for name in ("shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "mnasnet0_5")]
    + [("torchvision:vgg11", 224), ("torchvision:vit_b_32", 224), ("timm:test_resnet", 64), ("timm:test_vit", 160)]
    + [("timm:deit_tiny_distilled_patch16_224", 224), ("timm:test_convnext", 64), ("timm:mobilenetv3_small_050", 64)],
)
def test_the_classifier_is_found(make: str, size: int) -> None:
    """It is the one whose replacement changes the number of outputs, of every family."""
    package, name = make.split(":")
    with torch.device("meta"):
        model = torchvision.models.get_model(name) if package == "torchvision" else timm.create_model(name)
        notes = replace_classifier(model, 7)
        assert model.eval()(torch.zeros(1, 3, size, size)).shape == (1, 7)
    assert [f"the classifier {found} (1000 classes)" for found in find_classifiers(model, 7)] == [
        note.partition(" was replaced")[0] for note in notes
    ]


def test_a_network_without_a_classifier() -> None:
    with pytest.raises(ValueError, match="network: expected a linear layer or a 1x1 convolution"):
        replace_classifier(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), 2)


# default weights: from caches as the packages fill them, without a network ------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


SHUFFLENET = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT


def test_default_weights_of_torchvision(hub: Path) -> None:
    state = randomize_batch_norm(torchvision.models.shufflenet_v2_x0_5()).state_dict()
    torch.save(state, hub / SHUFFLENET.url.rpartition("/")[2])
    network = find_network("torchvision:shufflenet_v2_x0_5", 1000, weights="default")
    assert_loaded(network, state)
    assert network.notes == ()
    assert network.mean == (0.485, 0.456, 0.406) and network.std == (0.229, 0.224, 0.225)
    assert network.image_size == 224

    grey = find_network("torchvision:shufflenet_v2_x0_5", 10, weights="default", in_channels=1)
    assert grey.notes == (
        "the first convolution conv1.0 (3 channels) was replaced by one of 1",
        "the weights of the first convolution conv1.0 were summed over their 3 channels",
        "the classifier fc (1000 classes) was replaced by one of 10 classes, newly initialised",
    )
    assert grey.mean == pytest.approx((0.449,)) and grey.std == pytest.approx((0.226,))
    again = find_network(**grey.arguments).model
    again.load_state_dict(grey.model.state_dict())
    x = torch.randn(1, 1, 32, 32)
    assert torch.equal(again.eval()(x), grey.model.eval()(x))


def test_default_weights_that_are_damaged(hub: Path, tmp_path: Path) -> None:
    path = hub / SHUFFLENET.url.rpartition("/")[2]
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"weights: cannot load the default of torchvision:shuffle.*; delete .*\.pth"):
        find_network("torchvision:shufflenet_v2_x0_5", 10, weights="default")
    torch.save({"state_dict": Dangerous(tmp_path / "made")}, path)
    with pytest.raises(ValueError, match="weights: cannot load the default of"):
        find_network("torchvision:shufflenet_v2_x0_5", 10, weights="default")
    assert not (tmp_path / "made").exists()


def test_default_weights_without_a_network(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    with pytest.raises(ValueError, match=r"\(no route to host\); fetch https://.* once, or give a file"):
        find_network("torchvision:shufflenet_v2_x0_5", 10, weights="default")


def test_default_weights_do_not_go_with_options(hub: Path) -> None:
    with pytest.raises(ValueError, match=r"expected default only for networks .* without options, got .*\?width=0\.5"):
        find_network("torchvision:resnet18?width=0.5", 10, weights="default")
    with pytest.raises(ValueError, match="expected images of 1 or 3 channels for default, got 4; use none"):
        find_network("torchvision:resnet18", 10, weights="default", in_channels=4)


@pytest.fixture
def hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a snapshot of timm/test_resnet.r160_in1k lies in the cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder, commit = tmp_path / "models--timm--test_resnet.r160_in1k", "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return folder / "snapshots" / commit


def test_default_weights_of_timm(hugging_face: Path) -> None:
    state = randomize_batch_norm(timm.create_model("test_resnet")).state_dict()
    save_file(state, hugging_face / "model.safetensors")
    network = find_network("timm:test_resnet", 1000, weights="default")
    assert_loaded(network, state)
    assert (network.notes, network.image_size) == ((), 160)
    assert network.mean == network.std == (0.5, 0.5, 0.5)

    grey = find_network("timm:test_resnet", 10, weights="default", in_channels=1)
    assert grey.notes == (
        "the weights of the first convolution conv1.0 were summed over their 3 channels",
        "the classifier fc (1000 classes) was replaced by one of 10 classes, newly initialised",
    )
    own = grey.model.state_dict()
    torch.testing.assert_close(own["conv1.0.weight"], state["conv1.0.weight"].sum(1, keepdim=True))
    apart = {name for name in own if not torch.equal(own[name], state[name])}
    assert apart == {"conv1.0.weight", "fc.weight", "fc.bias"}
    assert grey.mean == (0.5,)


def test_default_weights_of_timm_that_are_missing(hugging_face: Path) -> None:
    with pytest.raises(ValueError, match="timm cannot make timm:test_resnet with its default weights") as error:
        find_network("timm:test_resnet", 10, weights="default")
    assert "\n" not in str(error.value)
