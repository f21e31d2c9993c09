"""Counters of launches, without a GPU: what is captured gets zeros of its own, filled in before."""

import pytest
import torch
from fastgate.kernels import _launch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def supplies(monkeypatch: pytest.MonkeyPatch) -> dict:
    supplies: dict = {CPU: (torch.zeros(32, dtype=torch.int32), 0)}
    monkeypatch.setattr(_launch, "_supplies", supplies)
    return supplies


def test_captured_launches_share_no_counter_and_fill_none(supplies: dict) -> None:
    zeros = supplies[CPU][0]
    given = [_launch._from_supply(CPU, size) for size in (1, 5, 1)]
    places = [set(range(t.data_ptr(), t.data_ptr() + 4 * t.numel(), 4)) for t in given]
    assert [len(place) for place in places] == [1, 5, 1]
    assert not (places[0] & places[1] or places[1] & places[2] or places[0] & places[2])
    assert all(t.untyped_storage().data_ptr() == zeros.untyped_storage().data_ptr() for t in given)
    # Triton compiles anew for an address that is no multiple of 16, which cannot be captured
    assert [(t.data_ptr() - zeros.data_ptr()) % 16 for t in given] == [0, 0, 0]


def test_an_empty_supply_is_no_reason_to_share() -> None:
    first, second, third = (_launch._from_supply(CPU, size) for size in (30, 30, 30))
    assert len({t.untyped_storage().data_ptr() for t in (first, second, third)}) == 3
    assert not (first.any() or second.any() or third.any())


class FakeStream:
    def __init__(self, number: int) -> None:
        self.cuda_stream = number
        self.waited = False

    def synchronize(self) -> None:
        self.waited = True


def test_streams_share_no_counter(supplies: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """With PyTorch's CUDA calls replaced: eager launches have one per stream, captured ones take from the supply."""
    gpu, streams, capturing, zeros = torch.device("cuda", 0), [FakeStream(1), FakeStream(2)], [False], torch.zeros
    now = [streams[0]]
    monkeypatch.setattr(_launch, "_counters", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    monkeypatch.setattr(torch, "zeros", lambda size, dtype, device=None: zeros(size, dtype=dtype))
    first = _launch.counter(gpu)
    assert streams[0].waited and _launch.counter(gpu) is first
    now[0] = streams[1]
    assert _launch.counter(gpu) is not first
    capturing[0] = True
    captured = [_launch.counter(gpu), _launch.counter(gpu)]
    assert len({t.data_ptr() for t in (first, *captured)}) == 3
    supply = supplies[gpu][0].untyped_storage().data_ptr()
    assert {t.untyped_storage().data_ptr() for t in captured} == {supply}
