import copy
import pickle
import sys
from collections.abc import Callable

import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn

import fastgate as fg
from fastgate.pruning.costs import Costs, total_cost
from tests.helpers import (
    GATINGS,
    PlainBlock,
    PreActivationBlock,
    assert_same_state,
    draw_masks,
    freeze_at_random,
    freeze_with,
    gating_ids,
    state_copy,
)


def closed_costs(costs: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]) -> int:
    return sum(int(cost[~masks[name]].sum()) for name, cost in costs.items())


@pytest.mark.parametrize(
    ("shortcut", "mode"),
    [
        *(("conv", mode) for mode in ("random", "mixed", "none", "one", "all")),
        ("pad", "random"),
        *(pytest.param("pad", mode, marks=pytest.mark.slow) for mode in ("mixed", "none", "one", "all")),
    ],
)
@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_the_compact_network_has_the_macs_that_the_costs_predict(
    gating: tuple[str, str], shortcut: str, mode: str
) -> None:
    image = (3, 13, 10)  # odd maps: every stage rounds its size
    model = fg.models.resnet(14, gating=gating[0], position=gating[1], shortcut=shortcut)
    full, costs = fg.macs(model, image), fg.gate_costs(model, image)
    assert list(costs) == [name for name, _ in fg.named_gates(model)]
    masks = freeze_at_random(model, mode)
    got, predicted = fg.macs(fg.compact(model), image), full - closed_costs(costs, masks)
    if gating[1] == "after" and not all(mask.any() for mask in masks.values()):
        # documented: where every channel of an "after" gate is closed, the whole branch goes
        assert got < predicted
    else:
        assert got == predicted


def test_costs_by_hand() -> None:
    # 3x16x16, first block of stage 2: stride 2, 16 -> 32 channels, 8x8 maps
    conv1, conv2 = 8 * 8 * 32 * 16 * 9, 8 * 8 * 32 * 32 * 9
    layer = fg.gate_costs(fg.models.resnet(8, gating="layer"), (3, 16, 16))["layer2.0.gate"]
    assert layer.dtype == torch.int64 and layer.tolist() == [conv1 + conv2]
    for position, channels, total in (
        ("middle", 32, conv1 + conv2),
        ("before", 16, conv1),
        ("after", 32, conv2),
    ):
        model = fg.models.resnet(8, gating="channel", position=position)
        cost = fg.gate_costs(model, (3, 16, 16))["layer2.0.gate"]
        assert cost.dtype == torch.int64 and cost.tolist() == [total // channels] * channels


@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
@pytest.mark.parametrize("network", ["torchvision", "bottleneck", "own"])
def test_other_networks_have_the_macs_that_their_costs_predict(network: str, gating: tuple[str, str]) -> None:
    model = {
        "torchvision": lambda: torchvision.models.resnet18(num_classes=10),
        "bottleneck": lambda: torchvision.models.resnet50(num_classes=10),
        "own": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), PlainBlock(8, 6), PreActivationBlock(8, 12)),
    }[network]()
    image = (3, 33, 40)
    fg.attach(model, *gating)
    full, costs = fg.macs(model, image), fg.gate_costs(model, image)
    masks = draw_masks(model, "random")
    for mask in masks.values():
        mask[0] |= gating[0] == "channel"  # at least one channel of each gate
    freeze_with(model, masks)
    assert fg.macs(fg.compact(model), image) == full - closed_costs(costs, masks)


def test_a_bottleneck_without_middle_channels_loses_its_first_convolution_too() -> None:
    model = fg.attach(torchvision.models.resnet50(num_classes=4), "channel", "middle")
    image = (3, 32, 32)
    full, costs = fg.macs(model, image), fg.gate_costs(model, image)
    masks = draw_masks(model, "all")
    masks["layer1.1.gate"][:] = False
    freeze_with(model, masks)
    # the gate sits between conv2 and conv3; conv1 now feeds nothing. The stem quarters the image: 8x8 maps
    first = 8 * 8 * model.layer1[1].conv1.weight.numel()
    assert first == 8 * 8 * 256 * 64
    assert fg.macs(fg.compact(model), image) == full - closed_costs(costs, masks) - first


def test_a_convolution_that_runs_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x + self.conv(self.act(self.conv(x))))

    fg.register_block(Twice, branch=("conv", "act", "conv"), activation="act")
    model = fg.attach(nn.Sequential(Twice()), "layer")
    assert fg.gate_costs(model, (3, 8, 8))["0.gate"].tolist() == [2 * 64 * 81] == [fg.macs(model, (3, 8, 8))]


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_gates_cost_nothing_and_count_as_open(frozen: bool) -> None:
    plain = fg.models.resnet(8)
    model = fg.models.resnet(8, gating="layer", hidden_features=64)
    if frozen:
        freeze_at_random(model, "none")
    for count in (fg.macs, fg.flops):
        assert count(model, (3, 32, 32)) == count(plain, (3, 32, 32))


def test_macs_leave_out_what_flops_count() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 12, 2)
    )
    macs = 12 * 5 * 3 * 9 + 5 * 12 * 2
    assert fg.macs(model, (3, 4, 3)) == macs
    # batch norm in eval mode: two per element
    assert fg.flops(model, (3, 4, 3)) == macs + 2 * 5 * 12


@pytest.mark.parametrize("gating", ["layer", "channel", "both"])
@pytest.mark.parametrize("make", [
    lambda: fg.models.resnet(8),
    lambda: torchvision.models.mobilenet_v3_small(num_classes=3),
    lambda: torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 48, num_classes=3),
], ids=["resnet", "mobilenet", "vit"])  # fmt: skip
def test_parameters_are_those_of_the_compact_network(make: Callable[[], nn.Module], gating: str) -> None:
    """Without gate heads, wherever they sit."""
    plain = make()
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    size = (3, 16, 16)
    model = fg.attach(plain, gating, inputs=torch.randn(2, *size))
    costs = fg.gate_costs(model, size, "params")
    assert costs.total == parameters
    decided = {}
    for i, (name, gate) in enumerate(fg.named_gates(model)):
        opened = torch.arange(gate.gates) % 2 == 0 if gate.gates > 1 else torch.tensor([i % 4 < 2])
        decided[name] = opened
        gate.freeze(opened)
    small = fg.compact(model)
    # of what a layer keeps of its shortcut nothing has parameters here
    assert costs.of(decided) == sum(parameter.numel() for parameter in small.parameters())


def test_only_flops_need_fvcore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)  # importing it raises
    model = fg.models.resnet(8, gating="layer")
    assert fg.macs(model, (3, 8, 8)) > sum(int(cost) for cost in fg.gate_costs(model, (3, 8, 8)).values()) > 0
    with pytest.raises(ModuleNotFoundError, match=r"fvcore is not installed; run `pip install 'fastgate\[flops\]'`"):
        fg.flops(model, (3, 8, 8))


def test_a_network_without_parameters_costs_nothing() -> None:
    for count in (fg.macs, fg.flops):
        assert count(nn.Sequential(nn.ReLU()), (3, 4, 4)) == 0


@pytest.mark.parametrize("size", [(3, 1, 1), (3, 7, 5), (3, 64, 32)], ids=str)
def test_images_of_any_size(size: tuple[int, int, int]) -> None:
    height, width = size[1:]
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1))
    assert fg.macs(model, size) == ((height + 1) // 2) * ((width + 1) // 2) * 4 * 27
    # a batch size in front is one of a shape, not a number of images
    assert fg.macs(model, (8, *size)) == fg.macs(model, torch.Size(size)) == fg.macs(model, list(size))


@pytest.mark.parametrize("size", [(3, 32), (32,), (1, 1, 3, 32, 32), (3, 0, 32), (3, -1, 32)], ids=str)
def test_what_is_no_image_size_is_refused(size: tuple[int, ...]) -> None:
    for count in (fg.macs, fg.flops, fg.gate_costs):
        with pytest.raises(ValueError, match=r"inputs: expected \(C, H, W\) of one image, or .*, got \("):
            count(fg.models.resnet(8, gating="layer"), size)


def test_wrong_channels_are_refused_by_the_network() -> None:
    # numbers, though the tracer turns sizes into tensors
    with pytest.raises(ValueError, match=r"x: expected \[N, 3, H, W\], got \[1, 1, 28, 28\];"):
        fg.macs(fg.models.resnet(8), (1, 28, 28))


def test_counting_disturbs_nothing() -> None:
    model = fg.models.resnet(8, gating="layer")
    model.layer2.eval()
    model(torch.randn(4, 3, 8, 8))
    loss = fg.polarization(model)
    modes = [module.training for module in model.modules()]
    state = state_copy(model)
    last = [(gate.logits, gate.decisions) for _, gate in fg.named_gates(model)]
    fg.macs(model, (3, 8, 8))
    fg.gate_costs(model, (3, 8, 8))
    assert [module.training for module in model.modules()] == modes
    assert_same_state(model, state)
    now = [(gate.logits, gate.decisions) for _, gate in fg.named_gates(model)]
    assert all(a is c and b is d for (a, b), (c, d) in zip(last, now, strict=True))
    assert torch.equal(fg.polarization(model), loss)


def test_a_gate_outside_a_residual_block_is_named() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.my_gate = fg.LayerGate(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x + self.my_gate(x) * self.conv(x))

    with pytest.raises(
        ValueError, match=r"gate '0\.my_gate': expected it in a residual block .*got it in Own; .*register"
    ):
        fg.gate_costs(nn.Sequential(Own()), (3, 8, 8))


@pytest.mark.gpu
def test_counting_happens_where_the_model_is() -> None:
    model = fg.models.resnet(8, gating="channel")
    wanted = fg.macs(model, (3, 32, 32))
    assert fg.macs(model.cuda(), (3, 32, 32)) == wanted
    assert all(p.is_cuda for p in model.parameters())


@pytest.mark.parametrize(
    ("network", "size", "counted"),
    [
        (fg.models.resnet20, (3, 32, 32), 40_813_184),
        (torchvision.models.resnet18, (3, 224, 224), 1_814_073_344),
        (torchvision.models.resnet50, (3, 224, 224), 4_089_184_256),
    ],
)
def test_macs_of_known_networks(network: Callable[[], nn.Module], size: tuple[int, ...], counted: int) -> None:
    """As counted by fvcore up to now; on the meta device, where nothing is computed."""
    with torch.device("meta"):
        assert fg.macs(network(), size) == counted


@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_a_gated_network_counts_as_if_every_gate_were_open(gating: tuple[str, str]) -> None:
    """Eval mode on a CPU leaves out what is closed: the count must not."""
    plain, image = fg.models.resnet(8), (3, 16, 16)
    closed = fg.models.resnet(8, gating=gating[0], position=gating[1], init_logit=-1.0)
    fg.freeze(frozen := fg.models.resnet(8, gating=gating[0], position=gating[1]), fg.decide(closed, [zeros(16)]))
    assert not any(gate.open.any() for _, gate in fg.named_gates(frozen))
    for model in (closed, frozen):
        assert fg.macs(model, zeros(16)) == 16 * fg.macs(plain, image)
        assert fg.flops(model, zeros(16)) == 16 * fg.flops(plain, image)
        assert sum(int(cost.sum()) for cost in fg.gate_costs(model, image).values()) > 0
    assert [(g.frozen, g.open.any()) for _, g in fg.named_gates(frozen)] == [(True, False)] * 3


def zeros(batch: int) -> torch.Tensor:
    return torch.zeros(batch, 3, 16, 16)


def test_a_gate_of_ones_own_counts_nothing() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate = nn.Conv2d(3, 3, 3, padding=1), fg.LayerGate(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x + self.gate(x) * self.conv(x))

    model = Own()
    last = model(zeros(2)) is not None and model.gate.decisions
    assert fg.macs(model, zeros(2)) == 2 * fg.macs(model, (3, 16, 16)) == 2 * 16 * 16 * 81
    assert fg.flops(model, (3, 16, 16)) == 16 * 16 * 81
    assert model.gate.decisions is last


def test_example_inputs_count_exactly() -> None:
    model = fg.models.resnet(8, gating="layer")
    one, costs = fg.macs(model, (3, 16, 16)), fg.gate_costs(model, (3, 16, 16))
    for inputs in (zeros(5), (zeros(5),), {"x": zeros(5)}):
        assert fg.macs(model, inputs) == total_cost(model, inputs) == 5 * one
        assert fg.flops(model, inputs) == 5 * fg.flops(model, (3, 16, 16))
        assert all(torch.equal(got, 5 * costs[name]) for name, got in fg.gate_costs(model, inputs).items())
        assert list(fg.gate_costs(model, inputs, "latency")) == list(costs)
        assert total_cost(model, inputs, "latency") > 10_000


class Branches(nn.Module):
    """Images by name in, results by name out; runs its residual blocks only where asked."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(PlainBlock(3), PlainBlock(3))

    def forward(self, batch: dict[str, list[torch.Tensor]], deep: bool = True) -> dict[str, list[torch.Tensor]]:
        return {"maps": [self.blocks(x) if deep else x for x in batch["images"]]}


def test_a_network_that_is_called_otherwise() -> None:
    model = fg.attach(Branches(), "layer")
    batch = {"batch": {"images": [zeros(1), zeros(2)]}}
    block = 16 * 16 * 2 * 81
    assert fg.macs(model, batch) == fg.flops(model, batch) - 3 * 16 * 16 * 2 * 2 * 2 * 3 == 3 * 2 * block
    assert [int(cost) for cost in fg.gate_costs(model, batch).values()] == [3 * block] * 2

    def as_list(model: nn.Module, images: torch.Tensor) -> object:
        return model({"images": [images]})

    for inputs in ((3, 16, 16), zeros(1)):
        assert fg.macs(model, inputs, forward=as_list) == total_cost(model, inputs, forward=as_list) == 2 * block
        assert fg.flops(model, inputs, forward=as_list) == 2 * block + 2 * 2 * 2 * 3 * 16 * 16
        assert [int(cost) for cost in fg.gate_costs(model, inputs, forward=as_list).values()] == [block] * 2
        assert len(fg.gate_costs(model, inputs, "latency", forward=as_list)) == 2
        assert total_cost(model, inputs, "latency", forward=as_list) > 0


@pytest.mark.parametrize("cost", ["macs", "latency"])
def test_a_block_that_does_not_run_has_no_known_cost(cost: str) -> None:
    model = fg.attach(Branches(), "layer")
    with pytest.raises(ValueError, match=r"gate 'blocks\.0\.gate': its block did not run on these inputs, .*forward="):
        fg.gate_costs(model, {"batch": {"images": [zeros(1)]}, "deep": False}, cost)


def test_a_layer_that_two_blocks_share_counts_in_each() -> None:
    first, second = PlainBlock(3), PlainBlock(3)
    second.conv2 = first.conv2
    model = fg.attach(nn.Sequential(first, nn.MaxPool2d(2), second), "layer")
    assert [int(cost) for cost in fg.gate_costs(model, (3, 16, 16)).values()] == [16 * 16 * 162, 8 * 8 * 162]


def test_networks_that_take_and_return_nested_values() -> None:
    """Real ones: segmentation returns a dict, Hugging Face takes keywords, detection takes a list of images."""
    segmentation = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=2)
    fg.attach(segmentation, "layer")
    stem = 16 * 16 * 64 * 3 * 49  # of a 32x32 image
    costs = fg.gate_costs(segmentation, (3, 32, 32))
    # the head: 3x3 on 2048 channels at an eighth of the size, then 1x1
    head = 4 * 4 * (2048 * 512 * 9 + 512 * 2)
    shortcuts = 8 * 8 * 64 * 256 + 4 * 4 * (256 * 512 + 512 * 1024 + 1024 * 2048)
    assert fg.macs(segmentation, (3, 32, 32)) == stem + sum(int(c) for c in costs.values()) + shortcuts + head

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    classifier = transformers.ResNetForImageClassification(config)
    batch = {"pixel_values": torch.zeros(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    assert fg.macs(classifier, batch) == 2 * fg.macs(classifier, (3, 32, 32)) > 0
    assert fg.flops(classifier, batch) > fg.macs(classifier, batch)

    detection = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=32, max_size=64, rpn_post_nms_top_n_test=3, num_classes=2
    )
    fg.attach(detection, "layer")
    images = [torch.zeros(3, 32, 32), torch.zeros(3, 24, 24)]  # both are resized to 32 x 32
    backbone = fg.gate_costs(detection, images)["backbone.body.layer1.1.gate"]
    assert int(backbone) == 2 * 8 * 8 * (256 * 64 * 2 + 64 * 64 * 9)


@pytest.mark.parametrize("mode", ["random", "one"])
@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_the_compact_network_has_the_parameters_that_the_costs_predict(gating: tuple[str, str], mode: str) -> None:
    model = fg.models.resnet(14, gating=gating[0], position=gating[1])
    costs, full = fg.gate_costs(model, (3, 8, 8), "params"), total_cost(model, (3, 8, 8), "params")
    assert full == sum(parameter.numel() for parameter in fg.models.resnet(14).parameters())
    masks = freeze_at_random(model, mode)
    assert all(mask.any() for mask in masks.values()) or gating[0] == "layer"
    got = sum(parameter.numel() for parameter in fg.compact(model).parameters())
    assert got == full - closed_costs(costs, masks)


@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_latency_is_measured_per_kind_of_block(gating: tuple[str, str]) -> None:
    """What is measured varies; that equal blocks share one measurement and that nothing is disturbed does not."""
    model = fg.models.resnet(20, gating=gating[0], position=gating[1])
    before = state_copy(model)
    costs = fg.gate_costs(model, (3, 16, 16), "latency")
    assert_same_state(model, before)
    assert model.training and not any(gate.frozen for _, gate in fg.named_gates(model))
    assert all(gate.decisions is None for _, gate in fg.named_gates(model))
    assert {name: len(cost) for name, cost in costs.items()} == {n: g.gates for n, g in fg.named_gates(model)}
    assert all(cost.dtype == torch.int64 and int(cost.min()) >= 1 for cost in costs.values())
    for stage in (1, 2, 3):
        assert torch.equal(costs[f"layer{stage}.1.gate"], costs[f"layer{stage}.2.gate"])
    assert total_cost(model, (3, 16, 16), "latency") > 10_000  # nanoseconds: no network answers within 10 us


def test_an_unknown_cost() -> None:
    for count in (fg.gate_costs, total_cost):
        with pytest.raises(ValueError, match="cost: expected one of macs, params, latency, got 'joules'"):
            count(fg.models.resnet(8, gating="layer"), (3, 8, 8), "joules")


@pytest.mark.parametrize("cost", ["macs", "params"])
def test_costs_know_what_the_whole_network_costs(cost: str) -> None:
    model = fg.models.resnet(8, gating="channel")
    inputs = torch.zeros(3, 3, 8, 8)
    costs = fg.gate_costs(model, inputs, cost)
    assert costs.total == total_cost(model, inputs, cost) > costs.switchable
    assert costs.switchable == sum(int(each.sum()) for each in costs.values())


def test_costs_in_time_know_what_the_whole_network_takes() -> None:
    costs = fg.gate_costs(fg.models.resnet(8, gating="layer"), (3, 8, 8), "latency")
    assert costs.total > 10_000  # nanoseconds


def test_copies_of_costs_keep_the_sums() -> None:
    # more than the 24 bits of fp32 hold
    costs = Costs({"a": torch.tensor([16_777_217, 1]), "b": torch.tensor([3])}, 33_554_433)
    copies = [costs.copy(), copy.copy(costs), copy.deepcopy(costs), pickle.loads(pickle.dumps(costs)), costs.to("cpu")]
    for same in copies:
        assert type(same) is Costs and list(same) == ["a", "b"]
        assert (same.total, same.switchable) == (33_554_433, 16_777_221)
        assert all(torch.equal(same[name], cost) for name, cost in costs.items())
    moved = costs.to(dtype=torch.float32)
    assert moved["a"].dtype == torch.float32 and costs["a"].dtype == torch.int64
    assert (moved.total, moved.switchable) == (33_554_433, 16_777_221)
