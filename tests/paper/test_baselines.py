"""Random parameters and random layers set to zero."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import fastgate as fg
from fastgate.paper.baselines import SHARES, drop_layers, drop_parameters, measure_naive
from fastgate.training.data import Batches, load_dataset
from tests.helpers import randomize_batch_norm, state_copy


@pytest.fixture
def network() -> nn.Module:
    return randomize_batch_norm(fg.models.resnet20(in_channels=1)).eval()


@pytest.mark.parametrize("share", SHARES)
def test_a_share_of_all_parameters_is_zero(network: nn.Module, share: float) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_().add_(1.0)  # so that every 0 comes from dropping
    before = state_copy(network)
    dropped = drop_parameters(network, share, seed=1)
    values = torch.cat([parameter.flatten() for parameter in dropped.parameters()])
    assert int((values == 0).sum()) == round(share * len(values))
    for new, old in zip(dropped.parameters(), network.parameters(), strict=True):
        assert torch.equal(new[new != 0], old[new != 0])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def zeroed_branches(network: nn.Module, dropped: nn.Module, x: torch.Tensor) -> list[str]:
    """Names of the blocks whose branch must be set to 0 in `network` so that it computes what `dropped` does."""
    kept = {name for name, module in dropped.named_modules() if name.endswith("conv1") and "." in name}
    closed = [
        name.removesuffix(".conv1")
        for name, _ in network.named_modules()
        if name.endswith("conv1") and "." in name and name not in kept
    ]
    masked = copy.deepcopy(network)
    with torch.no_grad():
        for name in closed:
            norm = masked.get_submodule(f"{name}.bn2")
            norm.weight.zero_()  # type: ignore[union-attr, operator]
            norm.bias.zero_()  # type: ignore[union-attr, operator]
        assert torch.equal(masked(x), dropped(x))
    return closed


@pytest.mark.parametrize(("share", "layers"), [(0.2, 2), (0.3, 3), (0.5, 5), (0.6, 5), (0.8, 7)])
def test_a_share_of_the_layers_is_as_if_set_to_zero(network: nn.Module, share: float, layers: int) -> None:
    x = torch.randn(4, 1, 8, 8)
    assert len(zeroed_branches(network, drop_layers(network, share, seed=1), x)) == layers


def test_the_seed_draws(network: nn.Module) -> None:
    x = torch.randn(4, 1, 8, 8)
    for drop in (drop_parameters, drop_layers):
        with torch.no_grad():
            first, again, other = (drop(network, 0.3, seed)(x) for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_points_are_measured_once(network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = load_dataset("digits")
    batches = Batches(digits, digits.test.take(torch.arange(60)), 60)
    points = measure_naive(network, batches, (1, 8, 8), torch.float32, tmp_path / "naive.json")
    assert [(point["kind"], point["pruned"]) for point in points] == [
        (kind, 100 * share) for kind in ("dropout", "layers") for share in SHARES
    ]
    for point in points:
        assert point["lowest"] <= point["accuracy"] <= point["highest"]
    dropout, layers = points[: len(SHARES)], points[len(SHARES) :]
    assert {point["flops_cut"] for point in dropout} == {None}  # it computes as much as before
    cuts = [point["flops_cut"] for point in layers]
    assert cuts == sorted(cuts) and 0 < cuts[0] < cuts[-1] < 100
    monkeypatch.setattr("fastgate.paper.baselines.evaluate", None)  # not called again
    assert measure_naive(network, batches, (1, 8, 8), torch.float32, tmp_path / "naive.json") == points
