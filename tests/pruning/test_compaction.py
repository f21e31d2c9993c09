import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastgate as fg
from fastgate.gates import Gate
from fastgate.models import ResidualBlock
from tests.helpers import (
    GATINGS,
    MODES,
    PlainBlock,
    PreActivationBlock,
    assert_same_state,
    draw_masks,
    freeze_at_random,
    freeze_with,
    gated_resnet,
    gating_ids,
    randomize_batch_norm,
    resnet_by_hand,
    state_copy,
)


def assert_equal_outputs(model: nn.Module, compacted: nn.Module, x: Tensor, layer: bool) -> None:
    """Layer gates: the same operations on the same tensors, bit-equal. Channel gates: shorter sums round otherwise."""
    difference = fg.compare(model, compacted, x)
    if layer:
        assert difference == 0.0
    else:
        with torch.no_grad():
            scale = max(1.0, model(x).abs().max().item())
        # the promise for outputs of unit order: 1e-5, some 80 ulp of fp32
        assert difference <= 1e-5 * scale


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shortcut", ["conv", "pad"])
@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_resnet20_compact_equals_gated(gating: tuple[str, str], shortcut: str, mode: str) -> None:
    model = gated_resnet(20, gating, shortcut)
    with torch.no_grad():
        model.fc.weight.mul_(2 if mode == "all" else 1)  # keeps outputs of order 1 to 10 in every mode
    freeze_at_random(model, mode)
    x = torch.randn(4, 3, 16, 14)
    compacted = fg.compact(model)
    assert 0.1 < model(x).abs().max() < 20
    assert fg.compare(model, compacted, x) <= (0.0 if gating[0] == "layer" else 1e-5)
    assert_plain(compacted)


def assert_plain(network: nn.Module) -> None:
    assert [name for name, module in network.named_modules() if isinstance(module, Gate)] == []
    assert [key for key in network.state_dict() if "gate" in key] == []
    assert not network.training


@pytest.mark.parametrize("mode", ["random", "mixed", "one"])
@pytest.mark.parametrize("shortcut", ["conv", "pad"])
@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_gated_and_compact_equal_the_masked_network_by_hand(gating: tuple[str, str], shortcut: str, mode: str) -> None:
    model = gated_resnet(14, gating, shortcut).double()
    masks = freeze_at_random(model, mode)
    x = torch.randn(3, 3, 9, 12, dtype=torch.float64)
    wanted = resnet_by_hand(model.state_dict(), x, depth=14, gating=gating[0], position=gating[1], masks=masks)
    # fp64: rounding of 14 layers is orders below 1e-10 of outputs of order 10
    torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fg.compact(model)(x), wanted, rtol=1e-10, atol=1e-10)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision-resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "torchvision-resnet50": lambda: torchvision.models.resnet50(num_classes=10),
    "timm-resnet18": lambda: timm.create_model("resnet18", num_classes=10),
    "timm-resnet50": lambda: timm.create_model("resnet50", num_classes=10),
    "registered": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), PlainBlock(8, 5), PlainBlock(8, activation=nn.SiLU)),
    "registered-preactivation": lambda: nn.Sequential(PreActivationBlock(3, 8), PreActivationBlock(8, 12)),
}


# the large ones once: closed, cut and open blocks side by side
CASES = [
    pytest.param(name, mode, marks=[pytest.mark.slow] if "50" in name else [], id=f"{name}-{mode}")
    for name in NETWORKS
    for mode in ("mixed", "random", "none")
    if mode == "mixed" or "50" not in name
]


@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_other_networks_compact_equals_gated(name: str, gating: tuple[str, str], mode: str) -> None:
    model = fg.attach(randomize_batch_norm(NETWORKS[name]()).eval(), *gating)
    freeze_at_random(model, mode)
    compacted = fg.compact(model)
    assert_equal_outputs(model, compacted, torch.randn(2, 3, 33, 35), gating[0] == "layer")
    assert_plain(compacted)


@pytest.mark.parametrize("gating", [("layer", "middle"), ("channel", "middle")], ids=gating_ids)
def test_timm_blocks_with_squeeze_excitation(gating: tuple[str, str]) -> None:
    original = timm.create_model("resnet18", num_classes=4, block_args={"attn_layer": "se"})
    model = fg.attach(randomize_batch_norm(original).eval(), *gating)
    freeze_at_random(model, "mixed")
    assert_equal_outputs(model, fg.compact(model), torch.randn(2, 3, 32, 32), gating[0] == "layer")


class Net(nn.Module):
    """Three registered blocks behind a module of choice; `container` holds them."""

    def __init__(
        self,
        first: nn.Module,
        container: Callable[[list[nn.Module]], nn.Module] = lambda blocks: nn.Sequential(*blocks),
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.first = first
        self.blocks = container([PlainBlock(3, activation=activation) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def layer_gated(net: nn.Module, opened: list[bool]) -> nn.Module:
    model = fg.attach(randomize_batch_norm(net).eval(), "layer")
    names = [name for name, _ in fg.named_gates(model)]
    return freeze_with(model, {name: torch.tensor([o]) for name, o in zip(names, opened, strict=True)})


def count(network: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in network.modules())


def test_a_closed_block_keeps_its_relu_where_the_input_may_be_negative() -> None:
    model = layer_gated(Net(nn.Identity()), [False, True, True])
    x = torch.randn(2, 3, 6, 6)
    compacted = fg.compact(model)
    # the images are negative in places, so dropping the ReLU would change what comes out
    dropped = copy.deepcopy(compacted)
    dropped.blocks[0] = nn.Identity()
    assert fg.compare(model, dropped, x) > 1e-3
    assert fg.compare(model, compacted, x) == 0.0
    assert isinstance(compacted.blocks[0][0], nn.ReLU)


@pytest.mark.parametrize("opened", [[True, False, True], [True, False, False], [False, False, False]], ids=str)
def test_in_a_network_of_ones_own_the_first_closed_block_keeps_its_relu(opened: list[bool]) -> None:
    model = layer_gated(Net(nn.Identity()), opened)
    compacted = fg.compact(model)
    assert fg.compare(model, compacted, torch.randn(2, 3, 6, 6)) == 0.0
    assert count(compacted, nn.Conv2d) == 2 * sum(opened)
    # the first block sees the images; what the others see comes out of a block's ReLU
    for i, (block, is_open) in enumerate(zip(compacted.blocks, opened, strict=True)):
        if not is_open:
            assert type(block) is (nn.Identity if i else nn.Sequential)


@pytest.mark.parametrize(
    ("make", "known"),
    [
        pytest.param(lambda: fg.models.resnet(14), True, id="fastgate"),
        pytest.param(lambda: torchvision.models.resnet18(num_classes=3), True, id="torchvision"),
        pytest.param(lambda: timm.create_model("resnet18", num_classes=3), True, id="timm"),
        # a stem or a block without a ReLU may hand on negative values
        pytest.param(lambda: timm.create_model("resnet18", num_classes=3, act_layer=nn.ReLU6), False, id="timm-relu6"),
    ],
)
def test_where_every_input_comes_out_of_a_relu_closed_identity_blocks_leave_nothing(
    make: Callable[[], nn.Module], known: bool
) -> None:
    model = fg.attach(randomize_batch_norm(make())).eval()
    freeze_at_random(model, "none")
    compacted = fg.compact(model)
    assert fg.compare(model, compacted, torch.randn(2, 3, 40, 40)) == 0.0
    assert isinstance(compacted.layer1[1], nn.Identity) == known


def test_what_is_left_of_a_block_keeps_the_names_of_its_children() -> None:
    model = fg.attach(torchvision.models.resnet18(num_classes=3)).eval()
    before = set(model.state_dict())
    freeze_at_random(model, "none")
    assert set(fg.compact(model).state_dict()) <= before


class InPlaceStart(nn.Module):
    """y = x' + conv2(relu(conv1 x')) with x' = relu(x), since the branch's first ReLU changes x itself."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.relu2(self.conv1(self.relu(x)))) + x


fg.register_block(InPlaceStart, branch=("relu", "conv1", "relu2", "conv2"))


@pytest.mark.parametrize("mode", ["random", "none"])
@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_a_branch_that_starts_in_place(gating: tuple[str, str], mode: str) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), InPlaceStart(), nn.Conv2d(3, 3, 1)).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = plain(x)
    model = fg.attach(plain, *gating).eval()
    freeze_at_random(model, "all")
    assert torch.equal(model(x), expected)
    freeze_at_random(model, mode)
    # 3x3 sums of at most 36 products of unit order, added up in another order
    assert fg.compare(model, fg.compact(model), x) <= 1e-5


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.SiLU, nn.LeakyReLU, nn.Hardtanh])
def test_only_a_relu_of_a_nonnegative_input_is_the_identity(activation: type[nn.Module]) -> None:
    model = layer_gated(Net(nn.ReLU(), activation=activation), [True, False, False])
    compacted = fg.compact(model)
    # large enough for ReLU6 and Hardtanh to cut
    assert fg.compare(model, compacted, 20 * torch.randn(2, 3, 6, 6)) == 0.0
    assert count(compacted, activation) == 3


def test_blocks_in_a_module_list_keep_their_places() -> None:
    model = layer_gated(Net(nn.ReLU(), container=nn.ModuleList), [False, True, False])
    compacted = fg.compact(model)
    assert len(compacted.blocks) == 3
    assert fg.compare(model, compacted, torch.randn(2, 3, 6, 6)) == 0.0


class Offset(nn.Sequential):
    """A container with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x) - 0.5
        return x


class Indexed(nn.Module):
    """A network whose forward takes its blocks by index."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[2](self.blocks[1](self.blocks[0](x)))


@pytest.mark.parametrize("opened", [[True, False, True], [False, False, False]], ids=str)
@pytest.mark.parametrize("kind", [Offset, Indexed])
def test_a_forward_of_the_users_own_finds_every_block_in_its_place(
    kind: Callable[..., nn.Module], opened: list[bool]
) -> None:
    model = layer_gated(kind(*(PlainBlock(3) for _ in opened)), opened)
    assert fg.compare(model, fg.compact(model), torch.randn(2, 3, 6, 6)) == 0.0


class InplaceFirst(nn.Module):
    """The branch begins with an in-place ReLU, which changes what the shortcut passes on."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.conv = nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.relu(x))
        return x + y


fg.register_block(InplaceFirst, branch=("relu", "conv"))


@pytest.mark.parametrize("mode", ["none", "random"])
@pytest.mark.parametrize("gating", [("layer", "middle"), ("channel", "before"), ("channel", "after")], ids=gating_ids)
def test_a_branch_that_begins_in_place_compacts_to_the_same(gating: tuple[str, str], mode: str) -> None:
    model = fg.attach(nn.Sequential(nn.Conv2d(3, 4, 1), InplaceFirst()).eval(), *gating)
    freeze_at_random(model, mode)
    assert_equal_outputs(model, fg.compact(model), torch.randn(2, 3, 5, 5), gating[0] == "layer")


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("kind", [PlainBlock, PreActivationBlock])
def test_a_network_that_is_one_block(kind: type[nn.Module], opened: bool) -> None:
    block = PlainBlock(4) if kind is PlainBlock else PreActivationBlock(4, 6)
    model = layer_gated(block, [opened])
    compacted = fg.compact(model)
    assert fg.compare(model, compacted, torch.randn(2, 4, 6, 6)) == 0.0
    assert count(compacted, nn.Conv2d) == (3 if kind is PreActivationBlock else 2) - (0 if opened else 2)
    assert_plain(compacted)


def test_a_closed_block_does_not_write_into_its_neighbours_output() -> None:
    # torchvision's ReLU works in place; a lone one behind a compacted branch would change a tensor that others read
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = torchvision.models.resnet.BasicBlock(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.block(x), x], 1)

    model = layer_gated(Keeps(), [False])
    x = torch.randn(2, 3, 6, 6)
    kept = x.clone()
    assert fg.compare(model, fg.compact(model), x) == 0.0
    assert torch.equal(x, kept)


def test_closed_parts_are_gone() -> None:
    model = gated_resnet(14, ("layer", "middle"))
    masks = {name: torch.tensor([False]) for name, _ in fg.named_gates(model)}
    masks["layer3.1.gate"] = torch.tensor([True])
    freeze_with(model, masks)
    compacted = fg.compact(model)
    # stage 1 is empty; stages 2 and 3 keep their shortcuts; the one open block is whole
    kinds = [[type(block) for block in stage] for stage in (compacted.layer1, compacted.layer2, compacted.layer3)]
    assert kinds == [[nn.Identity, nn.Identity], [nn.Sequential, nn.Identity], [nn.Sequential, ResidualBlock]]
    assert count(compacted, nn.Conv2d) == 1 + 2 + 2


@pytest.mark.parametrize("mode", ["mixed", "random", "none"])
@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_what_is_left_keeps_its_names(gating: tuple[str, str], mode: str) -> None:
    model = gated_resnet(14, gating)
    freeze_at_random(model, mode)
    keys = set(fg.compact(model).state_dict())
    # "before" and "after" cannot do without saying which channels of the block's input or sum are meant
    index = {"before": "in_index", "after": "out_index"}.get(gating[1])
    added = {key for key in keys if index is not None and key.endswith(f".{index}")}
    assert keys - added < set(model.state_dict())
    assert {"conv1.weight", "fc.weight", "layer2.0.shortcut.0.weight"} < keys


@pytest.mark.parametrize("position", ["middle", "before", "after"])
def test_closed_channels_are_gone(position: str) -> None:
    model = gated_resnet(8, ("channel", position))
    kept = torch.zeros(16, dtype=torch.bool)
    kept[[2, 5, 11]] = True
    masks = {name: torch.ones(gate.gates, dtype=torch.bool) for name, gate in fg.named_gates(model)}
    freeze_with(model, {**masks, "layer1.0.gate": kept})
    block, whole = fg.compact(model).layer1[0], model.layer1[0]
    conv1, conv2 = {
        "middle": (whole.conv1.weight[kept], whole.conv2.weight[:, kept]),
        "before": (whole.conv1.weight[:, kept], whole.conv2.weight),
        "after": (whole.conv1.weight, whole.conv2.weight[kept]),
    }[position]
    assert torch.equal(block.conv1.weight, conv1) and torch.equal(block.conv2.weight, conv2)
    for conv in (block.conv1, block.conv2):
        assert tuple(conv.weight.shape[:2]) == (conv.out_channels, conv.in_channels)
    assert block.bn1.num_features == len(block.bn1.running_mean) == len(conv1)
    assert block.bn2.num_features == len(block.bn2.weight) == len(conv2)


@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_the_input_model_is_untouched_and_shares_nothing(gating: tuple[str, str]) -> None:
    model = gated_resnet(14, gating)
    freeze_at_random(model, "mixed")
    state, text = state_copy(model), repr(model)
    compacted = fg.compact(model)
    with torch.no_grad():
        for tensor in [*compacted.parameters(), *compacted.buffers()]:
            tensor.zero_()
    assert_same_state(model, state)
    assert repr(model) == text
    assert all(gate.frozen for _, gate in fg.named_gates(model)) and list(fg.named_gates(model))


def test_unfrozen_gates_are_named() -> None:
    model = fg.models.resnet(20, gating="layer")
    with pytest.raises(
        ValueError, match=r"got live gates layer1\.0\.gate, .*layer2\.0\.gate and 5 more; call fastgate\.f"
    ):
        fg.compact(model)
    freeze_at_random(model)
    dict(fg.named_gates(model))["layer3.1.gate"].unfreeze()
    with pytest.raises(ValueError, match=r"expected every gate frozen, got live gates layer3\.1\.gate; call"):
        fg.compact(model)


def test_a_plain_network_is_refused() -> None:
    with pytest.raises(ValueError, match="model: expected frozen gates, got none; a plain network is already compact"):
        fg.compact(fg.models.resnet(8))


def test_a_gate_of_the_users_own_block_is_refused_with_the_remedy() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.gate = fg.LayerGate(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + self.gate(x) * self.conv(x))

    model = Own()
    freeze_at_random(model)
    with pytest.raises(ValueError, match=r"gate 'gate': expected it in a residual block .* got it in Own"):
        fg.compact(model)


def test_modules_that_cannot_be_cut_are_named() -> None:
    model = fg.attach(nn.Sequential(PlainBlock(4)), "channel")
    model[0].bn1 = nn.GroupNorm(2, 4)  # attach() would have refused it
    freeze_with(model, {"0.gate": torch.tensor([True, False, True, True])})
    with pytest.raises(ValueError, match=r"cannot cut the channels of GroupNorm 'bn1' between a convolution and its"):
        fg.compact(model)
    # open throughout there is nothing to cut
    freeze_at_random(model, "all")
    assert fg.compare(model, fg.compact(model), torch.randn(2, 4, 5, 5)) == 0.0


TRAINED = [(gating, mode) for gating in GATINGS for mode in ("mixed", "random", "none")]


@pytest.mark.parametrize(("gating", "mode"), TRAINED, ids=[f"{gating_ids(g)}-{mode}" for g, mode in TRAINED])
def test_a_training_step_of_both_networks_agrees(gating: tuple[str, str], mode: str) -> None:
    """In training mode too the compact network is the masked one: batch statistics are per channel.

    fp64, so that only a real difference shows.
    """
    model = gated_resnet(14, gating).double()
    freeze_at_random(model, mode)
    compacted = fg.compact(model)
    x, y = torch.randn(6, 3, 12, 12, dtype=torch.float64), torch.randint(10, (6,))
    outputs, losses = [], []
    for network in (model.train(), compacted.train()):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        scores = network(x)
        loss = nn.functional.cross_entropy(scores, y)
        loss.backward()
        optimizer.step()
        outputs.append(scores)
        losses.append(nn.functional.cross_entropy(network(x), y).item())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-9)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    # the step did something, and the running statistics and weights that evaluation uses agree after it
    assert fg.compare(model, compacted, x) < 1e-9
    assert abs(losses[0] - loss.item()) > 1e-4


@pytest.mark.parametrize("position", ["middle", "before"])
def test_emptied_convolutions_train_on_single_pixels(position: str) -> None:
    model = gated_resnet(8, ("channel", position)).double()
    freeze_at_random(model, "none")
    compacted, x = fg.compact(model).train(), torch.randn(4, 3, 4, 4, dtype=torch.float64)
    # stage 3 sees one pixel: the batch alone is what the batch statistics are taken over
    torch.testing.assert_close(compacted(x), model.train()(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["none", "mixed", "all"])
@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_compaction_keeps_each_modules_mode(gating: tuple[str, str], mode: str) -> None:
    model = gated_resnet(14, gating).train()
    freeze_at_random(model, mode)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    compacted = fg.compact(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    held = [name for name, module in compacted.named_modules() if not module.training]
    norms = [name for name, module in compacted.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert held == norms and "bn1" in norms


def test_training_mode_and_frozen_parameters_survive() -> None:
    model = gated_resnet(14, ("channel", "middle"))
    model.train()
    model.layer2[0].conv1.weight.requires_grad_(False)
    freeze_at_random(model)
    compacted = fg.compact(model)
    assert all(module.training for module in compacted.modules())
    assert not compacted.layer2[0].conv1.weight.requires_grad and compacted.layer2[0].conv2.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_stay(dtype: torch.dtype) -> None:
    for mode in ("mixed", "none"):
        model = gated_resnet(8, ("channel", "middle")).to(dtype)
        freeze_at_random(model, mode)
        compacted = fg.compact(model)
        assert {p.dtype for p in compacted.parameters()} == {dtype}
        assert compacted(torch.randn(2, 3, 8, 8).to(dtype)).dtype == dtype


def test_channels_last_networks_stay_equal() -> None:
    model = gated_resnet(14, ("layer", "middle")).to(memory_format=torch.channels_last)
    freeze_at_random(model, "mixed")
    x = torch.randn(2, 3, 12, 12).to(memory_format=torch.channels_last)
    assert fg.compare(model, fg.compact(model), x) == 0.0


class Tiny(nn.Module):
    """Two small blocks with biases in their convolutions, the second one downsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.first = PlainBlock(4, 5)
        self.second = PreActivationBlock(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


TINY = {"middle": (5, 3), "before": (4, 4), "after": (4, 3)}


@given(st.sampled_from(sorted(TINY)), st.integers(0, 31), st.integers(0, 31), st.integers(1, 7), st.integers(1, 7))
def test_any_masks_and_any_map_size(position: str, first: int, second: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    model = fg.attach(randomize_batch_norm(Tiny()).double().eval(), "channel", position)
    masks = {}
    for name, bits, size in (("first.gate", first, TINY[position][0]), ("second.gate", second, TINY[position][1])):
        masks[name] = torch.tensor([bool(bits >> i & 1) for i in range(size)])
    freeze_with(model, masks)
    x = torch.randn(2, 4, height, width, dtype=torch.float64)
    # fp64: a handful of products of unit order
    assert fg.compare(model, fg.compact(model), x) < 1e-12


def test_strides_paddings_and_dilations_of_emptied_convolutions() -> None:
    """Where every channel is closed, the map's size must still be that of the convolutions that are gone."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 4, (3, 5), stride=(2, 1), padding=(0, 3), dilation=(1, 2))
            self.relu = nn.ReLU()
            self.conv2 = nn.Conv2d(4, 6, 3, stride=(1, 3), padding=2, bias=True)
            self.short = nn.Conv2d(3, 6, 1, stride=(2, 3), padding=(1, 0))

        def forward(self, x: Tensor) -> Tensor:
            return self.short(x) + self.conv2(self.relu(self.conv1(x)))

    fg.register_block(Odd, branch=("conv1", "relu", "conv2"), shortcut="short")
    x = torch.randn(2, 3, 12, 9, dtype=torch.float64)
    for position in ("middle", "before", "after"):
        model = fg.attach(nn.Sequential(Odd()).double().eval(), "channel", position)
        freeze_at_random(model, "none")
        compacted = fg.compact(model)
        # fp64: what is left are sums of a few dozen products of unit order
        assert fg.compare(model, compacted, x) < 1e-12


@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_compact_networks_export(gating: tuple[str, str]) -> None:
    model = gated_resnet(8, gating)
    # a whole, a partly and a fully closed block where there are channels
    freeze_at_random(model, "mixed" if gating[0] == "channel" else "one")
    compacted = fg.compact(model)
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(compacted, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=64)},))
    for n in (2, 5):
        images = torch.randn(n, 3, 8, 8)
        # the same operations of the same library
        assert torch.equal(program.module()(images), compacted(images))


def test_draw_masks_draws_what_it_says() -> None:
    model = fg.models.resnet(20, gating="channel")
    total = sum(mask.numel() for mask in draw_masks(model, "all").values())
    opened = {mode: [int(mask.sum()) for mask in draw_masks(model, mode).values()] for mode in MODES}
    assert opened["none"] == [0] * 9 and sum(opened["all"]) == total and opened["one"] == [1] * 9
    assert opened["mixed"][0] == 0 and 0 < opened["mixed"][1] < 16 and opened["mixed"][2] == 16
    layers = draw_masks(fg.models.resnet(20, gating="layer"), "one")
    assert sum(int(mask) for mask in layers.values()) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_on_a_device_compact_equals_gated(gating: tuple[str, str], mode: str) -> None:
    model = gated_resnet(20, gating).cuda()
    freeze_at_random(model, mode)
    assert_equal_outputs(model, fg.compact(model), torch.randn(4, 3, 32, 32, device="cuda"), gating[0] == "layer")
