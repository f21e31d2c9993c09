"""A gated network computes less in eval mode, before any compaction, and the same."""

from collections.abc import Iterator

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fastgate as fg
from fastgate.gates import named_gates
from fastgate.models.block import ResidualBlock

GATINGS = [("layer", "middle"), ("channel", "middle"), ("channel", "before"), ("channel", "after")]


def gated(gating: str, position: str, x: Tensor, impl: str = "auto", depth: int = 14) -> nn.Module:
    """A network in eval mode with statistics of its own, each gate (channel) open for about half of the samples x."""
    model = fg.models.resnet(depth, gating=gating, position=position, init_logit=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    divide(model.eval(), x)
    for _, gate in named_gates(model):
        gate.impl = impl
    return model


@torch.no_grad()
def divide(model: nn.Module, x: Tensor) -> None:
    """Let each gate (channel) tell about half of the samples from the others, by far more than sums are rounded."""
    for _, gate in named_gates(model):
        model(x)
        logits = gate.logits.reshape(len(x), -1).sort(dim=0).values
        middle = logits[len(x) // 4 : len(x) - len(x) // 4]
        widest = middle.diff(dim=0).argmax(dim=0, keepdim=True)
        gate.fc2.bias -= (middle.gather(0, widest) + middle.gather(0, widest + 1)).squeeze(0) / 2


def convolved_samples(model: nn.Module, x: Tensor) -> dict[str, list[int]]:
    """Name of each block -> batch sizes that its bn1 saw: bn1 has no hook-free path of its own."""
    seen: dict[str, list[int]] = {}
    handles = [
        block.bn1.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(len(args[0])))
        for name, block in model.named_modules()
        if isinstance(block, ResidualBlock)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is skipped."""
    monkeypatch.setattr(ResidualBlock, "_may_gather", lambda *_: False)
    monkeypatch.setenv("FASTGATE_IMPL", "torch")
    return


@pytest.mark.parametrize(("gating", "position"), GATINGS)
@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_the_same_as_dense(gating: str, position: str, frozen: bool, request: pytest.FixtureRequest) -> None:
    x = torch.randn(8, 3, 12, 12)
    model = gated(gating, position, x)
    if frozen:
        for _, gate in named_gates(model):
            gate.freeze(torch.rand(gate.gates) < 0.5)
    with torch.no_grad():
        skipping = model(x)
        request.getfixturevalue("dense")
        # fp32 convolutions over fewer samples or channels add in another order
        torch.testing.assert_close(skipping, model(x), atol=1e-5, rtol=1e-4)


def test_closed_samples_are_not_convolved() -> None:
    x = torch.randn(16, 3, 12, 12)
    model = gated("layer", "middle", x)
    seen = convolved_samples(model, x)
    partly = 0
    for name, block in model.named_modules():
        if isinstance(block, ResidualBlock):
            assert block.gate is not None and block.gate.decisions is not None
            open_samples = int(block.gate.decisions.sum())
            assert seen.get(name, []) == ([open_samples] if open_samples else [])
            partly += 0 < open_samples < 16
    assert partly >= 4  # else the network shows nothing


def test_training_and_gradients_skip_nothing() -> None:
    x = torch.randn(4, 3, 8, 8)
    model = gated("layer", "middle", x)
    seen: list[int] = []
    model.layer1[0].bn1.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    model(x)  # eval mode, but a gradient is asked for: a closed gate has one too
    model.train()(x)
    assert seen == [4, 4]


def test_a_batch_norm_in_training_mode_sees_every_sample() -> None:
    # statistics re-estimated in a network that is otherwise in eval mode
    x = torch.randn(16, 3, 12, 12)
    model = gated("layer", "middle", x)
    for block in model.modules():
        if isinstance(block, ResidualBlock):
            block.bn1.train()
    assert all(sizes == [16] for sizes in convolved_samples(model, x).values())
    assert len(convolved_samples(model, x)) == 6


def test_counting_is_not_changed_by_what_is_closed() -> None:
    model = gated("layer", "middle", torch.randn(4, 3, 12, 12))
    before = fg.macs(model, (3, 32, 32))
    for _, gate in named_gates(model):
        gate.freeze(torch.tensor([False]))
    assert fg.macs(model, (3, 32, 32)) == before == fg.macs(fg.models.resnet(14), (3, 32, 32))


@pytest.mark.parametrize(
    ("gating", "position"),
    [
        ("layer", "middle"),
        ("channel", "middle"),
        pytest.param("channel", "before", marks=pytest.mark.slow),
        pytest.param("channel", "after", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_kernels_in_the_network(gating: str, position: str, frozen: bool) -> None:
    x = torch.randn(3, 3, 8, 8)
    model, plain = (gated(gating, position, x, impl, depth=8) for impl in ("triton", "torch"))
    plain.load_state_dict(model.state_dict())
    if frozen:
        for (_, gate), (_, other) in zip(named_gates(model), named_gates(plain), strict=True):
            gate.freeze(torch.rand(gate.gates) < 0.5)
            other.freeze(gate.open)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-4)
    if not frozen:  # in training the statistics are those of the batch
        divide(plain.train(), x)
        model.load_state_dict(plain.state_dict())
    for network in (model.train(), plain.train()):
        network(x).square().mean().backward()
    for (name, got), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (got.grad is None) == (expected.grad is None), name
        if got.grad is not None:
            # fp32 through 7 layers of batch norm over three samples
            torch.testing.assert_close(got.grad, expected.grad, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_hooks_of_a_gated_convolution_still_run() -> None:
    x = torch.randn(3, 3, 8, 8)
    model = gated("channel", "middle", x)
    with torch.no_grad():
        expected = model(x)
        seen: list[Tensor] = []
        model.layer1[0].conv2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(seen[0] == 0, (seen[0] * model.layer1[0].gate.decisions[:, :, None, None]) == 0)


def test_autocast_computes_the_gated_convolution_in_low_precision() -> None:
    x = torch.randn(3, 3, 8, 8)
    model = gated("channel", "middle", x)
    seen: list[torch.dtype] = []
    model.layer1[0].bn2.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert seen == [torch.bfloat16]


def test_a_bottleneck_of_torchvision() -> None:
    model = fg.attach(torchvision.models.resnet50(weights=None, num_classes=5), "layer", init_logit=None).eval()
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        skipping = model(x)
        decisions = torch.stack([gate.decisions for _, gate in named_gates(model)])
        assert 0 < decisions.mean() < 1
    # with gradients enabled nothing is skipped
    torch.testing.assert_close(skipping, model(x).detach(), atol=1e-4, rtol=1e-3)


def test_outputs_that_another_module_mixes_are_all_computed() -> None:
    # a group norm between convolution and gate: closed channels are in the open ones' statistics
    x = torch.randn(32, 3, 8, 8)
    model = gated("channel", "middle", x)
    for block in [module for module in model.modules() if isinstance(module, ResidualBlock)]:
        block.bn1 = nn.GroupNorm(2, block.conv1.out_channels)
        block.gate.freeze(torch.rand(block.gate.gates) < 0.5)
    with torch.no_grad():
        skipping = model(x)
        seen: list[Tensor] = []
        model.layer1[0].bn1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for _, module in model.named_modules():
            if isinstance(module, nn.Conv2d):  # a module with hooks is called as it is
                module.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(skipping, model(x), atol=1e-5, rtol=1e-4)
    assert (seen[0] != 0).any(dim=(0, 2, 3)).all()
