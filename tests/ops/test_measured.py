"""What `auto` takes for a gated convolution: what was measured fastest, else a rule."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from bench.choices import calls
from fastgate.functional import gated_conv2d
from fastgate.ops import gated_conv, measured
from fastgate.ops.measured import Call, choose

CPU = torch.device("cpu")
CALL = Call("batch", "float32", False, 3, 1, 256, 64, 64, 64)
TIMES = {"dense": 100.0, "gathered": {"0.0": 10.0, "0.5": 60.0, "1.0": 110.0}, "triton": {"0.0": 5.0, "1.0": 94.0}}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """One measured row on a device called as this one is."""
    rows = [{**asdict(CALL), "us": deepcopy(TIMES)}]
    table = {measured.device_key(CPU): {"rows": rows}}
    monkeypatch.setattr(measured, "read_table", lambda: table)
    measured._nearest.cache_clear()
    yield table
    measured._nearest.cache_clear()


def test_the_fastest_at_this_fraction(table: dict[str, Any]) -> None:
    del table[measured.device_key(CPU)]["rows"][0]["us"]["triton"]
    assert choose(CPU, CALL, 0.5) == "gathered"
    assert choose(CPU, CALL, 0.8) == "gathered"  # 60 + 0.6 * 50 = 90
    assert choose(CPU, CALL, 0.9) == "dense"  # 100: no more than 5 % are worth leaving dense for
    assert choose(CPU, CALL, 1.0) == "dense"


def test_an_unknown_fraction_counts_as_all_open(table: dict[str, Any]) -> None:
    assert choose(CPU, CALL, None) == "triton"  # 94 at all open
    table[measured.device_key(CPU)]["rows"][0]["us"]["triton"]["1.0"] = 96.0
    assert choose(CPU, CALL, None) == "dense"


@pytest.mark.parametrize(
    ("other", "speaks"),
    [
        (replace(CALL, batch=64), True),  # two doublings
        (replace(CALL, batch=32), False),
        (replace(CALL, stride=2), False),
        (replace(CALL, gates="samples"), False),
        (replace(CALL, dtype="bfloat16"), False),
    ],
)
def test_a_row_speaks_for_calls_like_it(table: dict[str, Any], other: Call, speaks: bool) -> None:
    assert (choose(CPU, other, None) == "triton") == speaks


def test_the_rule_without_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "device_key", lambda device: "never measured")
    assert choose(CPU, CALL, 0.9) == "gathered"
    assert choose(CPU, CALL, 0.95) == "dense"
    assert choose(CPU, replace(CALL, batch=1), 0.5) == "dense"  # too small to be worth asking
    assert choose(CPU, replace(CALL, gates="pairs"), 0.5) == "dense"
    assert choose(torch.device("meta"), CALL, 0.5) == "dense"


def test_the_committed_table_is_what_the_command_writes() -> None:
    expected = set(calls()[0]) | {"us"}
    for device, entry in measured.read_table().items():
        assert entry["rows"] and entry["date"] and entry["conditions"]["versions"]["torch"], device
        assert all(set(row) == expected and row["us"]["dense"] > 0 for row in entry["rows"]), device


@pytest.mark.parametrize("path", ["dense", "gathered", "triton"])
def test_auto_takes_the_chosen_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_conv, "choose", lambda *_: path)
    x, weight, gate = torch.randn(3, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.tensor([[1.0, 0, 1, 0]])
    x[:, 1] = torch.nan  # read by the dense path alone
    y = gated_conv2d(x, weight, in_gate=gate)
    assert bool(torch.isnan(y).any()) == (path == "dense")
