import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastgate as fg
from fastgate.functional import gate_head, gated_residual
from fastgate.models.block import ResidualBlock
from fastgate.ops.means import detach, known_means, remember_means

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("ieee")


def with_means(x: Tensor | None = None) -> Tensor:
    x = torch.randn(4, 3, 2, 2) if x is None else x
    remember_means(x, x.mean((2, 3)))
    return x


def test_means_travel_with_their_map() -> None:
    x = with_means()
    assert torch.equal(known_means(x), x.mean((2, 3)))
    assert known_means(torch.randn(4, 3, 2, 2)) is None


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: x.relu_(), id="in-place"),
        pytest.param(lambda x: x.detach(), id="detached"),
        pytest.param(lambda x: x.clone(), id="copy"),
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda x: x.view(x.shape), id="view"),
        pytest.param(lambda x: x.half(), id="cast"),
        pytest.param(lambda x: x * 2, id="product"),
    ],
)
def test_a_changed_map_has_none(change: Callable[[Tensor], Tensor]) -> None:
    assert known_means(change(with_means())) is None


def test_a_detached_map_keeps_them() -> None:
    x = with_means(torch.randn(4, 3, 2, 2, requires_grad=True) * 1)
    without = detach(x)
    assert torch.equal(known_means(without), known_means(x)) and not without.requires_grad
    x.relu_()
    assert known_means(without) is None
    assert known_means(detach(torch.randn(4, 3, 2, 2))) is None


def test_a_change_through_a_view_is_seen() -> None:
    x = with_means()
    x[:, 1].zero_()
    assert known_means(x) is None


def test_nothing_is_kept_of_a_map_that_is_gone() -> None:
    x = with_means()
    means = weakref.ref(known_means(x))
    assert means() is not None
    del x
    assert means() is None


def test_inference_tensors_carry_none() -> None:
    with torch.inference_mode():
        assert known_means(with_means(torch.randn(4, 3, 2, 2))) is None


def block() -> ResidualBlock:
    modules = {"conv": nn.Conv2d(3, 3, 3, padding=1), "relu": nn.ReLU()}
    gate = fg.LayerGate(3, impl="triton")
    return ResidualBlock(modules, ["conv"], None, "relu", gate=gate).to(DEVICE)


def read_maps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each gate head's kernel read a map (and not means), as they come."""
    from fastgate.kernels import gate_head as module

    found: list[bool] = []
    original = module.gate_head_fwd

    def watched(x: Tensor, *rest: Any) -> Any:
        found.append(x.dim() == 4)
        return original(x, *rest)

    monkeypatch.setattr(module, "gate_head_fwd", watched)
    return found


def halve(module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
    return y / 2


def halve_in_place(module: nn.Module, inputs: Any, y: Tensor) -> None:
    with torch.no_grad():
        y.div_(2)


@pytest.mark.parametrize(
    ("hook", "reads"),
    [(None, [True, False, False]), (halve, [True, True, True]), (halve_in_place, [True, True, True])],
    ids=["plain", "hook", "hook-in-place"],
)
def test_the_next_blocks_head_reads_nothing_of_x(hook: Any, reads: list, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = nn.Sequential(block(), block(), block()).eval()
    if hook is not None:
        for each in blocks:
            each.register_forward_hook(hook)
    x = torch.randn(5, 3, 4, 4, device=DEVICE)
    found = read_maps(monkeypatch)
    with torch.no_grad():
        y = blocks(x)
    assert found == reads
    for each in blocks:
        each.gate.impl = "torch"
    with torch.no_grad():
        # fp32 sums of 27 products in another order, three times
        torch.testing.assert_close(y, blocks(x), rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_map_itself() -> None:
    """Of the map between two blocks too, where `torch.autograd.grad` and hooks look for them."""
    branch, gate = torch.randn(4, 3, 2, 2, device=DEVICE), torch.ones(4, device=DEVICE)
    head = {
        "fc1_weight": torch.randn(5, 3, device=DEVICE), "fc1_bias": None,
        "fc2_weight": torch.randn(2, 5, device=DEVICE), "fc2_bias": torch.randn(2, device=DEVICE),
    }  # fmt: skip
    shortcut = torch.randn(4, 3, 2, 2, device=DEVICE).requires_grad_()
    found = []
    for impl in ("triton", "torch"):
        y = gated_residual(shortcut, branch, gate, impl=impl)
        assert (known_means(y) is not None) == (impl == "triton")
        logits = gate_head(y, **head, training=True, impl=impl)[1]
        found.append(torch.autograd.grad(logits.square().sum(), (y, shortcut)))
    for got, expected in zip(*found, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(
            got, expected, rtol=1e-4, atol=1e-5
        )  # fp32 sums of up to 12 terms, and their quotients
