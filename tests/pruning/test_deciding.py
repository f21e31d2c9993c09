"""Which decisions of a search become final; how a whole run does so is in test_search.py."""

import pytest

from fastgate.pruning.deciding import unanimous


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        ([{"a": [1.0], "b": [0.0, 1.0]}], {"a": [True], "b": [False, True]}),
        ([{"a": [1.0], "b": [0.0, 1.0]}, {"a": [0.0], "b": [0.0, 1.0]}], {"b": [False, True]}),
        ([{"a": [0.0], "b": [0.0, 0.999]}, {"a": [0.0], "b": [0.0, 1.0]}], {"a": [False]}),
        ([{"a": [0.5]}, {"a": [0.5]}], {}),
        ([], {}),
    ],
)
def test_unanimous(epochs: list[dict[str, list[float]]], expected: dict[str, list[bool]]) -> None:
    assert {name: opened.tolist() for name, opened in unanimous(epochs).items()} == expected
