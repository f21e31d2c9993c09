"""Blocks that are written or called in unusual ways: gated to the same, or refused by name; never wrong in silence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgate as fg
from fastgate.models.layout import find_blocks


class Called(nn.Module):
    """A stem and two blocks that are called as `call` says."""

    def __init__(self, stem: nn.Module, make: Callable[[], nn.Module], call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.stem, self.blocks, self.call = stem, nn.ModuleList([make(), make()]), call

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = self.call(block, x, *others)
        return x


def on_images(make: Callable[[], nn.Module], call: Callable[..., Tensor] = lambda block, x: block(x)) -> Called:
    return Called(nn.Conv2d(3, 4, 3, padding=1), make, call).eval()


def on_tokens(make: Callable[[], nn.Module], call: Callable[..., Tensor] = lambda block, x: block(x)) -> Called:
    return Called(nn.Linear(8, 8), make, call).eval()


def freeze(model: nn.Module, opened: bool) -> None:
    for _, gate in fg.named_gates(model):
        gate.freeze(torch.full((gate.gates,), opened))


def check(model: Called, gating: str, *inputs: Tensor, gates: int) -> nn.Module:
    """Gates leave the network as it is where they are open, and it compacts to the same where they are closed."""
    with torch.no_grad():
        wanted = model(*inputs)
        fg.attach(model, gating, inputs=inputs if len(inputs) > 1 else inputs[0])
        assert len(list(fg.named_gates(model))) == gates
        freeze(model, True)
        assert torch.equal(model(*inputs), wanted)
        freeze(model, False)
        closed = model(*inputs)
        assert not torch.equal(closed, wanted)
        small = fg.compact(model)
        # layer gates: the same operations; channels: sums of fewer terms
        torch.testing.assert_close(small(*inputs), closed, rtol=0, atol=0.0 if gating == "layer" else 1e-6)
    return small


class Scaled(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, 2 * channels, 1), nn.Conv2d(2 * channels, channels, 1)
        self.gamma = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.conv2(F.relu(self.conv1(x)))


class Inheriting(Scaled):
    """A subclass whose own code has no sum."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_subclass_that_calls_the_forward_of_its_base() -> None:
    check(on_images(Inheriting), "layer", torch.randn(2, 3, 8, 8), gates=2)


class ATuple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gamma = nn.Conv2d(4, 4, 3, padding=1), nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x + self.gamma * self.conv(x),)


def test_a_block_that_returns_a_tuple() -> None:
    model = on_images(ATuple, lambda block, x: block(x)[0])
    check(model, "layer", torch.randn(2, 3, 8, 8), gates=2)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool, self.conv = nn.AvgPool2d(3, 1, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x += self.conv(self.pool(x))
        return x


def test_a_sum_in_place_leaves_closed_samples_as_they_were() -> None:
    model = on_images(InPlace)
    x = torch.randn(4, 3, 8, 8)
    check(model, "layer", x, gates=2)
    block: Any = model.blocks[0]
    gate = next(gate for _, gate in fg.named_gates(block))
    gate.unfreeze()
    gate.register_forward_hook(lambda *_: torch.tensor([0.0, 1.0, 0.0, 1.0]).view(4, 1, 1, 1))
    with torch.no_grad():
        given = model.stem(x)
        got = block(given.clone())
    assert torch.equal(got[::2], given[::2]) and not torch.equal(got[1::2], given[1::2])


def test_a_forward_that_was_set_on_the_instance_cannot_take_a_gate() -> None:
    model = on_images(Scaled)
    for block in model.blocks:
        block.forward = lambda x, own=block.forward: own(x)
    with pytest.raises(ValueError, match=r"block 'blocks.0': cannot be gated"):
        fg.attach(model, "layer")
    assert not list(fg.named_gates(model))


class Conditioned(nn.Module):
    """A block of a diffusion network: features and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.embed = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(5, 4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(x) + self.embed(embedding)[:, :, None, None]))


@pytest.mark.parametrize("gating", ["layer", "channel"])
@pytest.mark.parametrize(
    "call",
    [
        lambda block, x, embedding: block(x, embedding),
        lambda block, x, embedding: block(x=x, embedding=embedding),
        lambda block, x, embedding: block(embedding=embedding, x=x),
    ],
    ids=["positional", "keywords", "keywords in another order"],
)
def test_a_block_of_two_inputs(call: Callable[..., Tensor], gating: str) -> None:
    inputs = (torch.randn(2, 3, 8, 8), torch.randn(2, 5))
    model = on_images(Conditioned, call)
    if gating == "channel":  # the embedding is added to the channels: what is closed would no longer be zero
        with pytest.raises(ValueError, match=r"block 'blocks.0': its channels cannot be gated: .*use gating='layer'"):
            fg.attach(model, gating, inputs=inputs)
        return
    small = check(model, gating, *inputs, gates=2)
    assert sum(parameter.numel() for parameter in small.blocks.parameters()) == 0  # type: ignore[union-attr]


def test_keywords_have_their_meaning_in_any_order() -> None:
    first, second = lambda b, x, e: b(x=x, embedding=e), lambda b, x, e: b(embedding=e, x=x)
    inputs = (torch.randn(2, 3, 8, 8), torch.randn(2, 5))
    model = on_images(Conditioned, first)
    fg.attach(model, "layer", inputs=inputs)
    freeze(model, False)
    wanted = model(*inputs)
    model.call = second
    assert torch.equal(model(*inputs), wanted)
    assert torch.equal(fg.compact(model)(*inputs), wanted)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class Attention(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(8), nn.Linear(8, 8)
        self.norm2, self.mlp = nn.LayerNorm(8), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def test_a_module_of_two_blocks_is_refused_and_nothing_is_changed() -> None:
    one = mlp()
    model = on_tokens(lambda: Attention(one))
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="mlp"):
        fg.attach(model, "layer", inputs=torch.randn(2, 5, 8))
    assert list(model.state_dict()) == keys and not list(fg.named_gates(model))
    check(on_tokens(lambda: Attention(mlp())), "layer", torch.randn(2, 5, 8), gates=4)


@pytest.mark.parametrize("gating", ["layer", "channel"])
def test_tokens_before_samples_are_refused(gating: str) -> None:
    """A gate would take tokens for samples, and decide by the others of the batch."""
    model = on_tokens(lambda: Attention(mlp()), lambda block, x: block(x.transpose(0, 1)).transpose(0, 1))
    with pytest.raises(ValueError, match=r"block 'blocks.0': .*the first dimension of its input is not the batch"):
        fg.attach(model, gating, inputs=torch.randn(2, 5, 8))
    assert not list(fg.named_gates(model))


class ChainOfItsOwn(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def test_a_sequential_with_a_forward_of_its_own() -> None:
    def make() -> nn.Module:
        return ChainOfItsOwn(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, bias=False))

    check(on_images(make), "layer", torch.randn(2, 3, 8, 8), gates=2)


class Flat(nn.Module):
    """The MLP's layers are the block's own, and as wide as the block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(8), nn.Linear(8, 8)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def test_one_module_takes_one_gate() -> None:
    x = torch.randn(2, 5, 8)
    model = on_tokens(Flat)
    with pytest.raises(ValueError, match="expected one gate, got a layer gate and a channel gate; use gating='layer'"):
        fg.attach(model, "both", inputs=x)
    assert not list(fg.named_gates(model))
    for gating, gates in (("layer", 4), ("channel", 2)):
        check(on_tokens(Flat), gating, x, gates=gates)


class Softmax(nn.Module):
    """What is between its linear layers mixes the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.softmax(self.fc1(x), -1))


def test_blocks_without_channel_gates_are_named() -> None:
    makers = iter([Softmax, lambda: Attention(mlp())])
    model = on_tokens(lambda: next(makers)())  # noqa: PLW0108
    with pytest.warns(UserWarning, match=r"1 residual blocks get no gate: 'blocks.0': ") as caught:
        fg.attach(model, "channel", inputs=torch.randn(2, 5, 8))
    assert caught[0].filename == __file__
    assert [name for name, _ in fg.named_gates(model)] == ["blocks.1.mlp.2.gate"]


class Dropped(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


def test_the_users_random_numbers_are_left_alone() -> None:
    x = torch.randn(2, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Dropped(), Dropped())
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout())
    state = torch.get_rng_state()
    assert list(find_blocks(model, {}, x)) == ["1", "2"]
    with pytest.raises(ValueError, match="found no residual block"):
        fg.attach(plain, inputs=x)
    assert torch.equal(torch.get_rng_state(), state)
