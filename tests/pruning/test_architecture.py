"""What a file can say of an architecture, and that whatever it cannot say is refused while the network is at hand."""

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torchvision.transforms import InterpolationMode

import fastgate as fg
from tests.helpers import freeze_at_random, named, randomize_batch_norm


def tensors_of(output: object) -> list[Tensor]:
    """The tensors of a nested output, in order."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors_of(value)]


def compacted_fcn() -> nn.Module:
    model = fg.attach(torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None))
    freeze_at_random(model)
    return fg.compact(model)


def image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size)


SAVED = named(
    [
        ("fcn", (compacted_fcn, image)),
        ("lraspp", (lambda: torchvision.models.get_model("lraspp_mobilenet_v3_large", weights_backbone=None), image)),
        ("r3d", (torchvision.models.video.r3d_18, lambda: torch.randn(1, 3, 2, 16, 16))),
        ("shufflenet", (torchvision.models.shufflenet_v2_x0_5, image)),
        ("squeezenet", (torchvision.models.squeezenet1_1, image)),
        ("swin", (torchvision.models.swin_t, image)),
        ("timm-resnet", (lambda: timm.create_model("resnet10t"), image)),
        ("timm-regnet", (lambda: timm.create_model("regnetx_002"), image)),
        ("timm-vit", (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2), image)),
        ("timm-efficientnet", (lambda: timm.create_model("lcnet_050"), image)),
    ]
)


@pytest.mark.parametrize("case", SAVED)
def test_what_is_saved_comes_back_working(
    tmp_path: Path, case: tuple[Callable[[], nn.Module], Callable[[], Tensor]]
) -> None:
    build, draw = case
    model, x = randomize_batch_norm(build()).eval(), draw()
    fg.save(model, tmp_path / "model.safetensors")
    loaded = fg.load(tmp_path / "model.safetensors")
    assert repr(loaded) == repr(model)
    with torch.no_grad():
        wanted, got = tensors_of(model(x)), tensors_of(loaded(x))
    assert len(got) == len(wanted) > 0
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


class Versatile(nn.Module):
    """A class of the user's own with attributes of every kind that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = {"a": 1, 2: {"b": (1, [None])}, (1, "x"): float("inf")}
        self.ordered = OrderedDict(z=1, a=2)
        self.size, self.dtype, self.names = torch.Size([2, 3]), torch.float16, {"a", "b"}
        self.frozen, self.mode, self.nan = frozenset((1, 2)), InterpolationMode.BICUBIC, float("nan")

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) * self.tables["a"]


def test_attributes_come_back_with_their_types(tmp_path: Path) -> None:
    model = Versatile()
    fg.save(model, tmp_path / "model.safetensors")
    loaded = fg.load(tmp_path / "model.safetensors", classes=[Versatile])
    for name in ("tables", "ordered", "size", "dtype", "names", "frozen", "mode"):
        value, wanted = getattr(loaded, name), getattr(model, name)
        assert (name, type(value), value) == (name, type(wanted), wanted)
    assert list(loaded.ordered) == ["z", "a"] and loaded.nan != loaded.nan


CONTAINERS = [
    nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ReLU()}),
    nn.ParameterList([torch.randn(2), torch.randn(3)]),
    nn.ParameterDict({"x": torch.randn(2)}),
    nn.MultiheadAttention(4, 2, bias=False, kdim=3),
    nn.Sequential(),
]


@pytest.mark.parametrize("layer", CONTAINERS, ids=lambda layer: type(layer).__name__)
def test_containers_of_torch_come_back(tmp_path: Path, layer: nn.Module) -> None:
    fg.save(layer.eval(), tmp_path / "model.safetensors")
    loaded = fg.load(tmp_path / "model.safetensors")
    assert repr(loaded) == repr(layer) and list(loaded.state_dict()) == list(layer.state_dict())
    if isinstance(layer, nn.MultiheadAttention):
        inputs = torch.randn(5, 1, 4), torch.randn(6, 1, 3), torch.randn(6, 1, 4)
        assert torch.equal(loaded(*inputs)[0], layer(*inputs)[0])


def test_a_layer_changed_after_its_construction_comes_back_as_it_is(tmp_path: Path) -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")
    conv.padding = (2, 2)  # what circular padding uses was computed before, and stays
    conv.note = {"scale": 2}
    fg.save(conv, tmp_path / "model.safetensors")
    loaded, x = fg.load(tmp_path / "model.safetensors"), image(6)
    assert loaded.note == {"scale": 2} and torch.equal(loaded(x), conv(x))


def test_saving_draws_nothing_from_the_random_generator(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    model = fg.models.resnet(8)
    torch.set_rng_state(state)
    fg.save(model, tmp_path / "model.safetensors")
    fg.load(tmp_path / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), state)


# refused


def with_hook(kind: str) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    getattr(model[0], f"register_forward_{kind}")(lambda *_: None)
    return model


def with_forward_of_its_own() -> nn.Module:
    conv = nn.Conv2d(3, 3, 1)
    conv.forward = functools.partial(torch.mul, 2)
    return conv


@dataclass
class Scale:
    factor: float


class Holder(nn.Module):
    """Keeps something that is no plain value, and uses it."""

    def __init__(self, kept: object) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        return self.kept(x)


class ByComputedName(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, "ke" + "pt")(x)


class ByMethod(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        return run_kept(self, x)


def run_kept(module: Holder, x: Tensor) -> Tensor:
    return module.kept(x)


class FromOutside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.held = Passive(torch.relu)

    def forward(self, x: Tensor) -> Tensor:
        return self.held.kept(x)


class Passive(nn.Module):
    """Keeps something, and does not use it but to construct."""

    def __init__(self, kept: object) -> None:
        super().__init__()
        self.kept = kept
        self.conv = self._make(3)

    def _make(self, channels: int) -> nn.Module:
        return nn.Conv2d(channels, channels, 1) if self.kept is None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def faster_rcnn() -> nn.Module:
    return torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights_backbone=None)


HOOKS = "its forward hook, which may change its output, would be lost; remove the hook"
REFUSED = [
    ("forward-hook", lambda: with_hook("hook"), f"Conv2d '0': {HOOKS}"),
    ("forward-pre-hook", lambda: with_hook("pre_hook"), f"Conv2d '0': {HOOKS}"),
    ("weight-norm", lambda: weight_norm(nn.Conv2d(3, 3, 1)), HOOKS),
    ("spectral-norm", lambda: spectral_norm(nn.Conv2d(3, 3, 1)), HOOKS),
    ("prune", lambda: prune.l1_unstructured(nn.Conv2d(3, 3, 1), "weight", 1), HOOKS),
    ("parametrization", lambda: parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), "fold them into its tensors"),
    ("forward", with_forward_of_its_own, "Conv2d: its attribute 'forward': a partial is not a plain value"),
    ("detection", faster_rcnn, "'rpn': its attribute 'box_coder': a BoxCoder .* save its state_dict.. and build"),
    ("activation", lambda: nn.TransformerEncoderLayer(4, 2), "its attribute 'activation': a function is not a"),
    ("tensor", lambda: Holder(torch.zeros(2)), "Holder: its attribute 'kept': a Tensor is not"),
    ("modules", lambda: Holder([nn.ReLU()]), "a ReLU is not a plain value"),
    ("dataclass", lambda: Holder(Scale(2.0)), "a Scale is not a plain value"),
    ("in-a-dict", lambda: Holder({"a": (1, torch.relu)}), "a builtin_function_or_method is not a plain value"),
    ("computed-name", lambda: ByComputedName(torch.relu), "ByComputedName: its attribute 'kept'"),
    ("method", lambda: ByMethod(torch.relu), "ByMethod: its attribute 'kept'"),
    ("from-outside", FromOutside, "Passive 'held': its attribute 'kept'"),
    ("rnn", lambda: nn.LSTM(2, 2), "LSTM: its attribute '_flat_weight"),
    ("sparse", lambda: nn.ParameterList([torch.eye(2).to_sparse()]), "expected dense tensors with values"),
    ("meta", lambda: nn.Linear(2, 2, device="meta"), "expected dense tensors with values"),
    ("traced", lambda: torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())), "its attribute '_graph': a Graph is not"),
    ("compiled", lambda: torch.compile(nn.Sequential(nn.ReLU())), "cannot describe OptimizedModule"),
    ("scripted", lambda: torch.jit.script(nn.ReLU()), "expected plain modules, got"),
]


@pytest.mark.parametrize(("build", "message"), [pytest.param(*case, id=name) for name, *case in REFUSED])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # weight_norm of old
def test_what_would_not_come_back_working_is_refused(
    tmp_path: Path, build: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fg.save(build(), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_no_code_uses_is_left_out(tmp_path: Path) -> None:
    model, x = nn.Sequential(Passive(torch.relu), torchvision.models.resnet18()).eval(), image()
    fg.save(model, tmp_path / "model.safetensors")
    loaded = fg.load(tmp_path / "model.safetensors", classes=[Passive])
    assert not hasattr(loaded[0], "kept") and not hasattr(loaded[1], "_norm_layer")
    assert torch.equal(loaded(x), model(x))


def test_two_classes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    def doubling(factor: float) -> nn.Module:
        class Times(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x * factor

        return Times()

    with pytest.raises(ValueError, match=r"Times '[01]': another class has its name"):
        fg.save(nn.Sequential(doubling(2), doubling(3)), tmp_path / "model.safetensors")


def test_backward_hooks_are_left_out_with_a_warning(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_full_backward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="Linear '0': its backward hooks are not saved"):
        fg.save(model, tmp_path / "model.safetensors")
    with warnings.catch_warnings(action="error"):
        fg.save(fg.load(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
