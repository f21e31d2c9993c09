"""The kernels in Triton's interpreter (on a GPU: as compiled) against the fp64 meaning."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from fastgate.kernels import gated_conv as launchers
from torch import Tensor

from fastgate.functional import gated_conv2d
from tests.kernels.compare import assert_close_to_oracle, poisoned_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("ieee")
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="looks into Triton's interpreter")

FORMS = (None, "sample", "batch", "pairs")


@dataclass(frozen=True)
class Case:
    """One gated convolution."""

    shape: tuple[int, int, int, int] = (3, 4, 4, 5)
    out: int = 5
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int = 1
    in_form: str | None = "pairs"
    out_form: str | None = "pairs"
    live: tuple[bool, bool] = (False, False)  # which of the gates require grad
    x_last: bool = False
    weight_last: bool = False
    open: float = 0.5
    write_closed: bool = True

    def gate(self, form: str | None, channels: int) -> Tensor | None:
        if form is None:
            return None
        n = self.shape[0]
        shape = {"switch": (1, 1), "sample": (n, 1), "batch": (1, channels), "pairs": (n, channels)}[form]
        gate = (torch.rand(shape, device=DEVICE) < self.open).float()
        if 0 < self.open < 1 and gate.numel() > 1:  # something is open and something closed
            gate.view(-1)[0], gate.view(-1)[-1] = 0, 1
        return gate

    def tensors(self, draw: Callable[..., Tensor] = torch.randn) -> dict[str, Tensor | None]:
        x, weight = draw(self.shape, device=DEVICE), draw((self.out, self.shape[1], *self.kernel), device=DEVICE)
        if self.x_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.weight_last:
            weight = weight.contiguous(memory_format=torch.channels_last)
        return {
            "x": x,
            "weight": weight,
            "in_gate": self.gate(self.in_form, self.shape[1]),
            "out_gate": self.gate(self.out_form, self.out),
        }

    def gradient(self, draw: Callable[..., Tensor] = torch.randn) -> Tensor:
        sizes = zip(self.shape[2:], self.kernel, strict=True)
        return draw(
            (self.shape[0], self.out, *((size + 2 * self.padding - k) // self.stride + 1 for size, k in sizes)),
            device=DEVICE,
        )


def run(
    impl: str, case: Case, dtype: torch.dtype, tensors: dict[str, Tensor | None], dy: Tensor
) -> dict[str, Tensor | None]:
    """The output and every gradient, by name."""
    live = {"x": True, "weight": True, "in_gate": case.live[0], "out_gate": case.live[1]}
    leaves = {
        name: None
        if t is None
        else t.detach().to(dtype, copy=True, memory_format=torch.preserve_format).requires_grad_(live[name])
        for name, t in tensors.items()
    }
    gates = {name: leaves[name] for name in ("in_gate", "out_gate")}
    options = {"stride": case.stride, "padding": case.padding, "write_closed": case.write_closed}
    y = gated_conv2d(leaves["x"], leaves["weight"], **gates, **options, impl=impl)
    y.backward(dy.to(dtype))
    results = {"y": y.detach()} | {f"d{name}": None if t is None else t.grad for name, t in leaves.items()}
    if impl == "triton":
        last = case.x_last and not leaves["x"].is_contiguous()
        for name in ("y", "dx"):
            assert results[name].is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        assert results["dweight"].stride() == leaves["weight"].stride()
    return results


def check(case: Case, dtype: torch.dtype, times: float = 2) -> None:
    # rounded to the dtype first: all three paths see the same numbers
    tensors = {name: None if t is None else t.to(dtype) for name, t in case.tensors().items()}
    dy = case.gradient().to(dtype)
    # a division of integers by zero is zero in the interpreter, anything on a GPU
    with poisoned_memory(), np.errstate(divide="raise"):
        kernel = run("triton", case, dtype, tensors, dy)
    plain = run("torch", case, dtype, tensors, dy)
    oracle = run("torch", case, torch.float64, tensors, dy)
    cancels = {}
    if dtype == torch.float32 and any(case.live):
        # a gate's gradient is what is left of thousands of terms, rounded like the sum of their magnitudes
        magnitudes = {name: None if t is None else t.abs() for name, t in tensors.items()}
        terms = run("torch", case, torch.float64, magnitudes, dy.abs())
        cancels = {name: f"terms of {name}" for name in ("din_gate", "dout_gate") if terms[name] is not None}
        for results in (kernel, plain, oracle):
            results |= {key: terms[name] for name, key in cancels.items()}
    assert_close_to_oracle(kernel, plain, oracle, cancels=cancels, times=times)


@pytest.mark.parametrize("out_form", FORMS, ids=lambda form: f"out-{form}")
@pytest.mark.parametrize("in_form", FORMS, ids=lambda form: f"in-{form}")
def test_every_combination_of_gates(in_form: str | None, out_form: str | None) -> None:
    lives = {(False, False), (in_form is not None, False), (False, out_form is not None)}
    lives.add((in_form is not None, out_form is not None))
    for live in sorted(lives):
        check(Case(in_form=in_form, out_form=out_form, live=live), torch.float32)


SHAPES = [
    pytest.param(Case((1, 1, 1, 1), 1), id="one-of-everything"),
    pytest.param(Case((2, 3, 5, 9), 3, (1, 1), padding=0, live=(True, True), x_last=True), id="k1"),
    pytest.param(Case((2, 31, 7, 7), 3, (1, 1), 2, 0, in_form="batch", weight_last=True), id="k1-stride2"),
    # a class of input pixels that no tap reaches, and two that are empty on a map of one column
    pytest.param(Case((2, 3, 5, 1), 3, (1, 1), 3, 0, live=(True, False)), id="k1-stride3"),
    pytest.param(Case((3, 17, 7, 7), 31, in_form="batch", x_last=True, weight_last=True), id="k3-channels-last"),
    pytest.param(Case((3, 5, 7, 7), 31, stride=2, live=(True, True), weight_last=True), id="k3-stride2-mixed"),
    pytest.param(Case((2, 3, 9, 5), 3, stride=3, padding=0, x_last=True), id="k3-stride3-no-padding"),
    pytest.param(Case((1, 3, 3, 3), 17, padding=0, in_form="batch", live=(True, True)), id="k3-to-one-pixel"),
    # two tiles of 64 output channels, then of input channels, and K blocks that end within a tap
    pytest.param(Case((2, 3, 5, 9), 70, out_form="batch"), id="70-outputs"),
    pytest.param(Case((2, 70, 5, 4), 3, in_form="batch", x_last=True), id="70-inputs"),
    # three tiles of pixels, and a weight gradient in several splits
    pytest.param(Case((2, 3, 12, 13), 4, live=(True, True)), id="several-tiles-of-pixels"),
    pytest.param(Case((2, 3, 7, 7), 4, (5, 5), x_last=True), id="k5"),
    pytest.param(Case((2, 3, 8, 9), 4, (7, 7), 2, 3, live=(True, False)), id="k7-stride2"),
    pytest.param(Case((2, 3, 5, 9), 4, (2, 3), 2, 0), id="k2x3"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", SHAPES)
def test_equals_its_meaning(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case((2, 3, 5, 9), 17, in_form="batch", live=(True, True)), id="live"),
        pytest.param(Case((2, 17, 5, 4), 3, in_form="pairs", out_form="sample", stride=2, x_last=True), id="constant"),
    ],
)
def test_bfloat16(case: Case) -> None:
    check(case, torch.bfloat16)


@pytest.mark.parametrize("opened", [0.0, 1.0])
@pytest.mark.parametrize("live", [False, True], ids=["constant-gates", "live-gates"])
@pytest.mark.parametrize("form", ["switch", "sample", "batch", "pairs"])
def test_all_closed_and_all_open(form: str, live: bool, opened: float) -> None:
    check(Case(in_form=form, out_form=form, open=opened, live=(live, live)), torch.float32)


@pytest.mark.parametrize("form", ["sample", "batch", "pairs"])
def test_one_open(form: str) -> None:
    case = Case(in_form=form, out_form=form)
    tensors = case.tensors()
    for name in ("in_gate", "out_gate"):
        tensors[name].zero_().view(-1)[1] = 1  # pairs: channel 1 of sample 0
    dy = case.gradient()
    with poisoned_memory():
        kernel = run("triton", case, torch.float32, tensors, dy)
    assert kernel["y"].any() and kernel["dx"].any() and kernel["dweight"].any()
    plain, oracle = (run("torch", case, dtype, tensors, dy) for dtype in (torch.float32, torch.float64))
    assert_close_to_oracle(kernel, plain, oracle)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        # |x| <= 4, |w| and |dy| <= 2: no sum in y, dx and dweight passes 2048, up to where fp16 has every integer
        pytest.param(Case((2, 17, 7, 7), 20, in_form="batch"), torch.float16, id="fp16"),
        # the sums of the gates' gradients stay below 2^24
        pytest.param(Case((2, 9, 7, 7), 20, stride=2, live=(True, True), x_last=True), torch.float32, id="fp32-live"),
    ],
)
def test_integers_are_exact(case: Case, dtype: torch.dtype) -> None:
    def draw(limit: int) -> Callable[..., Tensor]:
        return lambda shape, device: torch.randint(-limit, limit + 1, shape, device=device).float()

    tensors = case.tensors(draw(4))
    tensors["weight"] = draw(2)(tensors["weight"].shape, DEVICE)
    dy = case.gradient(draw(2))
    kernel = run("triton", case, dtype, tensors, dy)
    oracle = run("torch", case, torch.float64, tensors, dy)
    for name, exact in oracle.items():
        assert exact is None or torch.equal(kernel[name].double(), exact), name


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(in_form=in_form, out_form=out_form), id=f"{in_form}-{out_form}")
        for in_form, out_form in [
            ("pairs", "pairs"),
            ("pairs", "sample"),
            ("pairs", "batch"),
            ("batch", "batch"),
            ("batch", "pairs"),
            ("sample", "sample"),
            ("sample", "batch"),
            (None, "sample"),
        ]
    ]
    + [
        # a gradient that an input gate asks for needs all of x, but of dy only what is open
        pytest.param(Case(live=(True, False)), id="live-pairs"),
        pytest.param(Case(in_form="batch", out_form="batch", stride=2, live=(True, False)), id="live-batch"),
    ],
)
def test_what_is_closed_does_not_reach_the_results(case: Case) -> None:
    n, c_in = case.shape[:2]
    tensors, dy = case.tensors(), case.gradient()
    wanted = run("triton", case, torch.float32, tensors, dy)

    def closed(gate: Tensor | None, channels: int) -> Tensor:
        gate = torch.ones(1, 1, device=DEVICE) if gate is None else gate
        return (gate == 0).expand(n, channels)

    in_closed, out_closed = closed(tensors["in_gate"], c_in), closed(tensors["out_gate"], case.out)
    no_output = out_closed.all(1)  # samples whose input is of no use
    no_input = in_closed.all(1)
    assert (in_closed.any() or out_closed.any()) and not in_closed.all() and not out_closed.all()
    if not case.live[0]:
        tensors["x"][in_closed] = torch.nan
        dy[no_input if case.in_form == "sample" else []] = torch.nan
        if case.out_form == "sample":
            tensors["x"][no_output] = torch.nan
    dy[out_closed] = torch.nan
    assert dy.isnan().any() or tensors["x"].isnan().any()
    got = run("triton", case, torch.float32, tensors, dy)
    for name, clean in wanted.items():
        assert clean is None or torch.equal(got[name], clean), name


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(in_form=None, out_form="batch"), id="batch"),
        pytest.param(Case(in_form="batch", out_form="pairs", stride=2, x_last=True), id="pairs"),
        pytest.param(Case(in_form="pairs", out_form="sample", live=(True, False)), id="sample"),
        # the second tile of 32 output channels is closed in whole, and several tiles of pixels
        pytest.param(Case((2, 3, 12, 13), 40, out_form="pairs", open=0.3, x_last=True), id="several-tiles"),
        pytest.param(Case(out_form="batch", open=0.0), id="all-closed"),
    ],
)
def test_closed_outputs_are_left_as_they_were_where_the_caller_says_so(case: Case) -> None:
    tensors, dy = case.tensors(), case.gradient()
    wanted = run("triton", case, torch.float32, tensors, dy)
    closed = (tensors["out_gate"] == 0)[:, :, None, None].expand_as(dy)
    assert closed.any() and not wanted["y"][closed].any()
    with poisoned_memory():
        left_out = replace(case, write_closed=False)
        got = run("triton", left_out, torch.float32, tensors, dy.masked_fill(closed, torch.nan))
    assert got["y"][closed].isnan().all()
    assert torch.equal(got.pop("y")[~closed], wanted.pop("y")[~closed])
    for name, gradient in wanted.items():
        assert gradient is None or torch.equal(got[name], gradient), name


@pytest.mark.parametrize("live", [(False, False), (True, True)], ids=["constant-gates", "live-gates"])
@pytest.mark.parametrize("in_form", ["sample", "pairs"])
def test_outputs_that_the_input_gate_alone_closes_are_written(in_form: str, live: tuple[bool, bool]) -> None:
    case = Case(in_form=in_form, out_form="sample", live=live)
    tensors, dy = case.tensors(), case.gradient()
    tensors["in_gate"][2], tensors["out_gate"][2] = 0, 1
    wanted = run("triton", case, torch.float32, tensors, dy)
    with poisoned_memory():
        got = run("triton", replace(case, write_closed=False), torch.float32, tensors, dy)
    opened = tensors["out_gate"][:, 0] != 0
    assert not got["y"][2].any()
    assert torch.equal(got.pop("y")[opened], wanted.pop("y")[opened])
    for name, gradient in wanted.items():
        assert gradient is None or torch.equal(got[name], gradient), name


def test_an_open_gate_that_requires_grad_reads_closed_input_only_for_its_own_gradient() -> None:
    case = Case(live=(True, True))
    tensors, dy = case.tensors(), case.gradient()
    wanted = run("triton", case, torch.float32, tensors, dy)
    tensors["x"][tensors["in_gate"] == 0] = torch.nan
    got = run("triton", case, torch.float32, tensors, dy)
    for name in ("y", "dx", "dweight", "dout_gate"):
        assert torch.equal(got[name], wanted[name]), name
    # <dz, x> of a closed channel
    assert torch.equal(got["din_gate"].isnan(), tensors["in_gate"] == 0)


@pytest.mark.parametrize("x_last", [False, True], ids=["nchw", "channels-last"])
def test_gradients_in_any_layout(x_last: bool) -> None:
    case = Case(x_last=x_last)
    tensors, dy = case.tensors(), case.gradient()
    wanted = run("triton", case, torch.float32, tensors, dy)
    transposed = dy.transpose(2, 3).contiguous().transpose(2, 3)
    for other in (dy.contiguous(memory_format=torch.channels_last), transposed):
        got = run("triton", case, torch.float32, tensors, other)
        assert [name for name in ("dx", "dweight") if not torch.equal(got[name], wanted[name])] == []
    # a sum's gradient has stride 0 everywhere
    one = torch.ones((), device=DEVICE).expand(dy.shape)
    got, wanted = (run("triton", case, torch.float32, tensors, grad) for grad in (one, one.contiguous()))
    assert [name for name in ("dx", "dweight") if not torch.equal(got[name], wanted[name])] == []


@pytest.mark.parametrize("needed", ["x", "weight", "in_gate", "out_gate"])
def test_only_one_gradient_is_asked_for(needed: str) -> None:
    case = Case(live=(True, True))
    tensors, dy = case.tensors(), case.gradient()
    wanted = run("triton", case, torch.float32, tensors, dy)
    leaves = {name: t.clone().requires_grad_(name == needed) for name, t in tensors.items()}
    gates = {name: leaves[name] for name in ("in_gate", "out_gate")}
    gated_conv2d(leaves["x"], leaves["weight"], **gates, impl="triton").backward(dy)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name == needed), name
    # dx is the same sum whether closed channels are computed beside it or not, but for its order
    torch.testing.assert_close(leaves[needed].grad, wanted[f"d{needed}"])


def test_an_empty_batch() -> None:
    case = Case((0, 4, 4, 5), 5, live=(True, True))
    results = run("triton", case, torch.float32, case.tensors(), case.gradient())
    assert results["y"].shape == (0, 5, 4, 5) and results["dx"].shape == (0, 4, 4, 5)
    assert torch.equal(results["dweight"], torch.zeros(5, 4, 3, 3, device=DEVICE))
    assert results["din_gate"].shape == (0, 4) and results["dout_gate"].shape == (0, 5)


SPLIT = Case((4, 3, 6, 7), 4, live=(True, True))


def test_twice_gives_the_same_bits() -> None:
    tensors, dy = SPLIT.tensors(), SPLIT.gradient()
    first, second = (run("triton", SPLIT, torch.float32, tensors, dy) for _ in range(2))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@interpreted
def test_the_order_of_programs_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs in order; a GPU need not. The counter is used again, as on a GPU."""
    from triton.runtime.interpreter import InterpreterBuilder

    tensors, dy = SPLIT.tensors(), SPLIT.gradient()
    counters: list[Tensor] = []

    def shared_counter(device: torch.device, size: int) -> Tensor:
        counters.append(counters[0] if counters else torch.zeros(size, dtype=torch.int32))
        return counters[-1]

    monkeypatch.setattr(launchers, "counter", shared_counter)
    forward = run("triton", SPLIT, torch.float32, tensors, dy)
    assert len(counters) == 1 and not counters[0].any()
    set_index = InterpreterBuilder.set_grid_idx
    seen = set()

    def reversed_index(self: InterpreterBuilder, x: int, y: int, z: int) -> None:
        index = tuple(size - 1 - i for size, i in zip(self.grid_dim, (x, y, z), strict=True))
        seen.add(index)
        set_index(self, *index)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", reversed_index)
    with poisoned_memory():
        backward = run("triton", SPLIT, torch.float32, tensors, dy)
    assert len(counters) == 2 and not counters[0].any()
    assert max(z for _, _, z in seen) > 1, "the weight gradient is to be in several splits"
    assert [name for name in forward if not torch.equal(forward[name], backward[name])] == []


@interpreted
def test_a_program_takes_several_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(SPLIT, live=(False, False))
    tensors, dy = case.tensors(), case.gradient()
    wanted = run("triton", case, torch.float32, tensors, dy)
    monkeypatch.setattr(launchers, "_WGRAD_PROGRAMS", 4)  # two column tiles: splits of three samples and of one
    with poisoned_memory():
        got = run("triton", case, torch.float32, tensors, dy)
    # fp32 sums of 168 terms of unit order, split differently
    torch.testing.assert_close(got["dweight"], wanted["dweight"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("x_last", [False, True], ids=["nchw", "channels-last"])
@pytest.mark.parametrize(
    ("in_form", "out_form"),
    [
        ("batch", "pairs"),
        *(pytest.param(*forms, marks=pytest.mark.slow) for forms in (("pairs", "sample"), (None, None))),
    ],
)
def test_opcheck(in_form: str | None, out_form: str | None, x_last: bool) -> None:
    case = Case((2, 3, 4, 4), 4, stride=2, in_form=in_form, out_form=out_form, x_last=x_last)
    ops, tensors = torch.ops.fastgate, case.tensors()
    x, weight = tensors["x"], tensors["weight"]
    dy = case.gradient().contiguous(memory_format=torch.channels_last if x_last else torch.contiguous_format)
    gates = (tensors["in_gate"], tensors["out_gate"], 2, 1)
    torch.library.opcheck(ops.gated_conv_fwd.default, (x, weight, *gates, True))
    # nothing is closed: what is unspecified cannot be compared
    torch.library.opcheck(ops.gated_conv_fwd.default, (x, weight, tensors["in_gate"], None, 2, 1, False))
    for needs_dgate in (False, True):
        torch.library.opcheck(ops.gated_conv_dgrad.default, (dy, weight, x, *gates, needs_dgate))
    torch.library.opcheck(ops.gated_conv_wgrad.default, (x, dy, weight, *gates))


@pytest.mark.parametrize("write_closed", [True, False], ids=["written", "left-out"])
@pytest.mark.parametrize("live", [False, True], ids=["constant-gates", "live-gates"])
@pytest.mark.parametrize(("in_form", "out_form"), [("pairs", "pairs"), ("batch", "sample")])
def test_compiles_into_one_graph(in_form: str, out_form: str, live: bool, write_closed: bool) -> None:
    case = Case((2, 3, 4, 5), 4, in_form=in_form, out_form=out_form, live=(live, live))
    tensors, dy = case.tensors(), case.gradient()

    def function(x: Tensor, weight: Tensor, in_gate: Tensor, out_gate: Tensor) -> Tensor:
        gates = {"in_gate": in_gate, "out_gate": out_gate}
        y = gated_conv2d(torch.relu(x), 2 * weight, **gates, write_closed=write_closed, impl="triton")
        return torch.sin(y.where(out_gate[:, :, None, None] != 0, 0.0))

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_(live or "gate" not in name) for name, t in tensors.items()]
        y = call(*leaves)
        y.backward(dy)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert (eager is None) == (compiled is None)
        if eager is not None:
            assert torch.equal(eager, compiled)


def test_a_second_derivative_is_refused() -> None:
    tensors = Case().tensors()
    x = tensors.pop("x").requires_grad_()
    y = gated_conv2d(x, tensors.pop("weight"), **tensors, impl="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_what_the_kernels_cannot_serve_is_refused() -> None:
    tensors = Case().tensors()
    x, weight = tensors["x"], tensors["weight"]
    with pytest.raises(ValueError, match=r"requests 'triton', but its kernels take float16, bfloat16 and float32"):
        gated_conv2d(x.double(), weight.double(), impl="triton")
    with pytest.raises(ValueError, match=r"a tensor is torch\.float64"):
        gated_conv2d(x, weight, in_gate=tensors["in_gate"].double(), impl="triton")
    with pytest.raises(TypeError, match=r"expected the dtype of x, torch\.float16, got torch\.float32"):
        gated_conv2d(x.half(), weight, impl="triton")
    with pytest.raises(ValueError, match=r"dense NCHW or channels_last tensors, and one has strides \(80, 20, 10, 1\)"):
        gated_conv2d(x[:, :, ::2], weight, impl="triton")
    with pytest.raises(ValueError, match="dense NCHW or channels_last tensors"):
        gated_conv2d(x, weight.transpose(0, 1)[:4].transpose(0, 1).transpose(2, 3), impl="triton")


# -- work: multiply-adds of the dots that really ran, padding of tiles included


def work(case: Case, tensors: dict[str, Tensor | None], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Multiply-adds of the three passes."""
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot
    done, current = {}, ""

    def counted(self: InterpreterBuilder, a: object, b: object, *rest: object) -> object:
        (m, k), (_, n) = a.data.shape, b.data.shape
        done[current] = done.get(current, 0) + m * n * k
        return create_dot(self, a, b, *rest)

    dy = case.gradient()
    gates = {name: None if tensors[name] is None else tensors[name] for name in ("in_gate", "out_gate")}
    options = {"stride": case.stride, "padding": case.padding, "impl": "triton"}
    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", counted)
        for current, needed in (("fwd", ()), ("dgrad", ("x",)), ("wgrad", ("weight",))):
            leaves = {name: tensors[name].clone().requires_grad_(name in needed) for name in ("x", "weight")}
            y = gated_conv2d(leaves["x"], leaves["weight"], **gates, **options)
            if needed:
                done[current] = 0  # without the forward pass
                y.backward(dy)
    return {"fwd": 0, "dgrad": 0, "wgrad": 0} | done


@interpreted
@pytest.mark.parametrize(
    ("form", "part"), [pytest.param("batch", 1 / 2, id="batch"), pytest.param("sample", 1 / 2, id="sample"),
                       pytest.param("pairs", 3 / 4, id="pairs")],
)  # fmt: skip
@pytest.mark.parametrize("side", ["in", "out"])
def test_tiles_and_samples_that_are_closed_are_not_multiplied(
    side: str, form: str, part: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tiles of 64 channels, 16 pixels, 1x1 kernels: nothing is padded."""
    case = replace(Case((2, 128, 4, 4), 128, (1, 1), 1, 0, in_form=None, out_form=None), **{f"{side}_form": form})
    tensors = case.tensors()
    gate = tensors[f"{side}_gate"].fill_(1)
    gate[0, 0 if form == "sample" else 64 :] = 0  # sample 0, or the second tile of sample 0 or of all
    dense = 2 * 16 * 128 * 128
    # source channels that are closed take their place in the product, unless none of the sample's is open
    source = 1 / 2 if form == "sample" else 1
    fwd, dgrad = (source, part) if side == "in" else (part, source)
    assert work(case, tensors, monkeypatch) == {"fwd": fwd * dense, "dgrad": dgrad * dense, "wgrad": part * dense}


@interpreted
@pytest.mark.parametrize("form", ["sample", "batch", "pairs"])
@pytest.mark.parametrize("side", ["in_form", "out_form"])
def test_nothing_is_multiplied_where_one_side_is_closed(side: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(Case(in_form=None, out_form=None, open=0.0), **{side: form})
    assert work(case, case.tensors(), monkeypatch) == {"fwd": 0, "dgrad": 0, "wgrad": 0}


@interpreted
def test_work_of_gates_that_require_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own gradients take closed outputs in the forward pass and closed inputs in dgrad, and nothing else."""
    case = Case((2, 128, 4, 4), 128, (1, 1), 1, 0, in_form="batch", out_form="batch")
    tensors = case.tensors()
    for name in ("in_gate", "out_gate"):
        tensors[name].fill_(1)[:, 64:] = 0
    dense = 2 * 16 * 128 * 128
    assert work(case, tensors, monkeypatch) == {"fwd": dense / 2, "dgrad": dense / 2, "wgrad": dense / 4}
    live = {name: t.clone().requires_grad_("gate" in name) for name, t in tensors.items()}
    # asked for dweight alone, backward still needs dgrad for the input gate
    assert work(case, live, monkeypatch) == {"fwd": dense, "dgrad": dense, "wgrad": dense + dense / 4}


# -- on a GPU: real tile sizes, no waiting for the host


BIG = [
    pytest.param(Case((32, 16, 32, 32), 16, live=(True, True)), id="stage1"),
    pytest.param(Case((32, 32, 32, 32), 64, stride=2, x_last=True), id="stage2-stride2"),
    pytest.param(Case((32, 64, 8, 8), 64, x_last=True, weight_last=True), id="stage3"),
    pytest.param(Case((8, 64, 8, 8), 64, in_form="batch", out_form="batch"), id="stage3-batch"),
    pytest.param(Case((4, 256, 14, 14), 512, (1, 1), 2, 0, in_form="sample", x_last=True), id="imagenet-1x1"),
    pytest.param(Case((3, 131, 15, 13), 197, in_form="pairs", out_form="batch", live=(True, False)), id="odd"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", BIG)
def test_large_shapes(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, times=4)  # sums of thousands of products in another order than cuDNN's; 2.4 on an H200


@pytest.mark.gpu
def test_tf32_where_pytorch_allows_it() -> None:
    case = Case((64, 64, 16, 16), 64, in_form="pairs", out_form=None)
    tensors, dy = case.tensors(), case.gradient()
    exact = run("torch", case, torch.float64, tensors, dy)
    errors = {}
    for precision in ("ieee", "tf32"):
        torch.backends.cudnn.conv.fp32_precision = precision  # `ieee` puts back what was there
        found = run("triton", case, torch.float32, tensors, dy)
        errors[precision] = {
            name: float((found[name] - exact[name]).norm() / exact[name].norm()) for name in ("y", "dx", "dweight")
        }
    # sums of 576 to 16384 products; TF32 has 10 bits of mantissa
    assert max(errors["ieee"].values()) < 1e-5
    assert min(errors["tf32"].values()) > 1e-5 and max(errors["tf32"].values()) < 2**-9


@pytest.mark.gpu
def test_large_shapes_twice_give_the_same_bits() -> None:
    case = Case((64, 64, 16, 16), 64, live=(True, True))
    tensors, dy = case.tensors(), case.gradient()
    first = run("triton", case, torch.float16, tensors, dy)
    for _ in range(5):
        again = run("triton", case, torch.float16, tensors, dy)
        assert [name for name in first if not torch.equal(first[name], again[name])] == []


@pytest.mark.gpu
@pytest.mark.parametrize("live", [False, True], ids=["constant-gates", "live-gates"])
@pytest.mark.parametrize(("in_form", "out_form"), [("pairs", "pairs"), ("batch", "sample"), ("sample", "batch")])
def test_a_cuda_graph_follows_changing_gates_without_the_host(in_form: str, out_form: str, live: bool) -> None:
    case = Case((16, 32, 12, 12), 48, in_form=in_form, out_form=out_form, live=(live, live))
    tensors, dy = case.tensors(), case.gradient()
    leaves = {name: t.clone().requires_grad_(live or "gate" not in name) for name, t in tensors.items()}
    needed = [leaf for leaf in leaves.values() if leaf.requires_grad]

    def step() -> list[Tensor]:
        gates = {name: leaves[name] for name in ("in_gate", "out_gate")}
        y = gated_conv2d(leaves["x"], leaves["weight"], **gates, impl="triton")
        return [y, *torch.autograd.grad(y, needed, dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for opened in (0.5, 0.0, 1.0, 0.25):
        fresh = replace(case, open=opened).tensors()
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.copy_(fresh[name])
        graph.replay()
        wanted = run("triton", case, torch.float32, fresh, dy)
        exact = run("torch", case, torch.float64, fresh, dy)
        names = [name for name, tensor in wanted.items() if tensor is not None]
        for name, got in zip(names, results, strict=True):
            assert torch.equal(got, wanted[name]), (name, opened)
            # fp32 (or, where PyTorch allows it, TF32) sums; a wrong list would be wrong by the order of the values
            scale = exact[name].abs().max().item() + 1.0
            torch.testing.assert_close(got.double(), exact[name], rtol=0, atol=1e-2 * scale)
