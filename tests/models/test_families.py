"""Residual networks of all families: found by running them, gated, compacted to the same, saved and exported.

`bench/families.py` tries each of `bench/zoo.py`; here stand one of each kind, and the others marked slow.
"""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fastgate as fg
from bench.families import EXACT, OPEN, decide_at_random, relative_difference, try_network
from bench.zoo import ZOO, build
from fastgate.models.block import ResidualBlock
from fastgate.models.gated import GatedModule, Zeros
from tests.helpers import freeze_at_random, randomize_batch_norm

pytestmark = pytest.mark.filterwarnings("ignore:.*residual blocks get no gate:UserWarning")

# one of each kind, that takes little time, with its number of layer gates: one for each sum
FAST = {
    "torchvision/mobilenet_v3_small": 6,  # inverted residuals, squeeze-and-excitation; of 11 blocks 6 have a shortcut
    "torchvision/regnet_x_400mf": 22,  # a branch against a shortcut, both Sequential
    # pre-activation; 4 of its 16 shortcuts have a convolution, which a block that keeps its own forward would run twice
    "timm/resnetv2_50": 12,
    "timm/convnext_atto": 12,  # layer scale, permutes
    "timm/vit_tiny_patch16_224": 24,  # two sums in a block
    "transformers/resnet-basic": 8,
    "transformers/vit": 6,
}
# they concatenate, or add to a part of their channels alone
WITHOUT_SUMS = (
    *("torchvision/densenet121", "torchvision/vgg16_bn", "torchvision/squeezenet1_0"),
    *("torchvision/shufflenet_v2_x1_0", "torchvision/alexnet", "torchvision/googlenet", "torchvision/inception_v3"),
    *("timm/rexnet_100", "timm/densenet121", "timm/vgg11_bn"),
)
# of the same blocks as others; `bench/families.py` tries them too
ALIKE = (
    *("torchvision/resnet34", "torchvision/resnet101", "timm/resnet34d", "timm/wide_resnet50_2"),
    *(
        "torchvision/fasterrcnn_resnet50_fpn_v2",
        "torchvision/keypointrcnn_resnet50_fpn",
        "torchvision/fcos_resnet50_fpn",
    ),
    *("torchvision/maskrcnn_resnet50_fpn", "torchvision/retinanet_resnet50_fpn"),
)
# the reasons that their errors give
REFUSED = {
    ("torchvision/swin_v2_t", "channel"): "a tensor after one that shares its memory was changed in place",
    ("torchvision/r3d_18", "channel"): "it does not have two nn.Conv2d or nn.Linear in sequence",
    ("timm/res2net50_26w_4s", "channel"): "the channels belong to its input or its result",
    ("timm/repvgg_a0", "channel"): "the channels belong to its input or its result",
    ("timm/mobileone_s0", "channel"): "the channels belong to its input or its result",
    ("timm/convnextv2_atto", "channel"): "GlobalResponseNorm 'mlp.grn' between the layers cannot be cut",
    ("timm/repvit_m1", "layer"): "its shortcut (token_mixer, se) has parameters, which would run twice",
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ZOO if name not in {*FAST, *WITHOUT_SUMS, *ALIKE}]


@pytest.mark.parametrize("gating", ["layer", "channel"])
@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_a_network_is_gated_and_compacted_to_the_same(name: str, gating: str) -> None:
    row = try_network(name, gating)
    if (name, gating) in REFUSED:
        assert row["result"].startswith("refused: block '") and REFUSED[name, gating] in row["result"]
        return
    assert row["result"] == "ok", row
    assert row["open"] == OPEN and row["compact"] <= EXACT[gating]
    assert row["macs"]["predicted"] == row["macs"]["compact"] < row["macs"]["plain"]
    if name in FAST and gating == "layer":
        assert row["gates"] == FAST[name]


@pytest.mark.parametrize("name", WITHOUT_SUMS)
def test_networks_without_a_residual_sum_say_so(name: str) -> None:
    with pytest.raises(ValueError, match="found no residual block"):
        fg.attach(build(name), "layer")


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v3_small", "timm/vit_tiny_patch16_224"])
def test_both_gates_of_a_block_add_up(name: str) -> None:
    model = build(name)
    inputs = ZOO[name].inputs()
    fg.attach(model, "both")
    decide_at_random(model)
    gates, costs = dict(fg.named_gates(model)), fg.gate_costs(model, inputs)
    for layer, gate in gates.items():
        inside = [other for other in gates if other != layer and other.startswith(layer.rpartition("gate")[0])]
        if gate.gates == 1 and not bool(gate.open):
            for other in inside:  # a closed layer closes its channels
                gates[other].freeze(torch.zeros(gates[other].gates, dtype=torch.bool))
    predicted = fg.macs(model, inputs) - sum(int(cost[~gates[n].open].sum()) for n, cost in costs.items())
    small = fg.compact(model)
    assert fg.macs(small, inputs) == predicted
    with torch.no_grad():
        # fp32 sums of fewer terms
        assert relative_difference([model(inputs)], [small(inputs)]) <= EXACT["both"]


class Copied(nn.Module):
    """The most copied CIFAR block: functional ReLUs, an empty Sequential as the shortcut."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class WholeBranch(nn.Module):
    """The branch in one Sequential, the identity added in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels),
        )  # fmt: skip
        self.act = nn.ELU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        x = self.branch(x)
        x += identity
        return self.act(x)


class Scaled(nn.Module):
    """A parameter of the block's own scales the branch, so that it is no chain of children."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv2 = nn.Conv2d(2 * channels, channels, 1)
        self.gamma = nn.Parameter(torch.rand(channels, 1, 1))
        self.gate = None  # a name of its own

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.conv2(F.hardswish(self.conv1(x)))


def by_people() -> nn.Module:
    blocks = (Copied(8, 8), Copied(8, 12, 2), WholeBranch(12), Scaled(12))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return randomize_batch_norm(model.append(nn.Linear(12, 10))).eval()


@pytest.mark.parametrize("gating", ["layer", "channel", "both"])
@pytest.mark.parametrize("mode", ["random", "mixed", "none", "all"])
def test_blocks_that_people_write(gating: str, mode: str) -> None:
    plain = by_people()
    state = copy.deepcopy(plain.state_dict())
    x = torch.randn(3, 3, 17, 18)
    wanted = plain(x)
    model = fg.attach(plain, gating)
    assert set(state) <= set(model.state_dict())
    assert len(list(fg.named_gates(model))) == (8 if gating == "both" else 4)
    freeze_at_random(model, mode)
    if mode == "all":
        assert torch.equal(model(x), wanted)
    small = fg.compact(model)
    assert not list(fg.named_gates(small)) and not any(isinstance(m, GatedModule) for m in small.modules())
    # the same operations for layer gates; for channels sums of fewer terms
    assert fg.compare(model, small, x) <= (0.0 if gating == "layer" else 1e-5)
    small.train()(x).sum().backward()
    for exported in (torch.export.export(small.eval(), (x,)).module(), torch.jit.trace(small, (x,))):
        assert relative_difference([small(x)], [exported(x)]) <= 1e-6


def test_a_module_with_a_gate_is_copied_pickled_and_saved(tmp_path: Path) -> None:
    model = fg.attach(by_people(), "both")
    x = torch.randn(3, 3, 17, 18)
    wanted = model(x)
    fg.save(model, tmp_path / "gated.safetensors")
    loaded = fg.load(tmp_path / "gated.safetensors", classes=[Copied, WholeBranch, Scaled])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(other(x), wanted)
        assert [name for name, _ in fg.named_gates(other)] == [name for name, _ in fg.named_gates(model)]
        freeze_at_random(other, "random")
        assert fg.compare(other, fg.compact(other), x) <= 1e-5
    freeze_at_random(loaded, "mixed")
    assert type(fg.compact(loaded)[5]) is Scaled


class Doubled(torchvision.models.resnet.BasicBlock):
    """A subclass of a known block that computes more: its gate is inside, so that the rest stays."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Leaky(nn.Module):
    """What works in place stays in the closed branch: it must not do so on the block's input."""

    def __init__(self, function: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.act, self.function = nn.LeakyReLU(0.3, inplace=True), function
        self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(x)
        hidden = F.leaky_relu_(hidden, 0.3) if self.function else self.act(hidden)
        return self.act(x + self.scale * self.conv2(hidden))


@pytest.mark.parametrize("function", [False, True])
def test_what_stays_of_a_closed_branch_works_on_nothing_of_others(function: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Leaky(function), Leaky(function)).eval()
    x = torch.randn(2, 3, 6, 7)
    fg.attach(model, "layer")
    freeze_at_random(model, "none")
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(wanted, F.leaky_relu(F.leaky_relu(model[0](x), 0.3), 0.3))
        assert torch.equal(fg.compact(model)(x), wanted)


class Twice(torchvision.models.resnet.BasicBlock):
    """A subclass of a known block that is none: what it adds to is not its input."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(out))))))


def test_subclasses_are_what_they_compute() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), randomize_batch_norm(Doubled(4, 4))).eval()
    x = torch.randn(2, 3, 6, 7)
    wanted = model(x)
    fg.attach(model, "layer")
    freeze_at_random(model, "all")
    assert torch.equal(model(x), wanted)
    freeze_at_random(model, "none")
    assert torch.equal(model(x), 2 * F.relu(model[0](x)))
    assert fg.compare(model, fg.compact(model), x) == 0.0

    with pytest.raises(ValueError, match="found no residual block"):
        fg.attach(nn.Sequential(nn.Conv2d(3, 4, 1), Twice(4, 4)), "layer")


def test_a_closed_sum_leaves_zeros_and_drops_what_feeds_it() -> None:
    model = fg.attach(build("timm/vit_tiny_patch16_224"), "layer")
    for _, gate in fg.named_gates(model):
        gate.freeze(torch.tensor(False))
    small: Any = fg.compact(model)
    assert isinstance(small.blocks[0].attn, Zeros) and isinstance(small.blocks[0].norm1, nn.Identity)
    assert sum(p.numel() for p in small.blocks.parameters()) == 0


def test_a_network_whose_blocks_need_its_own_inputs() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.blocks = nn.ModuleList([Mixer(8) for _ in range(2)])

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return x.mean(1)

    class Mixer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, width)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc2(F.gelu(self.fc1(self.norm(x))))

    model = Tokens().eval()
    ids = torch.randint(11, (3, 5))
    with pytest.raises(ValueError, match="pass inputs="):
        fg.attach(model, "layer")
    for gating in ("layer", "channel"):
        gated = fg.attach(copy.deepcopy(model), gating, inputs=ids)
        assert len(list(fg.named_gates(gated))) == 2
        freeze_at_random(gated, "random")
        assert fg.compare(gated, fg.compact(gated), ids) <= (0.0 if gating == "layer" else 1e-5)


def test_chains_become_residual_blocks_and_others_keep_their_class() -> None:
    model = fg.attach(by_people(), "layer")
    # a child named "branch" cannot be one of a ResidualBlock, which has a branch of its own
    assert [isinstance(block, ResidualBlock) for block in model[2:6]] == [True, True, False, False]
    assert isinstance(model[5], Scaled) and isinstance(model[5], GatedModule)
