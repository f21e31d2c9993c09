"""Nested inputs and outputs: what a model is called with, what is moved, and how far apart two of them are."""

import math
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgate.values import call, device_of, difference, tensors_in, to_device_of, with_tensors

Pair = namedtuple("Pair", ["left", "right"])


@dataclass(frozen=True)
class Boxes:
    corners: Tensor
    kind: str


class Arguments(nn.Module):
    """Returns what it was called with."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs


def test_how_a_model_is_called() -> None:
    x, y, model = torch.zeros(1), torch.ones(1), Arguments()
    packed = nn.utils.rnn.pack_sequence([torch.zeros(3, 2), torch.zeros(2, 2)])
    assert call(model, x) == ((x,), {})
    assert call(model, (x, y)) == ((x, y), {})
    assert call(model, {"a": x, "b": y}) == ((), {"a": x, "b": y})
    assert call(model, MappingProxyType({"a": x})) == ((), {"a": x})
    for only in ([x, y], Pair(x, y), packed, Boxes(x, "a"), None):
        (got,), keywords = call(model, only)
        assert got is only and keywords == {}
    assert call(model, {"a": x}, lambda model, inputs: model(inputs["a"], b=y)) == ((x,), {"b": y})


def nested(x: Tensor) -> dict[str, Any]:
    return OrderedDict(
        a=x, b=[x + 1, (x + 2, None)], c=Pair(x + 3, "text"), d=Boxes(x + 4, "car"), e=MappingProxyType({0: x + 5}), f=7
    )


def test_every_tensor_moves_and_all_else_stays() -> None:
    values = nested(torch.zeros(2))
    moved = to_device_of(nn.Linear(1, 1, device="meta"), values)
    assert [tensor.is_meta for tensor in tensors_in(moved)] == [True] * 6
    assert [tensor.is_meta for tensor in tensors_in(values)] == [False] * 6
    assert type(moved) is OrderedDict and list(moved) == list(values)
    assert type(moved["b"]) is list and type(moved["b"][1]) is tuple and moved["b"][1][1] is None
    assert type(moved["c"]) is Pair and moved["c"].right == "text" and moved["d"].kind == "car" and moved["f"] == 7


def test_a_copy_shares_no_memory_and_no_copy_shares_all() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.zeros(3, 2), torch.zeros(2, 2)])
    for model in (nn.Linear(1, 1), nn.ReLU()):
        values = [nested(torch.zeros(2)), packed]
        for tensor in tensors_in(to_device_of(model, values[0], copied=True)):
            tensor.fill_(9)
        to_device_of(model, packed, copied=True).data.fill_(9)
        assert [int(tensor[0]) for tensor in tensors_in(values[0])] == [0, 1, 2, 3, 4, 5]
        assert int(packed.data.max()) == 0
        assert to_device_of(model, values[0])["a"] is values[0]["a"]


def test_tensors_are_put_back_where_they_were() -> None:
    values = nested(torch.zeros(1))
    changed = with_tensors(values, [10 * tensor for tensor in tensors_in(values)])
    assert [int(tensor) for tensor in tensors_in(changed)] == [0, 10, 20, 30, 40, 50]


def test_the_device_of_a_model_is_where_its_data_is() -> None:
    offloaded = nn.Sequential(nn.Linear(1, 1, device="meta"), nn.BatchNorm1d(1))
    assert device_of(offloaded) == torch.device("cpu")
    assert device_of(nn.Linear(1, 1, device="meta")) == torch.device("meta")
    assert device_of(nn.BatchNorm1d(1, affine=False)) == torch.device("cpu")
    assert device_of(nn.ReLU()) is None


X = torch.tensor([1.0, -2.0, 3.0])
INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("expected", "got", "apart"),
    [
        pytest.param(*case, id=name)
        for name, *case in [
            ("tensor", X, X + torch.tensor([0, 0.5, 0.25]), 0.5),
            ("deepest", nested(X), {**nested(X), "d": Boxes(X + 4.25, "car")}, 0.25),
            ("list-and-tuple", [X, X], (X, X - 1), 1.0),
            ("dtypes", X, X.half(), 0.0),
            ("complex", X + 0j, X + 0.5j, 0.5),
            ("numbers", {"loss": 0.5, "x": X}, {"loss": 0.75, "x": X}, 0.25),
            ("number-alone", 1.5, 1.0, 0.5),
            ("labels", torch.tensor([1, 2]), torch.tensor([1, 3]), INF),
            ("labels-equal", torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32), 0.0),
            ("masks", torch.tensor([True]), torch.tensor([False]), INF),
            ("count", {"x": X, "n": 3}, {"x": X, "n": 4}, INF),
            ("text", [X, "cat"], [X, "dog"], INF),
            ("none", [X, None], [X, None], 0.0),
            ("infinity", torch.tensor([INF, -INF]), torch.tensor([INF, -INF]), 0.0),
            ("infinities", torch.tensor([INF]), torch.tensor([-INF]), INF),
            ("infinity-once", torch.tensor([1.0, INF]), torch.tensor([1.0, 2.0]), INF),
            ("nan-once", torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0]), INF),
            ("nan-other", torch.tensor([1.0, 2.0]), torch.tensor([NAN, 2.0]), INF),
            ("sparse", torch.eye(2).to_sparse(), 2 * torch.eye(2), 1.0),
            ("empty-beside", [X, torch.zeros(0, 4)], [X, torch.zeros(0, 4)], 0.0),
        ]
    ],
)
def test_how_far_two_values_are_apart(expected: Any, got: Any, apart: float) -> None:
    assert difference(expected, got) == difference(got, expected) == apart


def test_what_is_nan_in_both_is_left_out_with_a_warning() -> None:
    a, b = torch.tensor([NAN, 1.0, NAN]), torch.tensor([NAN, 1.5, NAN])
    with pytest.warns(RuntimeWarning, match=r"outputs\['x'\]: 2 of 3 numbers are NaN in both networks and were not"):
        assert difference({"x": a}, {"x": b}) == 0.5
    with (
        pytest.warns(RuntimeWarning, match="1 of 1 numbers are NaN"),
        pytest.raises(ValueError, match="outputs: expected numbers to compare, got only 1 that are NaN in both;"),
    ):
        difference(a[:1], b[:1])


@pytest.mark.parametrize("nothing", [None, [], {}, torch.zeros(0, 4), [{"boxes": torch.zeros(0, 4)}], "text"], ids=str)
def test_nothing_compared_is_not_nothing_apart(nothing: Any) -> None:
    with pytest.raises(ValueError, match="outputs: expected numbers to compare, got none; use other inputs, or "):
        difference(nothing, nothing)


@pytest.mark.parametrize(
    ("expected", "got", "message"),
    [
        ([X, {"a": X}], [X, {"a": X[:2]}], r"outputs\[1\]\['a'\]: expected the same shape, got \[3\] and \[2\]"),
        ({"a": X}, {"a": X, "b": X}, r"outputs: expected the same keys, got \['a'\] and \['a', 'b'\]"),
        ([X, X], [X], r"outputs: expected the same length, got 2 and 1"),
        ({"a": X}, {"a": [X]}, r"outputs\['a'\]: expected values of the same type, got Tensor and list"),
        ({"a": X}, {"a": None}, r"outputs\['a'\]: expected values of the same type, got Tensor and NoneType"),
        ([X, None], [X, 0], r"outputs\[1\]: expected values of the same type, got NoneType and int"),
        (X, X.long(), r"outputs: expected dtypes of one kind, got torch.float32 and torch.int64"),
        (Boxes(X, "a"), Boxes(X[:1], "a"), r"outputs\.corners: expected the same shape"),
        (
            [X, object()],
            [X, object()],
            r"outputs\[1\]: cannot compare two values of type object; use forward=, a function",
        ),
    ],
)
def test_unlike_structures_are_named(expected: Any, got: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        difference(expected, got)
