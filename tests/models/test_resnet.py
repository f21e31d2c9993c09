import pytest
import torch
from torch import Tensor, nn

import fastgate as fg
from fastgate.models.block import PadShortcut
from tests.helpers import GATINGS, freeze_with, gating_ids, randomize_batch_norm, resnet_by_hand

IMAGE = (3, 32, 32)


@pytest.mark.parametrize(
    ("depth", "shortcut", "flops"),
    [
        (110, "conv", 255_271_552),  # the paper's 255.3 M
        (110, "pad", 254_984_832),
        (56, "conv", 126_837_376),
    ],
)
def test_flops_are_the_papers_facts(depth: int, shortcut: str, flops: int) -> None:
    assert fg.flops(fg.models.resnet(depth, shortcut=shortcut), IMAGE) == flops


def macs_by_hand(depth: int, shortcut: str) -> int:
    """Multiply-adds at 3x32x32 from the formula: output pixels * outputs * inputs * kernel."""
    total, channels, size = 32 * 32 * 16 * 3 * 9, 16, 32
    for width in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            if width != channels:
                size //= 2
                total += size * size * width * channels * (shortcut == "conv")
            total += size * size * width * 9 * (channels + width)
            channels = width
    return total + 64 * 10


@pytest.mark.parametrize("shortcut", ["conv", "pad"])
@pytest.mark.parametrize("depth", [8, 20, 32])
def test_macs_are_the_formulas(depth: int, shortcut: str) -> None:
    assert fg.macs(fg.models.resnet(depth, shortcut=shortcut), IMAGE) == macs_by_hand(depth, shortcut)


@pytest.mark.parametrize("gating", GATINGS, ids=gating_ids)
def test_gated_networks_count_as_their_plain_ones(gating: tuple[str, str]) -> None:
    plain = fg.models.resnet(14)
    gated = fg.models.resnet(14, gating=gating[0], position=gating[1])
    for count in (fg.flops, fg.macs):
        assert count(gated, IMAGE) == count(plain, IMAGE)


@pytest.mark.parametrize("seed", range(4))
def test_the_papers_layer_pruned_network_has_its_flops(seed: int) -> None:
    """29 of 54 blocks open, of the closed ones exactly one downsampling: 137.0 to 138.0 M, the paper's 137.7 M."""
    torch.manual_seed(seed)
    model = fg.models.resnet110(gating="layer")
    gates = [name for name, _ in fg.named_gates(model)]
    assert len(gates) == 54
    down = ["layer2.0.gate", "layer3.0.gate"]
    others = [name for name in gates if name not in down]
    closed = {down[seed % 2]} | {others[i] for i in torch.randperm(len(others))[:24].tolist()}
    freeze_with(model, {name: torch.tensor([name not in closed]) for name in gates})
    assert 137.0e6 <= fg.flops(fg.compact(model), IMAGE) <= 138.0e6


@pytest.mark.parametrize(
    ("name", "blocks"), [("resnet20", 9), ("resnet32", 15), ("resnet44", 21), ("resnet56", 27), ("resnet110", 54)]
)
def test_depths_and_block_counts(name: str, blocks: int) -> None:
    model = getattr(fg.models, name)(gating="layer")
    assert len(list(fg.named_gates(model))) == blocks
    # 6n + 2: every convolution of the main path and the classifier
    main = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" not in n]
    assert len(main) + 1 == int(name.removeprefix("resnet"))


@pytest.mark.parametrize("shortcut", ["conv", "pad"])
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 3, 9, 13), (1, 3, 1, 1)], ids=str)
def test_forward_is_the_networks_formula(shape: tuple, shortcut: str) -> None:
    # odd sizes: both shortcuts must round up as the convolution does
    model = randomize_batch_norm(fg.models.resnet(14, 7, shortcut=shortcut)).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    wanted = resnet_by_hand(model.state_dict(), x, depth=14)
    assert wanted.shape == (shape[0], 7)
    # fp64, 14 layers: rounding is orders below 1e-10 of outputs of order 10
    torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-10)


def test_pad_shortcut_subsamples_and_pads_with_zeros_on_both_sides() -> None:
    x = torch.randn(2, 3, 5, 4)
    y = PadShortcut(3, 8, 2)(x)
    assert y.shape == (2, 8, 3, 2)
    wanted = torch.zeros(2, 8, 3, 2)
    for channel in range(3):
        for row in range(3):
            for column in range(2):
                # 5 more channels: 2 before, 3 behind
                wanted[:, channel + 2, row, column] = x[:, channel, 2 * row, 2 * column]
    assert torch.equal(y, wanted)


def test_any_images_any_classes() -> None:
    model = fg.models.resnet(8, 100, in_channels=1, gating="channel").eval()
    assert model(torch.zeros(2, 1, 28, 20)).shape == (2, 100)


def test_training_mode_and_gradients_reach_every_parameter() -> None:
    for gating in GATINGS:
        model = fg.models.resnet(8, gating=gating[0], position=gating[1], window="identity")
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_wrong_input_is_refused() -> None:
    model = fg.models.resnet(8)
    for x in (torch.zeros(2, 1, 8, 8), torch.zeros(3, 8, 8)):
        with pytest.raises(ValueError, match=r"x: expected \[N, 3, H, W\], got \["):
            model(x)


@pytest.mark.parametrize("depth", [0, 2, 18, 21, -4])
def test_unknown_depth(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth: expected 6n \+ 2 .*, got {depth}"):
        fg.models.resnet(depth)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shortcut": "none"}, ValueError, "shortcut: expected one of conv, pad, got 'none'"),
        ({"gating": "block"}, ValueError, "gating: expected one of layer, channel, both, got 'block'"),
        ({"gating": "channel", "position": "end"}, ValueError, "position: expected one of middle, before, after, got"),
        ({"gating": "layer", "estimator": "soft"}, ValueError, "estimator: expected one of"),
        ({"window": "clipped"}, ValueError, "gate options without gating: window"),
        ({"gating": "layer", "colour": 1}, TypeError, "colour"),
        ({"gating": "layer", "spatial_size": (32, 32)}, ValueError, "spatial_size: a layer gate always pools"),
    ],
)
def test_unknown_options_are_refused(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fg.models.resnet(8, **options)


def test_positions_act_where_they_say() -> None:
    """One closed channel in one block, seen at the convolutions around it."""
    for position, conv, side in (
        ("before", "conv1", "input"),
        ("middle", "conv2", "input"),
        ("after", "bn2", "output"),
    ):
        model = fg.models.resnet(8, gating="channel", position=position).eval()
        masks = {name: torch.ones(gate.gates, dtype=torch.bool) for name, gate in fg.named_gates(model)}
        masks["layer2.0.gate"][3] = False
        freeze_with(model, masks)
        seen: list[Tensor] = []
        module = model.get_submodule(f"layer2.0.{conv}")
        if side == "input":
            module.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(inputs[0]))
        else:
            # what is multiplied onto the branch is the gate's own output
            model.get_submodule("layer2.0.gate").register_forward_hook(lambda *a, seen=seen: seen.append(a[2]))
        model(torch.randn(2, 3, 8, 8))
        assert [i for i in range(seen[0].shape[1]) if not seen[0][:, i].any()] == [3]
        assert len(masks["layer2.0.gate"]) == (16 if position == "before" else 32)
