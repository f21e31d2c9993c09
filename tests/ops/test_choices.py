"""What `auto` takes on a GPU, with a stand-in for the GPU's clock and made-up candidates."""

import json
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastgate import functional
from fastgate.ops import choices
from fastgate.ops.gate_head import HeadCall
from fastgate.ops.gated_conv import ConvCall
from fastgate.ops.gated_residual import ResidualCall
from fastgate.ops.measurement import Kind

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of kernels
X = torch.ones(2)

# microseconds that the stand-in tells of each candidate
TIMES = {"torch": 100.0, "fast": 50.0, "slow": 200.0, "even": 96.0, "wrong": 1.0, "raises": 1.0, "nan": 1.0, "odd": 1.0}

# where they differ in a CUDA graph
CAPTURED = {"slow": 20.0}


@dataclass(frozen=True)
class Doubling(Kind):
    """A made-up operation: twice x."""

    operation: ClassVar[str] = "doubling"

    names: tuple[str, ...] = ("fast", "slow")
    size: int = 8

    def candidates(self) -> tuple[str, ...]:
        return self.names

    def make(self, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        return {"x": torch.randn(self.size, device=device, generator=generator, requires_grad=True), "count": 2}

    def run(self, candidate: str, values: dict[str, Any]) -> tuple[Tensor, ...]:
        RUNS.append(candidate)
        x, y = values["x"], values["x"] * values["count"]
        if candidate == "raises":
            raise RuntimeError("no such kernel\non this board")
        if candidate == "odd":
            return y[1:], torch.ones_like(x)
        y = {"wrong": y + 0.01, "nan": y / 0 * 0}.get(candidate, y)
        return y, *torch.autograd.grad(y, x, torch.ones_like(x))


RUNS: list[str] = []


class Clock:
    """Stands in for the GPU's: each candidate takes what TIMES says; counts measurements."""

    def __init__(self) -> None:
        self.measured = 0

    def __call__(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], dict[str, float]]:
        self.measured += 1
        RUNS.clear()
        for call in calls:
            call()
        (name,) = set(RUNS)
        return lambda: {"eager": TIMES[name], "captured": CAPTURED.get(name, TIMES[name])}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Clock]:
    """A CPU is measured as a GPU is, into a folder of the test, and the process knows nothing."""
    clock = Clock()
    monkeypatch.setattr(choices, "make_timer", lambda device: clock)
    monkeypatch.setenv("FASTGATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTGATE_TUNE", "on")
    forget(monkeypatch)
    yield clock


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process."""
    monkeypatch.setattr(choices, "_memory", choices._Memory())


def test_the_fastest_is_taken_and_remembered(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choices.choose(Doubling(), X) == "fast"
    assert clock.measured == 3
    assert choices.choose(Doubling(), X) == "fast"
    forget(monkeypatch)
    assert choices.choose(Doubling(), X) == "fast"
    assert clock.measured == 3 and choices.kept() == 1
    assert choices.choose(Doubling(size=9), X) == "fast"
    assert clock.measured == 6 and choices.kept() == 2


@pytest.mark.parametrize("names", [("slow",), ("even",), ()])
def test_pytorch_stays_where_5_percent_are_not_gained(clock: Clock, names: tuple[str, ...]) -> None:
    assert choices.choose(Doubling(names), X) == "torch"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("wrong", r"result 0 is off by 0\.00\d+ of its largest value"),
        ("nan", "result 0 is off by nan"),
        ("raises", r"no such kernel \("),
        ("odd", r"a result has shape \[7\], PyTorch's has \[8\]"),
    ],
)
def test_a_bad_candidate_is_ruled_out_for_good(
    name: str, why: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = Doubling((name, "fast"))
    with pytest.warns(UserWarning, match=f"doubling: '{name}' is not used on this device: .*{why}"):
        assert choices.choose(kind, X) == "fast"
    forget(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choices.choose(kind, X) == "fast"  # no word again
    assert choices.find(kind, CPU).refused.keys() == {name}
    only = Doubling((name,))
    with pytest.warns(UserWarning):
        assert choices.choose(only, X) == "torch"


@pytest.mark.usefixtures("ieee")
def test_what_rounding_allows_is_the_kinds(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Doubling, "eps", lambda self, dtype: 0.1)
    assert choices.choose(Doubling(("wrong",)), X) == "wrong"
    conv = KINDS["conv forward pairs"]
    assert conv.eps(torch.float32) == torch.finfo(torch.float32).eps
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # `ieee` puts back what was there
    assert conv.eps(torch.float32) == 2**-10 and conv.eps(torch.float16) == torch.finfo(torch.float16).eps


def test_too_little_memory_is_not_remembered(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Doubling, *arguments: Any) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Doubling, "make", full)
        assert choices.choose(Doubling(), X) == "torch"
    forget(monkeypatch)
    assert choices.kept() == 0 and choices.choose(Doubling(), X) == "fast"


def test_the_callers_modes_and_random_numbers_stay(clock: Clock) -> None:
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert choices.choose(Doubling(), torch.ones(2)) == "fast"
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_damaged_file_is_measured_anew(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    choices.choose(Doubling(), X)
    (file,) = choices.folder().iterdir()
    whole = file.read_text()
    other = json.loads(whole) | {"version": 0}
    gone, elsewhere = whole.replace('"eager": "fast"', '"eager": "gone"'), whole.replace('"size": 8', '"size": 9')
    for text in ("", whole[:50], "[]", "null", gone, elsewhere, json.dumps(other)):
        file.write_text(text)
        forget(monkeypatch)
        before = clock.measured
        assert choices.choose(Doubling(), X) == "fast"
        assert clock.measured == before + 3
        assert file.read_text() == whole


def test_other_sources_and_modes_are_other_keys(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    choices.choose(Doubling(), X)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
    choices.choose(Doubling(), X)
    assert choices.kept() == 2
    choices._board.cache_clear()
    choices._describe_context.cache_clear()
    monkeypatch.setattr(choices, "_sources", lambda: "changed")
    choices.choose(Doubling(), X)
    assert choices.kept() == 3
    choices._board.cache_clear()
    choices._describe_context.cache_clear()


def test_sources_are_the_kernels_and_their_launchers() -> None:
    assert len(choices._sources()) == 16


def test_a_folder_that_cannot_be_written_is_a_warning(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTGATE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="set FASTGATE_CACHE"):
        assert choices.choose(Doubling(), X) == "fast"
    assert choices.choose(Doubling(), X) == "fast" and clock.measured == 3


@pytest.mark.parametrize("how", ["off", "looking up", "capturing"])
def test_look_up_only(how: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    choices.choose(Doubling(), X)
    forget(monkeypatch)
    if how == "off":
        monkeypatch.setenv("FASTGATE_TUNE", "off")
    elif how == "capturing":
        monkeypatch.setattr(choices, "is_capturing", lambda: True)
    else:
        looking = choices.looking_up()
        looking.__enter__()
    try:
        assert choices.choose(Doubling(), X) == "fast"  # from disk
        assert choices.choose(Doubling(size=9), X) == "torch"
    finally:
        if how == "looking up":
            looking.__exit__(None, None, None)
    assert clock.measured == 3
    monkeypatch.undo()


def test_graphs_have_choices_of_their_own(clock: Clock) -> None:
    assert choices.choose(Doubling(), X) == "fast"
    with choices.for_graphs():
        assert choices.choose(Doubling(), X) == "slow"
        with choices.for_graphs(False):
            assert choices.choose(Doubling(), X) == "fast"
    assert clock.measured == 3


def test_an_unknown_setting_is_an_error(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGATE_TUNE", "maybe")
    with pytest.raises(ValueError, match="FASTGATE_TUNE: expected on or off, got 'maybe'"):
        choices.choose(Doubling(), X)


def test_what_is_recorded_is_pytorchs_alone(clock: Clock) -> None:
    seen = []

    def call(x: Tensor) -> Tensor:
        seen.append(choices.choose(Doubling(), x))
        return x * 2

    choices.choose(Doubling(), X)
    with FakeTensorMode() as mode:
        call(mode.from_tensor(X))
    with FlopCounterMode(display=False):
        call(X)
    torch.vmap(call)(torch.ones(2, 3))
    torch.jit.trace(call, X, check_trace=False)
    call(torch.nn.Buffer(X))
    assert set(seen[:-1]) == {"torch"} and seen[-1] == "fast"
    assert torch.compile(call, backend="eager")(X).tolist() == [2, 2]


def test_pinned_choices_come_first(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    choices.choose(Doubling(), X)
    records = json.loads(json.dumps(choices.used()))
    assert [record["chosen"] for record in records] == [{"eager": "fast", "captured": "slow"}]
    records[0] |= {"chosen": {"eager": "slow", "captured": "torch"}}
    choices.pin(records)
    assert choices.choose(Doubling(), X) == "slow" and clock.measured == 3
    assert json.loads(json.dumps(choices.used())) == records
    for bad in ([{}], [records[0] | {"chosen": {"eager": "gone", "captured": "torch"}}], [None]):
        with pytest.raises(ValueError, match="choices: expected records that fastgate wrote"):
            choices.pin(bad)


def test_collecting_measures_nothing(clock: Clock) -> None:
    choices.choose(Doubling(), X)
    with choices.collecting() as kinds:
        assert choices.choose(Doubling(), X) == "fast"
        assert choices.choose(Doubling(size=9), X) == "torch"
    assert list(kinds) == [Doubling(), Doubling(size=9)] and clock.measured == 3


def write_choices(started: Any, count: int) -> None:
    """What a process does that meets many kinds of calls."""
    started.set()
    for size in range(8, 8 + count):
        choices._memory = choices._Memory()
        assert choices.choose(Doubling(size=size), X) == "fast"


def test_two_processes_at_once_and_one_that_is_killed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    fork = multiprocessing.get_context("fork")  # with this process' clock and folder
    started = [fork.Event() for _ in range(3)]
    writers = [
        fork.Process(target=write_choices, args=(event, count))
        for event, count in zip(started, (30, 30, 10**6), strict=True)
    ]
    for writer in writers:
        writer.start()
    for event in started:
        assert event.wait(60)
    for writer in writers[:2]:
        writer.join(60)
        assert writer.exitcode == 0
    time.sleep(0.05)  # anywhere in its work
    writers[2].kill()
    writers[2].join()
    forget(monkeypatch)
    for size in range(8, 38):
        assert choices.choose(Doubling(size=size), X) == "fast"
    assert clock.measured == 0
    for file in choices.folder().glob("choice-*.json"):  # whole, all of them
        choices._parse(json.loads(file.read_text()))


KINDS = {
    "residual": ResidualCall(4, 3, 5, 5, "float32", "float32", "float32", True, False, True, True, True, True),
    "residual of channels": ResidualCall(
        4, 3, 5, 5, "float16", "float16", "float32", False, True, False, False, True, False
    ),
    "head": HeadCall(6, 8, 4, 4, 5, 3, "float32", False, "map", True, True, True),
    "head in half": HeadCall(6, 8, 4, 4, 5, 3, "float16", True, "map", True, True, True),
    "head with known means": HeadCall(6, 8, 4, 4, 5, 3, "float32", True, "known", True, True, True),
    "pooled head": HeadCall(6, 8, 1, 1, 5, 3, "float32", False, "pooled", False, False, False),
    **{
        f"conv {direction} {form}": ConvCall(
            direction, form, "none", form == "pairs", False, 3, 4, 6, 5, 7, (3, 3), 2, 1, "float32", True
        )
        for direction in ("forward", "dgrad", "wgrad")
        for form in ("batch", "samples", "pairs")
    },
    "conv closed outputs": ConvCall(
        "dgrad", "none", "pairs", False, True, 3, 4, 6, 5, 7, (1, 1), 1, 0, "float16", False
    ),
}


@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_runs_and_its_kernel_is_right(name: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels in Triton's interpreter (as compiled on a GPU)."""
    kind = KINDS[name]
    monkeypatch.setattr(
        choices, "make_timer", lambda device: lambda calls: calls[0]() and (lambda: {"eager": 1.0, "captured": 1.0})
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = choices.find(kind, DEVICE)
    assert choice.refused == {} and choice.microseconds.keys() == {"torch", "triton"}
    assert 0 <= choice.differences["triton"] < 1e-2


def test_two_samples_in_training_are_pytorchs() -> None:
    assert HeadCall(2, 8, 4, 4, 5, 3, "float32", False, "map", True, True, True).candidates() == ()
    assert HeadCall(2, 8, 4, 4, 5, 3, "float32", False, "map", False, True, True).candidates() == ("triton",)


@pytest.mark.usefixtures("ieee")
def test_the_operations_take_what_is_chosen(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def choose(kind: Kind, *tensors: Tensor | None) -> str:
        asked.append(kind)
        return "triton" if getattr(kind, "direction", "wgrad") == "wgrad" else "torch"

    monkeypatch.setattr(choices, "choose", choose)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE)

    x, gate = randn(4, 8, 5, 5).requires_grad_(), torch.ones(4, 8, device=DEVICE)
    y = functional.gated_residual(x, x, gate)
    assert type(y.grad_fn).__name__ == "GatedResidualBackward"
    hidden, out = randn(6, 8), randn(3, 6)
    statistics = {"running_mean": randn(6), "running_var": torch.ones(6, device=DEVICE)}
    decisions, _ = functional.gate_head(x, hidden, None, **statistics, fc2_weight=out, training=True)
    assert type(decisions.grad_fn).__name__ == "GateHeadBackward"
    weight = randn(7, 8, 3, 3).requires_grad_()
    y = functional.gated_conv2d(x, weight, in_gate=gate.reshape(4, 8))
    assert y.grad_fn.ways == ("torch", "torch", "triton")
    assert [kind.operation for kind in asked] == ["gated_residual", "gate_head", *["gated_conv2d"] * 3]
    expected = torch.nn.functional.conv2d(x, weight, None, 1, 1)
    torch.testing.assert_close(y, expected)
    for got, exact in zip(*(torch.autograd.grad(z.sum(), (x, weight)) for z in (y, expected)), strict=True):
        torch.testing.assert_close(got, exact, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("ieee")
def test_every_way_of_the_convolution_has_the_same_gradients(clock: Clock) -> None:
    from fastgate.ops.gated_conv import GatedConv2d, Ways, gated_conv2d_torch

    x, weight = (torch.randn(shape, device=DEVICE) for shape in ((3, 4, 6, 6), (5, 4, 3, 3)))
    gates = [(torch.rand(3, channels, device=DEVICE) < 0.5).float() for channels in (4, 5)]
    tensors = [t.requires_grad_() for t in (x, weight, *gates)]
    expected = gated_conv2d_torch(*tensors, 2, 1)
    dy = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, tensors, dy)
    for forward in ("torch", "triton"):
        for dgrad in ("torch", "triton"):
            for wgrad in ("torch", "triton"):
                y = GatedConv2d.apply(*tensors, 2, 1, True, Ways(forward, dgrad, wgrad))
                torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
                for got, exact in zip(torch.autograd.grad(y, tensors, dy), wanted, strict=True):
                    torch.testing.assert_close(got, exact, atol=1e-4, rtol=1e-5)
