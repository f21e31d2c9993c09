import subprocess
import sys
from collections import OrderedDict
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.bitflips import KINDS, count_outcomes, write_files
from fastgate.digests import digest

DIFFERENT = [
    None, True, 1, 1.0, "1", -0.0, 0.0, float("nan"), float("inf"), [], (), {}, set(), [[]], [[], []], ["ab", "c"],
    ["a", "bc"], ["abc"], {"a": 1}, {"a": 2}, {"b": 1}, {1: 1}, {"1": 1}, {"a": {"b": 1}}, b"1", 1j, torch.float32,
    torch.device("cpu"), torch.zeros(()), torch.zeros(1), torch.zeros(1, 1), torch.zeros(0), torch.zeros(0, 1),
    -torch.zeros(1), torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.float16),
    torch.zeros(2, dtype=torch.bfloat16), torch.tensor([False, True]), torch.tensor([True, False]),
]  # fmt: skip


def test_no_two_values_are_taken_for_each_other() -> None:
    digests = [digest(value) for value in DIFFERENT]
    for (value, first), (other, second) in combinations(zip(DIFFERENT, digests, strict=True), 2):
        assert first != second, (value, other)


def test_only_the_values_count() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert digest({"a": 1, "b": x}) == digest({"b": x.to(memory_format=torch.channels_last), "a": 1})
    assert digest(nn.Parameter(x)) == digest(x.clone()) == digest(x[None].expand(3, -1, -1, -1, -1)[1])
    assert digest([1, {"a": None}, "ä"]) == subprocess.run(
        [sys.executable, "-c", "from fastgate.digests import digest; print(digest([1, {'a': None}, 'ä']))"],
        capture_output=True, text=True, check=True, timeout=120,
    ).stdout.strip()  # fmt: skip


def test_the_versions_of_modules_in_a_state_count() -> None:
    state = nn.BatchNorm2d(2).state_dict()
    assert digest(state) != digest(OrderedDict(state))  # without them a batch norm is taken for an old one


def test_what_is_no_plain_value_is_refused() -> None:
    with pytest.raises(TypeError, match="digest: expected tensors, plain values and containers of these, got object"):
        digest({"a": [object()]})


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_bit_is_noticed(name: str, tmp_path: Path) -> None:
    # bench/results/files holds the long trial
    found = count_outcomes(write_files(tmp_path)[name], flips=40, seed=1)
    assert found["other"] == found["failed"] == 0, found
    assert found["refused"] > 25  # the rest hit what says nothing, such as padding in the archive
