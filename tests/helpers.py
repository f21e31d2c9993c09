"""What several test files share: networks with telling values, frozen masks, and a masked forward written by hand."""

from collections.abc import Callable, Iterable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgate as fg
from fastgate.pruning.decisions import GateDecision

MODES = ("random", "mixed", "none", "one", "all")

# every way in which a network can be gated: (gating, position); layer gates have no position
GATINGS = (("layer", "middle"), ("channel", "middle"), ("channel", "before"), ("channel", "after"))


def gating_ids(gating: tuple[str, str]) -> str:
    return gating[0] if gating[0] == "layer" else f"channel-{gating[1]}"


def randomize_batch_norm(model: nn.Module) -> nn.Module:
    """Give every batch norm statistics and affine values that change what passes, of unit order; returns the model."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model


def draw_masks(model: nn.Module, mode: str) -> dict[str, Tensor]:
    """Open or closed for every gate (channel) of the model, by gate name.

    random: a coin for each; none: all closed; all: all open; one: one layer of the network is open, or one channel of
    each gate; mixed: each gate is all closed, all open or random, so that neighbours differ in kind.
    """
    gates = dict(fg.named_gates(model))
    sizes = {name: gate.gates for name, gate in gates.items()}
    if mode == "random":
        return {name: torch.rand(size) < 0.5 for name, size in sizes.items()}
    if mode == "mixed":
        ratios = {name: (0.0, 0.5, 1.0)[i % 3] for i, name in enumerate(sizes)}
        return {name: torch.rand(size) < ratios[name] for name, size in sizes.items()}
    if mode in ("none", "all"):
        return {name: torch.full((size,), mode == "all") for name, size in sizes.items()}
    if mode == "one":
        if all(size == 1 for size in sizes.values()):
            chosen = int(torch.randint(len(sizes), ()))
            return {name: torch.tensor([i == chosen]) for i, name in enumerate(sizes)}
        return {name: torch.arange(size) == torch.randint(size, ()) for name, size in sizes.items()}
    raise ValueError(mode)


def freeze_with(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    return fg.freeze(model, fg.Decisions({name: GateDecision(mask.double(), mask) for name, mask in masks.items()}))


def freeze_at_random(model: nn.Module, mode: str = "random") -> dict[str, Tensor]:
    """Freeze the model with masks of :func:`draw_masks` and return them."""
    masks = draw_masks(model, mode)
    freeze_with(model, masks)
    return masks


def gated_resnet(depth: int, gating: tuple[str, str], shortcut: str = "conv", **options: object) -> fg.models.ResNet:
    """A gated CIFAR ResNet in eval mode, batch norms randomized."""
    model = fg.models.resnet(depth, gating=gating[0], position=gating[1], shortcut=shortcut, **options)
    return randomize_batch_norm(model).eval()


def resnet_by_hand(
    state: Mapping[str, Tensor],
    x: Tensor,
    *,
    depth: int,
    gating: str | None = None,
    position: str = "middle",
    masks: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The forward of a CIFAR ResNet in eval mode from its state_dict alone, with nothing of fastgate.

    Each gate's mask multiplies where the paper puts the gate: a layer gate the branch's result, a channel gate the
    input of conv1 ("before"), the input of conv2 ("middle") or the branch's result ("after"). A stage whose first block
    has no "shortcut" in the state_dict subsamples and pads with zeros.
    """

    def norm(name: str, y: Tensor) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / torch.sqrt(var + 1e-5) * weight + bias

    def mask(block: str, at: str) -> Tensor | float:
        if masks is None or at != ("after" if gating == "layer" else position):
            return 1.0
        return masks[f"{block}.gate"].to(x.dtype)[:, None, None]

    x = norm("bn1", F.conv2d(x, state["conv1.weight"], padding=1)).clamp(min=0)
    for stage in (1, 2, 3):
        for i in range((depth - 2) // 6):
            block = f"layer{stage}.{i}"
            stride = 2 if stage > 1 and i == 0 else 1
            y = F.conv2d(x * mask(block, "before"), state[f"{block}.conv1.weight"], stride=stride, padding=1)
            y = norm(f"{block}.bn1", y).clamp(min=0)
            y = F.conv2d(y * mask(block, "middle"), state[f"{block}.conv2.weight"], padding=1)
            y = norm(f"{block}.bn2", y) * mask(block, "after")
            if f"{block}.shortcut.0.weight" in state:
                x = norm(f"{block}.shortcut.1", F.conv2d(x, state[f"{block}.shortcut.0.weight"], stride=stride))
            elif stride == 2:
                pad = torch.zeros_like(x[:, : x.shape[1] // 2, ::2, ::2])
                x = torch.cat([pad, x[:, :, ::2, ::2], pad], 1)
            x = (x + y).clamp(min=0)
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


class PlainBlock(nn.Module):
    """A user's block, registered below: y = act2(x + bn2(conv2(act1(bn1(conv1 x)))))."""

    def __init__(self, channels: int, width: int | None = None, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        width = width or channels
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(x + self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))


fg.register_block(PlainBlock, branch=("conv1", "bn1", "act1", "conv2", "bn2"), activation="act2")


class PreActivationBlock(nn.Module):
    """A user's block without an activation after the sum: y = short(x) + conv2(relu(bn2(conv1(relu(bn1 x)))))."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.short = nn.Conv2d(channels, out_channels, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu(self.bn1(x)))
        return self.short(x) + self.conv2(self.relu(self.bn2(y)))


fg.register_block(
    PreActivationBlock, branch=("bn1", "relu", "conv1", "bn2", "relu", "conv2"), shortcut="short", activation=None
)


def state_copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Same keys, and every tensor bit-equal."""
    now = model.state_dict()
    assert list(now) == list(state)
    assert [name for name in state if not torch.equal(now[name], state[name])] == []


def numerical_gradient(function: Callable[[], Tensor], tensor: Tensor, step: float = 1e-6) -> Tensor:
    """d function / d tensor by central differences, changing the fp64 tensor's entries in place one by one."""
    gradient = torch.zeros_like(tensor)
    flat, out = tensor.detach().view(-1), gradient.view(-1)
    for i in range(flat.numel()):
        value = flat[i].item()
        flat[i] = value + step
        above = function().item()
        flat[i] = value - step
        below = function().item()
        flat[i] = value
        out[i] = (above - below) / (2 * step)
    return gradient


def named(cases: Iterable[tuple[str, object]]) -> list:
    """Parametrize values with readable ids: [("id", value), ...]."""
    return [pytest.param(value, id=name) for name, value in cases]
