import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import nn

import fastgate as fg
from fastgate.models import ResidualBlock
from tests.helpers import (
    GATINGS,
    PlainBlock,
    PreActivationBlock,
    assert_same_state,
    freeze_at_random,
    gating_ids,
    named,
    randomize_batch_norm,
    state_copy,
)

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision-resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "torchvision-resnet50": lambda: torchvision.models.resnet50(num_classes=10),
    "timm-resnet18": lambda: timm.create_model("resnet18", num_classes=10),
    "timm-resnet50": lambda: timm.create_model("resnet50", num_classes=10),
    "own-resnet8": lambda: fg.models.resnet(8),
    "own-resnet8-pad": lambda: fg.models.resnet(8, shortcut="pad"),
    "registered": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), PlainBlock(8, 5), PlainBlock(8, activation=nn.SiLU)),
    "registered-preactivation": lambda: nn.Sequential(PreActivationBlock(3, 8), PreActivationBlock(8, 12)),
}
BLOCKS = {
    "torchvision-resnet18": 8,
    "torchvision-resnet50": 16,
    "timm-resnet18": 8,
    "timm-resnet50": 16,
    "own-resnet8": 3,
    "own-resnet8-pad": 3,
    "registered": 2,
    "registered-preactivation": 2,
}


# torchvision's large one has the same kinds of blocks
SLOW_TIMM = pytest.param("timm-resnet50", marks=pytest.mark.slow)


@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
@pytest.mark.parametrize("name", [SLOW_TIMM if name == "timm-resnet50" else name for name in NETWORKS])
def test_with_every_gate_open_the_network_is_the_original(name: str, gating: tuple[str, str]) -> None:
    original = randomize_batch_norm(NETWORKS[name]()).eval()
    state, x = state_copy(original), torch.randn(2, 3, 33, 35)
    wanted = original(x)
    model = fg.attach(copy.deepcopy(original), *gating)
    assert len(list(fg.named_gates(model))) == BLOCKS[name]
    assert not any(module.training for module in model.modules())

    attached = model.state_dict()
    assert [key for key in attached if ".gate." not in key] == list(state)
    assert all(torch.equal(attached[key], value) for key, value in state.items())

    freeze_at_random(model, "all")
    # the same operations on the same tensors, times 1
    assert torch.equal(model(x), wanted)
    # and the gates are connected: closing them changes the output
    freeze_at_random(model, "none")
    assert not torch.equal(model(x), wanted)


def test_timm_options_run_in_the_chain() -> None:
    """Squeeze-excitation, anti-aliasing and stochastic depth are children of timm's blocks and must not get lost."""
    for options in (
        {"block_args": {"attn_layer": "se"}},
        {"aa_layer": timm.layers.BlurPool2d},
        {"drop_path_rate": 0.3},
    ):
        original = randomize_batch_norm(timm.create_model("resnet18", num_classes=4, **options)).eval()
        x = torch.randn(2, 3, 32, 32)
        wanted = original(x)
        model = fg.attach(copy.deepcopy(original), "layer")
        freeze_at_random(model, "all")
        assert torch.equal(model(x), wanted)
        torch.manual_seed(3)
        wanted = original.train()(x)
        torch.manual_seed(3)
        # in training too: the same random numbers, the same batch statistics
        assert torch.equal(model.train()(x), wanted)


def test_a_drop_in_shortcut_of_none_is_the_identity() -> None:
    block = torchvision.models.resnet.BasicBlock(4, 4).eval()
    assert block.downsample is None
    model = fg.attach(nn.Sequential(copy.deepcopy(block)))
    freeze_at_random(model, "all")
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(model(x), block(x))


def test_a_single_block_becomes_the_returned_module() -> None:
    block = torchvision.models.resnet.BasicBlock(4, 4).eval()
    model = fg.attach(block, "channel")
    assert isinstance(model, ResidualBlock) and [name for name, _ in fg.named_gates(model)] == ["gate"]
    freeze_at_random(model, "all")
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(model(x), block(x))


def test_attach_works_in_place_and_keeps_the_mode() -> None:
    for training in (True, False):
        model = torchvision.models.resnet18().train(training)
        assert fg.attach(model) is model
        assert all(module.training == training for module in model.modules())


def test_gates_take_the_dtype_of_their_block() -> None:
    model = fg.attach(torchvision.models.resnet18().double(), "channel").eval()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert model(torch.zeros(1, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64


def test_gate_options_reach_every_gate() -> None:
    model = fg.attach(torchvision.models.resnet18(), "layer", hidden_features=5, estimator="gumbel", temperature=0.3)
    for _, gate in fg.named_gates(model):
        assert (gate.hidden_features, gate.estimator, gate.temperature) == (5, "gumbel", 0.3)


class SharedActivation(nn.Module):
    """One activation under three names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.act1 = self.act2 = self.act3 = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act3(x + self.act2(self.conv2(self.act1(self.conv1(x)))))


fg.register_block(SharedActivation, branch=("conv1", "act1", "conv2", "act2"), activation="act3")


@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_one_module_under_several_names_runs_under_each(gating: tuple[str, str]) -> None:
    block, x = SharedActivation(), torch.randn(2, 4, 5, 5)
    wanted = block(x)
    model = fg.attach(nn.Sequential(block), *gating).eval()
    freeze_at_random(model, "all")
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("options", [{}, {"spatial_size": (32, 32)}], ids=["pooled", "flattened"])
@pytest.mark.parametrize(
    ("build", "refused"),
    [(torchvision.models.resnet18, False), (lambda: nn.Sequential(GroupNormBlock()), True)],
    ids=["attached", "refused"],
)
def test_modules_held_in_eval_mode_stay_there(build: Callable[[], nn.Module], refused: bool, options: dict) -> None:
    model = build().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    if refused:
        with pytest.raises(ValueError, match="cannot cut the channels of GroupNorm"):
            fg.attach(model, "channel", **options)
    else:
        fg.attach(model, "channel", **options)
    assert [name for name, m in model.named_modules() if m.training == isinstance(m, nn.BatchNorm2d)] == []


@pytest.mark.parametrize(
    ("network", "position", "sizes"),
    [
        # channels and map of what the gate sees in each block, for a 32x32 image
        ("own", "before", [(16, 32), (16, 32), (32, 16)]),
        ("own", "middle", [(16, 32), (32, 16), (64, 8)]),
        ("own", "after", [(16, 32), (32, 16), (64, 8)]),
        # the stem of torchvision's networks quarters the image; layer4 sees single pixels
        ("torchvision", "before", [(64, 8)] * 3 + [(128, 4)] * 2 + [(256, 2)] * 2 + [(512, 1)]),
        ("torchvision", "middle", [(64, 8)] * 2 + [(128, 4)] * 2 + [(256, 2)] * 2 + [(512, 1)] * 2),
        ("torchvision", "after", [(64, 8)] * 2 + [(128, 4)] * 2 + [(256, 2)] * 2 + [(512, 1)] * 2),
    ],
)
def test_flattening_gates_take_their_maps_size_from_the_image(network: str, position: str, sizes: list) -> None:
    if network == "own":
        model = fg.models.resnet(8, gating="channel", position=position, spatial_size=(32, 32))
    else:
        model = fg.attach(torchvision.models.resnet18(), "channel", position, spatial_size=(32, 32))
    gates = [gate for _, gate in fg.named_gates(model)]
    assert [gate.fc1.in_features for gate in gates] == [channels * size * size for channels, size in sizes]
    assert [gate.gates for gate in gates] == [channels for channels, _ in sizes]
    # measuring left no trace: no hook, no statistics, still in training
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert all(int(m.num_batches_tracked) == 0 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    model.eval()
    model(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="expected a spatial size of"):
        model(torch.zeros(2, 3, 64, 64))


def test_flattening_gates_of_images_that_are_not_square() -> None:
    model = fg.models.resnet(8, gating="channel", spatial_size=(10, 7))
    assert [gate.spatial_size for _, gate in fg.named_gates(model)] == [(10, 7), (5, 4), (3, 2)]
    model(torch.zeros(2, 3, 10, 7))


class OneConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


class ConvlessBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)


class MisnamedBranch(OneConvBlock):
    pass


class MisnamedShortcut(OneConvBlock):
    pass


class MisnamedActivation(OneConvBlock):
    pass


class ForgottenChild(PlainBlock):
    pass


class LearnedScale(PlainBlock):
    def __init__(self) -> None:
        super().__init__(4)
        self.scale = nn.Parameter(torch.ones(1))


class GroupNormBlock(PlainBlock):
    def __init__(self) -> None:
        super().__init__(4)
        self.bn1 = nn.GroupNorm(2, 4)


PLAIN_BRANCH = ("conv1", "bn1", "act1", "conv2", "bn2")
fg.register_block(OneConvBlock, branch=("conv",))
fg.register_block(ConvlessBlock, branch=("norm",))
fg.register_block(MisnamedBranch, branch=("conv", "bn"))
fg.register_block(MisnamedShortcut, branch=("conv",), shortcut="shrot")
fg.register_block(MisnamedActivation, branch=("conv",), activation="atc")
fg.register_block(ForgottenChild, branch=PLAIN_BRANCH)
fg.register_block(LearnedScale, branch=PLAIN_BRANCH, activation="act2")
fg.register_block(GroupNormBlock, branch=PLAIN_BRANCH, activation="act2")


def one_block_twice() -> nn.Module:
    block = fg.models.resnet(8).layer1[0]
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), block, nn.Sequential(block))


REFUSED = named(
    [
        (
            "one-convolution-middle",
            (
                lambda: nn.Sequential(PlainBlock(4), OneConvBlock()),
                {"gating": "channel"},
                ValueError,
                "block '1': position 'middle' needs two convolutions in the branch, got 1",
            ),
        ),
        (
            "no-convolution",
            (
                lambda: nn.Sequential(PlainBlock(4), ConvlessBlock()),
                {},
                ValueError,
                "block '1': expected a convolution in its branch, got none",
            ),
        ),
        (
            "misnamed-branch",
            (
                lambda: nn.Sequential(PlainBlock(4), MisnamedBranch()),
                {},
                ValueError,
                r"MisnamedBranch: no child named bn; correct its register_block\(\)",
            ),
        ),
        (
            "misnamed-shortcut",
            (
                lambda: nn.Sequential(PlainBlock(4), MisnamedShortcut()),
                {},
                ValueError,
                "MisnamedShortcut: no child named shrot; correct its",
            ),
        ),
        (
            "misnamed-activation",
            (
                lambda: nn.Sequential(PlainBlock(4), MisnamedActivation()),
                {},
                ValueError,
                "MisnamedActivation: no child named atc; correct its",
            ),
        ),
        (
            "forgotten-child",
            (
                lambda: nn.Sequential(PlainBlock(4), ForgottenChild(4)),
                {},
                ValueError,
                r"ForgottenChild: its layout leaves out act2; correct its register_block\(\)",
            ),
        ),
        (
            "own-parameter",
            (
                lambda: nn.Sequential(PlainBlock(4), LearnedScale()),
                {},
                ValueError,
                "LearnedScale: its layout leaves out scale; correct its",
            ),
        ),
        (
            "used-twice",
            (
                one_block_twice,
                {},
                ValueError,
                r"block '3\.0': it is the same module as '2'; .* a separate block in each place",
            ),
        ),
        (
            "cannot-be-cut",
            (
                lambda: nn.Sequential(PlainBlock(4), GroupNormBlock()),
                {"gating": "channel"},
                ValueError,
                "block '1': cannot cut the channels of GroupNorm 'bn1' between a convolution and its gate; use another",
            ),
        ),
        (
            "squeeze-excitation-after",
            (
                lambda: timm.create_model("resnet18", block_args={"attn_layer": "se"}),
                {"gating": "channel", "position": "after"},
                ValueError,
                r"block 'layer1\.0': cannot cut the channels of .* 'se' between",
            ),
        ),
        (
            "unknown-option",
            (torchvision.models.resnet18, {"gating": "layer", "depth": 2}, TypeError, "depth"),
        ),
        (
            "out-channels",
            (torchvision.models.resnet18, {"gating": "channel", "out_channels": 1}, TypeError, "'out_channels'"),
        ),
        (
            "unknown-estimator",
            (torchvision.models.resnet18, {"estimator": "soft"}, ValueError, "estimator: expected one of"),
        ),
        (
            "unknown-gating",
            (
                torchvision.models.resnet18,
                {"gating": "row"},
                ValueError,
                "gating: expected one of layer, channel, both, got",
            ),
        ),
        (
            "unknown-position",
            (
                torchvision.models.resnet18,
                {"gating": "channel", "position": "last"},
                ValueError,
                "position: expected one of middle, before, after, got 'last'",
            ),
        ),
        (
            "layer-spatial-size",
            (
                torchvision.models.resnet18,
                {"spatial_size": (32, 32)},
                ValueError,
                "spatial_size: a layer gate always pools",
            ),
        ),
        (
            "gated-already",
            (
                lambda: fg.models.resnet(8, gating="layer"),
                {},
                ValueError,
                r"model: expected no gates, got 3 \(layer1.0.gate, ...\); attach to a plain network",
            ),
        ),
        (
            "no-block",
            (
                lambda: nn.Sequential(nn.Conv2d(3, 3, 3)),
                {},
                ValueError,
                r"found no residual block in Sequential: none of its modules returns .* declare residual blocks with",
            ),
        ),
    ]
)


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_network_is_as_it_was(case: tuple) -> None:
    build, options, error, message = case
    model = build()
    state, text = state_copy(model), repr(model)
    modules = dict(model.named_modules())
    with pytest.raises(error, match=message):
        fg.attach(model, **options)
    assert_same_state(model, state)
    assert repr(model) == text
    now = dict(model.named_modules())
    assert now.keys() == modules.keys() and all(now[name] is module for name, module in modules.items())


def test_grouped_convolutions_may_stay_whole() -> None:
    # the groups are in the second of three convolutions: neither the first nor the last one is cut apart from it
    for gating in (("layer", "middle"), ("channel", "before"), ("channel", "after")):
        original = randomize_batch_norm(torchvision.models.resnext50_32x4d(num_classes=4)).eval()
        x = torch.randn(1, 3, 32, 32)
        wanted = original(x)
        model = fg.attach(original, *gating)
        freeze_at_random(model, "all")
        assert torch.equal(model(x), wanted)


def test_a_registered_branch_needs_names() -> None:
    with pytest.raises(ValueError, match="branch: expected the names of child modules of PlainBlock, got none"):
        fg.register_block(PlainBlock, branch=())


class SamePadding(PlainBlock):
    """Its second convolution computes its padding itself, so an emptied one would not know its map's size."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding="same")


fg.register_block(SamePadding, branch=("conv1", "bn1", "act1", "conv2", "bn2"), activation="act2")


@pytest.mark.parametrize("position", ["middle", "after"])
def test_what_compact_could_not_empty_is_refused_before_training(position: str) -> None:
    model = nn.Sequential(SamePadding())
    if position == "after":
        fg.attach(model, "channel", position)
        freeze_at_random(model, "none")
        assert fg.compare(model, fg.compact(model), torch.randn(2, 4, 5, 5)) == 0.0
        return
    with pytest.raises(ValueError, match=r"block '0': cannot remove all channels .* numeric padding"):
        fg.attach(model, "channel", position)


@pytest.mark.parametrize("position", ["before", "after"])
def test_a_compacted_network_that_gathers_or_scatters_takes_no_second_gates(position: str) -> None:
    model = fg.models.resnet(8, gating="channel", position=position).eval()
    freeze_at_random(model, "random")
    with pytest.raises(ValueError, match=r"got one cut by compact\(\)"):
        fg.attach(fg.compact(model), "layer")
