"""Plain networks of equal MACs: depth first, then widths, of any family whose depth and widths can be chosen."""

import pytest

import fastgate as fg
from fastgate.training.matching import match_macs
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
    """What is asked for is what a network of full widths has: that network is found."""
    base = name.partition("?")[0]
    expected = f"{base}?layers={layers}" if layers else "resnet26"
    size = (3, 32, 32)
    assert match_macs(name, 10, size, macs_of(expected, size)) == expected


def test_stages_are_scaled_alike() -> None:
    """To one third below the shallowest network: every stage by the same factor, up to a channel."""
    wanted = macs_of("torchvision:resnet18?layers=1,1,1,1") // 3
    shape = shape_of(parse_name(match_macs("torchvision:resnet18", 10, SMALL, wanted), None))
    assert shape is not None and shape.layers == (1, 1, 1, 1)
    factors = [width / own for width, own in zip(shape.widths, (64, 128, 256, 512), strict=True)]
    assert max(factors) - min(factors) < 1 / 64


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
