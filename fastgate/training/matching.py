"""Plain networks with the MACs or the latency of a compact network, to compare it with."""

import itertools
import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from heapq import merge

import torch
from torch import Tensor, nn

from fastgate.pruning.costs import macs
from fastgate.pruning.latency import latency_quartiles
from fastgate.training.network_names import NetworkName, parse_name
from fastgate.training.zoo import NoChannelsError, Shape, build, scaled, shape_of, with_shape

# preferred divisors of widths, best first: hardware processes channels in groups of 8, or of 4
_GRAINS = (8, 4, 1)
# largest deviation of a stage's width from the common scaling, in steps and as a factor
_REACH, _UNEVEN = 3, math.sqrt(2)
# widths tried for equal latency, relative to the network's own
_FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
# networks counted after the fit, before the next depth is tried
_COUNTED = 8


def match_macs(name: str, num_classes: int, image_size: Sequence[int], wanted: int, *, tolerance: float = 0.01) -> str:
    """The name of a plain network of the same family with `wanted` MACs, matched by depth first, then by widths.

    The depth is the one that is closest at the network's own widths, with the blocks distributed over the stages in the
    same proportions; if no widths make up the difference, the next closest. Among the widths that match, multiples of 8
    are preferred, then multiples of 4, with every stage within a factor of 1.41 of the common scaling; among these, the
    most evenly scaled.

    Args:
        name: of a ResNet of this library, torchvision or timm; no deeper network is considered.
        num_classes: number of outputs.
        image_size: (C, H, W).
        wanted: MACs, as :func:`fastgate.macs` counts them.
        tolerance: allowed deviation, as a fraction of `wanted`.

    Raises:
        ValueError: depth and widths of this network cannot be chosen, or no network has these MACs.
    """
    parsed, full = _chosen_shape(name)
    if wanted < 1:
        raise ValueError(f"wanted: expected a positive number of MACs, got {wanted}")

    @cache
    def count(layers: tuple[int, ...], widths: tuple[int, ...]) -> int:
        # with grouped convolutions the narrowest networks have no channels left; 0 MACs never match
        with torch.device("meta"), warnings.catch_warnings(), suppress(NoChannelsError):
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            model, _ = build(with_shape(parsed, Shape(layers, widths)), num_classes, image_size[0])
            return macs(model, image_size)
        return 0

    depths = list(_depths(parsed.kind, full.layers))
    least = count(depths[0], (1,) * len(full.widths))
    if least > (1 + tolerance) * wanted:
        raise ValueError(f"wanted: expected at least {least} MACs, of the smallest network like {parsed}, got {wanted}")

    def at_own_widths(layers: tuple[int, ...]) -> int:
        return count(layers, full.widths)

    middle = bisect_left(depths, wanted, key=at_own_widths)
    nearest_first = merge(
        reversed(depths[:middle]), depths[middle:], key=lambda each: abs(math.log(at_own_widths(each) / wanted))
    )
    for layers in nearest_first:
        widths = _match_widths(full.widths, wanted, tolerance, partial(count, layers))
        if widths is not None:
            return str(with_shape(parsed, Shape(layers, widths)))
    raise ValueError(
        f"wanted: expected MACs that a plain network like {parsed} has within {tolerance:.0%}, got {wanted}; choose "
        "another number"
    )


def match_latency(name: str, num_classes: int, example: Tensor, network: nn.Module, *, tolerance: float = 0.05) -> str:
    """The name of the plain network of the same family with the most MACs that is as fast as `network`.

    For each width (the network's own times 0.5 to 2, in multiples of 8), the deepest network that is fast enough is a
    candidate; times are medians of forward passes on one image, interleaved with those of `network`.

    Args:
        name: as for :func:`match_macs`.
        num_classes: number of outputs.
        example: one image `[1, C, H, W]`, on the device to measure on.
        network: the network to match, on that device.
        tolerance: fraction of its latency by which a plain network may be slower.

    Raises:
        ValueError: depth and widths of this network cannot be chosen, or none is fast enough.
    """
    parsed, full = _chosen_shape(name)
    depths = list(_depths(parsed.kind, full.layers))
    channels = example.shape[1]

    def make(layers: tuple[int, ...], widths: tuple[int, ...]) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            model, _ = build(with_shape(parsed, Shape(layers, widths)), num_classes, channels)
        return model.to(example.device).to(memory_format=torch.channels_last)

    found: dict[str, int] = {}
    for factor in _FACTORS:
        widths = tuple(_GRAINS[0] * max(1, round(width / _GRAINS[0])) for width in scaled(full.widths, factor))
        slow = len(depths)  # depths[slow:] are too slow
        fast = 0  # depths[:fast] are fast enough
        while fast < slow:
            middle = (fast + slow) // 2
            plain = make(depths[middle], widths)
            times = latency_quartiles({"it": network, "plain": plain}, example)
            if times["plain"][1] <= (1 + tolerance) * times["it"][1]:
                fast = middle + 1
                found[str(with_shape(parsed, Shape(depths[middle], widths)))] = macs(plain, example.shape[1:])
            else:
                slow = middle
    if not found:
        raise ValueError(
            f"network: expected a plain network like {parsed} that is as fast as the compact one, found none; leave "
            "the control equal-latency out"
        )
    return max(found, key=lambda each: found[each])


def _chosen_shape(name: str) -> tuple[NetworkName, Shape]:
    parsed = parse_name(name, None)
    full = shape_of(parsed)
    if full is None:
        raise ValueError(
            f"network: expected a ResNet of this library, torchvision or timm, whose depth and widths can be chosen, "
            f"got {parsed}; there is no plain network to compare it with"
        )
    return parsed, full


def _depths(kind: str, full: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Blocks per stage of every depth up to the full one, each one block deeper than the last."""
    if kind == "cifar":  # its name has one number for all stages
        yield from ((blocks,) * len(full) for blocks in range(1, full[0] + 1))
        return
    layers = [1] * len(full)
    yield tuple(layers)
    while sum(layers) < sum(full):
        # the Sainte-Laguë method: in proportion to the full network's blocks, ending with exactly these
        layers[max(range(len(full)), key=lambda stage: full[stage] / (layers[stage] + 0.5))] += 1
        yield tuple(layers)


def _match_widths(
    full: tuple[int, ...], wanted: int, tolerance: float, count: Callable[[tuple[int, ...]], int]
) -> tuple[int, ...] | None:
    """Channels per stage with `wanted` MACs, see :func:`match_macs`; None if there are none."""

    def is_met(macs: float) -> bool:
        return abs(macs - wanted) <= tolerance * wanted

    if is_met(count(full)):
        return full
    if count((1,) * len(full)) > (1 + tolerance) * wanted:
        return None
    fitted = _fit_macs(full, count)
    # timm's first stage needs no shortcut at its own width: the MACs by which the fit is too high there
    shortcut = float(torch.tensor(_terms(full, full), dtype=torch.float64) @ fitted) - count(full)
    bias, tried = 1.0, set()
    for _ in range(_COUNTED):
        for widths, smooth in _in_order(full, fitted, wanted / bias):
            estimate = smooth - shortcut * (widths[0] == full[0])
            if widths not in tried and is_met(bias * estimate):
                break
        else:
            return None
        if is_met(found := count(widths)):
            return widths
        if not found:
            return None
        # for grouped convolutions, whose group sizes are rounded, the fit is not exact
        bias = found / estimate
        tried.add(widths)
    return None


def _in_order(full: tuple[int, ...], fitted: Tensor, wanted: float) -> Iterator[tuple[tuple[int, ...], float]]:
    """Widths near `wanted` MACs with their fitted MACs: multiples of 8 first, within these the most evenly scaled."""
    # if all stages are scaled alike, the MACs are a quadratic polynomial in one factor
    constant, linear, square = fitted[0], fitted[1 : len(full) + 1].sum(), fitted[len(full) + 1 :].sum()
    rest = max(wanted - float(constant), 1.0)
    factor = float((-linear + (linear**2 + 4 * square * rest).sqrt()) / (2 * square))

    def is_even(ratio: float) -> bool:
        return 1 / _UNEVEN <= ratio <= _UNEVEN

    def unevenness(widths: tuple[int, ...]) -> float:
        return sum(math.log(width / (factor * own)) ** 2 for width, own in zip(widths, full, strict=True))

    for grain in _GRAINS:
        near = []
        for width in scaled(full, factor):
            steps = range(max(1, width // grain - _REACH), width // grain + _REACH + 2)
            near.append([step * grain for step in steps if grain == 1 or is_even(step * grain / width)])
        if not all(near):
            continue
        candidates = sorted(itertools.product(*near), key=unevenness)
        estimates = torch.tensor([_terms(full, widths) for widths in candidates], dtype=torch.float64) @ fitted
        yield from zip(candidates, estimates.tolist(), strict=True)


def _fit_macs(full: tuple[int, ...], count: Callable[[tuple[int, ...]], int]) -> Tensor:
    """Fit the MACs as a function of the stage widths: coefficients of `_terms`, from as many counted networks.

    A convolution's MACs are proportional to its input times its output channels, which belong to one stage or to two
    consecutive ones, or one of them is fixed.
    """
    stages = range(len(full))
    # no stage at its own width, where timm's first one differs
    shares = [{}, *({i: 3} for i in stages), *({i: 4} for i in stages), *({i: 3, i + 1: 3} for i in stages[:-1])]
    counted = [tuple(width * share.get(i, 2) for i, width in enumerate(full)) for share in shares]
    return torch.linalg.solve(
        torch.tensor([_terms(full, widths) for widths in counted], dtype=torch.float64),
        torch.tensor([count(widths) for widths in counted], dtype=torch.float64),
    )


def _terms(full: tuple[int, ...], widths: tuple[int, ...]) -> list[float]:
    """1, the widths relative to the full ones, their squares, and the products of consecutive ones."""
    shares = [width / own for width, own in zip(widths, full, strict=True)]
    return [1.0, *shares, *(x * x for x in shares), *(x * y for x, y in itertools.pairwise(shares))]
