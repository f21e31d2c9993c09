"""The plain network of equal MACs."""

from dataclasses import replace

import pytest

import fastgate as fg
from fastgate.training.controls import match_macs
from fastgate.training.networks import build_network
from fastgate.training.presets import Recipe

PLAIN = Recipe(network="resnet20", gating="none")
IMAGE = (3, 32, 32)


def macs(recipe: Recipe) -> int:
    return fg.macs(build_network(recipe, IMAGE, 10), IMAGE)


def test_the_same_network_has_equal_macs() -> None:
    assert match_macs(PLAIN, IMAGE, 10, macs(PLAIN)) == PLAIN


def test_the_width_makes_up_for_the_depth() -> None:
    wanted = round(0.53 * macs(PLAIN))
    found = match_macs(PLAIN, IMAGE, 10, wanted)
    assert macs(found) == pytest.approx(wanted, rel=0.02)
    assert found == replace(PLAIN, network=found.network, width=found.width)


def test_another_depth_where_no_width_of_the_nearest_fits() -> None:
    # ResNet-14 is nearest in MACs, but its widths leave a gap here
    wanted = round(0.7 * macs(PLAIN))
    assert macs(found := match_macs(PLAIN, IMAGE, 10, wanted)) == pytest.approx(wanted, rel=0.02)
    assert found.network != "resnet14"


def test_no_network_is_near_enough() -> None:
    with pytest.raises(ValueError, match=r"within 2% of 1000 MACs, the nearest is resnet\d+ of width"):
        match_macs(PLAIN, IMAGE, 10, 1000)
