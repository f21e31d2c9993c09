"""Plain networks of equal MACs: depth first, then widths, of any family whose depth and widths can be chosen."""

import pytest
import torch
from torch import nn

import fastgate as fg
from fastgate.training.matching import match_latency, match_macs
from fastgate.training.network_names import parse_name
from fastgate.training.zoo import find_network, shape_of

SMALL = (3, 64, 64)


def macs_of(name: str, size: tuple[int, int, int] = SMALL) -> int:
    return fg.macs(find_network(name, 10, in_channels=size[0]).model, size)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("torchvision:resnet18", 0.5),
        ("torchvision:resnet18", 0.1),
        ("torchvision:resnext50_32x4d", 0.3),
        ("timm:resnet18", 0.5),
        ("timm:test_resnet", 0.8),
        ("timm:test_resnet", 0.5),  # most of it is the stem, which stays
    ],
)
def test_within_a_percent(name: str, share: float) -> None:
    wanted = round(share * macs_of(name))
    found = match_macs(name, 10, SMALL, wanted)
    assert found.startswith(f"{name}?")
    assert macs_of(found) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("torchvision:resnet18?layers=2,1,1,1", "2,1,1,1"), ("torchvision:resnet34", "2,3,4,2"), ("resnet44", None)],
)
def test_a_depth_that_fits_needs_no_other_widths(name: str, layers: str | None) -> None:
    """If a network of full widths has the requested MACs, it is the one found."""
    base = name.partition("?")[0]
    expected = f"{base}?layers={layers}" if layers else "resnet26"
    size = (3, 32, 32)
    assert match_macs(name, 10, size, macs_of(expected, size)) == expected


def test_stages_are_scaled_alike() -> None:
    """To one third below the shallowest network: every stage to a multiple of 8 near the same factor."""
    wanted = macs_of("torchvision:resnet18?layers=1,1,1,1") // 3
    shape = shape_of(parse_name(match_macs("torchvision:resnet18", 10, SMALL, wanted), None))
    assert shape is not None and shape.layers == (1, 1, 1, 1)
    assert all(width % 8 == 0 for width in shape.widths)
    factors = [width / own for width, own in zip(shape.widths, (64, 128, 256, 512), strict=True)]
    assert max(factors) / min(factors) < 2


def test_small_widths_are_uneven_where_they_have_to_be() -> None:
    """Where no common factor gives whole channels that meet the MACs, single stages differ from it."""
    size = (1, 8, 8)
    full = macs_of("resnet8?widths=4,8,12", size)
    for share in (0.9, 0.6):
        found = match_macs("resnet8?widths=4,8,12", 10, size, round(share * full), tolerance=0.03)
        assert macs_of(found, size) == pytest.approx(share * full, rel=0.03)


def test_the_rest_of_the_name_is_kept() -> None:
    wanted = macs_of("resnet20?widths=8,16,32&shortcut=pad") // 2
    found = match_macs("resnet20?widths=8,16,32&shortcut=pad", 10, SMALL, wanted)
    assert found.endswith("&shortcut=pad") and macs_of(found) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "timm:test_convnext", "torchvision.models:resnet18"])
def test_families_without_depth_and_widths(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"whose depth and widths can be chosen, got {name}; there is no plain network"
    ):
        match_macs(name, 10, SMALL, 10**6)


def test_macs_that_no_network_has() -> None:
    with pytest.raises(
        ValueError, match=r"wanted: expected at least .* MACs, of the smallest network like timm:resnet18,"
    ):
        match_macs("timm:resnet18", 10, SMALL, 10_000)
    least = macs_of("resnet8?widths=1,1,1", (1, 8, 8))
    with pytest.raises(
        ValueError, match=f"wanted: expected MACs that .* resnet20 has within 1%, got {least * 21 // 20}"
    ):
        match_macs("resnet20", 10, (1, 8, 8), least * 21 // 20)
    with pytest.raises(ValueError, match="did you mean torchvision:resnet18"):
        match_macs("torchvision:resnet19", 10, SMALL, 10_000)


def test_small_images_have_a_stem_of_their_own() -> None:
    name = "torchvision:resnet18?stem=3x3"
    model = find_network(name, 10).model
    assert model.conv1.kernel_size == (3, 3) and model.conv1.stride == (1, 1)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    half = match_macs(name, 10, SMALL, macs_of(name) // 2)
    assert half.endswith("&stem=3x3") and macs_of(half) == pytest.approx(macs_of(name) / 2, rel=0.01)
    with pytest.raises(ValueError, match=r"network: expected the option stem to be 3x3 .* got '5x5'"):
        find_network("torchvision:resnet18?stem=5x5", 10)


def test_equal_latency_takes_the_largest_network_that_is_fast_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts MACs: the found one is as fast, and every larger candidate is slower."""
    size = (3, 16, 16)

    def fake(models: dict[str, nn.Module], *_: object) -> dict[str, tuple[float, float, float]]:
        return {each: (0.0, float(fg.macs(model, size)), 0.0) for each, model in models.items()}

    monkeypatch.setattr("fastgate.training.matching.latency_quartiles", fake)
    network = find_network("resnet14", 10).model
    found = match_latency("resnet20", 10, torch.zeros(1, *size), network)
    assert 0.9 * fg.macs(network, size) <= macs_of(found, size) <= 1.05 * fg.macs(network, size)
    with pytest.raises(ValueError, match="that is as fast as the compact one, found none"):
        match_latency("resnet20", 10, torch.zeros(1, *size), nn.Conv2d(3, 1, 1))
    with pytest.raises(ValueError, match="whose depth and widths can be chosen, got torchvision:squeezenet1_1"):
        match_latency("torchvision:squeezenet1_1", 10, torch.zeros(1, *size), network)
