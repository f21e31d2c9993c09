"""Comparing a kernel with its fp64 meaning: by name, with a bound that comes from the dtype, on poisoned memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised floating-point memory is NaN: what a kernel forgets to write, or reads too early, shows."""
    originals = {name: getattr(torch, name) for name in ("empty", "empty_like")}
    new_empty = Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    try:
        for name, original in originals.items():
            setattr(torch, name, lambda *a, original=original, **k: poison(original(*a, **k)))
        Tensor.new_empty = lambda *a, **k: poison(new_empty(*a, **k))  # type: ignore[method-assign]
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)
        Tensor.new_empty = new_empty  # type: ignore[method-assign]


def assert_close_to_oracle(
    kernel: Mapping[str, Tensor | None],
    plain: Mapping[str, Tensor | None],
    oracle: Mapping[str, Tensor | None],
    *,
    cancels: Mapping[str, str] | None = None,
    times: float = 2,
) -> None:
    """Each of the kernel's tensors is at most `times` as far from the fp64 oracle as the same-dtype PyTorch path.

    Plus a floor, for where PyTorch happens to be exact: four roundings of the largest value in the tensor's dtype, or
    of the tensor that `cancels` names for it, where the true value is the zero that is left of terms of that size.
    """
    assert kernel.keys() == plain.keys() == oracle.keys()
    wrong: list[Any] = []
    for name, exact in oracle.items():
        got, reference = kernel[name], plain[name]
        if exact is None:
            assert got is None and reference is None, name
            continue
        assert got is not None and reference is not None, name
        assert got.shape == exact.shape and got.dtype == reference.dtype, name
        scale = oracle[(cancels or {}).get(name, name)]
        assert scale is not None
        floor = 4 * torch.finfo(got.dtype).eps * scale.abs().max().item()
        allowed = times * (reference.double() - exact).abs().max().item() + floor
        error = (got.double() - exact).abs().max().item()
        if not error <= allowed:  # also where it is NaN
            wrong.append((name, error, allowed))
    assert wrong == [], f"(name, error, allowed): {wrong}"
