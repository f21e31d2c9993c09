"""Plain networks of equal MACs, or as fast: what a compact network is compared with."""

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

# widths are multiples of these where such have the wanted MACs: hardware computes channels by eights, or by fours
_GRAINS = (8, 4, 1)
# steps that a stage may be away from the common factor, and the factor by which
_REACH, _UNEVEN = 3, math.sqrt(2)
# widths that are tried for equal latency, as shares of the network's own
_FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
# networks that are counted, after the fit, before the next depth is tried
_COUNTED = 8


def match_macs(name: str, num_classes: int, image_size: Sequence[int], wanted: int, *, tolerance: float = 0.01) -> str:
    """The name of a plain network of the same family with the wanted MACs: its depth as far as that goes, then widths.

    The depth is the one that comes closest at the network's own widths, the blocks shared out over the stages as there;
    where whole channels cannot make up for the rest, the next one. Of the widths at which a depth has the wanted MACs
    multiples of 8 come first, then of 4, with no stage further than a factor of 1.41 from the common one; of those the
    ones whose stages are scaled most alike.

    Args:
        name: of a ResNet of this library, torchvision or timm: the deepest that is considered.
        num_classes: outputs.
        image_size: (C, H, W).
        wanted: MACs, as :func:`fastgate.macs` counts them.
        tolerance: share of `wanted` that the network may be off.

    Raises:
        ValueError: depth and widths of this network cannot be chosen, or none has the wanted MACs.
    """
    parsed, full = _chosen_shape(name)
    if wanted < 1:
        raise ValueError(f"wanted: expected a positive number of MACs, got {wanted}")

    @cache
    def count(layers: tuple[int, ...], widths: tuple[int, ...]) -> int:
        # where channels are in groups, the narrowest networks have none left: not one that is looked for
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
        f"wanted: expected MACs that a plain network like {parsed} has within {tolerance:.0%}, got {wanted}; ask for "
        "another number"
    )


def match_latency(name: str, num_classes: int, example: Tensor, network: nn.Module, *, tolerance: float = 0.05) -> str:
    """The name of a plain network of the same family that is as fast as `network`, the one of most MACs among those.

    Of every width (the network's own times 0.5 to 2, in multiples of 8) the deepest one is taken that is fast enough;
    times are medians of passes over one image, in turns with `network`.

    Args:
        name: as for :func:`match_macs`.
        num_classes: outputs.
        example: one image `[1, C, H, W]`, on the device that counts.
        network: what is to be matched, on that device.
        tolerance: share of its latency that a plain network may be slower.

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
    """Blocks per stage of every depth up to the full one, each a block deeper than the one before."""
    if kind == "cifar":  # its name has one number for all stages
        yield from ((blocks,) * len(full) for blocks in range(1, full[0] + 1))
        return
    layers = [1] * len(full)
    yield tuple(layers)
    while sum(layers) < sum(full):
        # the method of Sainte-Laguë: in proportion to the full network's blocks, with which it ends
        layers[max(range(len(full)), key=lambda stage: full[stage] / (layers[stage] + 0.5))] += 1
        yield tuple(layers)


def _match_widths(
    full: tuple[int, ...], wanted: int, tolerance: float, count: Callable[[tuple[int, ...]], int]
) -> tuple[int, ...] | None:
    """Channels of the stages that have the wanted MACs, see :func:`match_macs`; None if none have."""

    def is_met(macs: float) -> bool:
        return abs(macs - wanted) <= tolerance * wanted

    if is_met(count(full)):
        return full
    if count((1,) * len(full)) > (1 + tolerance) * wanted:
        return None
    fitted = _fit_macs(full, count)
    # timm's first stage, at its own width, needs no shortcut: what the fit has too much for all such networks
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
        # of groups of channels, whose sizes are rounded, the fit is not exact
        bias = found / estimate
        tried.add(widths)
    return None


def _in_order(full: tuple[int, ...], fitted: Tensor, wanted: float) -> Iterator[tuple[tuple[int, ...], float]]:
    """Widths near the wanted MACs, with their MACs by the fit: multiples of 8 first, then the most even ones."""
    # of stages that are scaled alike, a quadratic polynomial in one factor
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
    """MACs by the widths of the stages: coefficients of `_terms`, from as many networks that are counted.

    A convolution's MACs are its inputs times its outputs, and those are of one stage, of two that follow each other, or
    one of them is not a stage's.
    """
    stages = range(len(full))
    # none at its own width, where timm's first stage differs
    shares = [{}, *({i: 3} for i in stages), *({i: 4} for i in stages), *({i: 3, i + 1: 3} for i in stages[:-1])]
    counted = [tuple(width * share.get(i, 2) for i, width in enumerate(full)) for share in shares]
    return torch.linalg.solve(
        torch.tensor([_terms(full, widths) for widths in counted], dtype=torch.float64),
        torch.tensor([count(widths) for widths in counted], dtype=torch.float64),
    )


def _terms(full: tuple[int, ...], widths: tuple[int, ...]) -> list[float]:
    """One, the widths, their squares and the products of neighbours; as shares of the full widths."""
    shares = [width / own for width, own in zip(widths, full, strict=True)]
    return [1.0, *shares, *(x * x for x in shares), *(x * y for x, y in itertools.pairwise(shares))]
