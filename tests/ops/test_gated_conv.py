"""The plain meaning of the gated convolution, its argument checks, and the gathered path."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastgate.functional import gated_conv2d
from fastgate.ops.gated_conv import gated_conv2d_gathered, gated_conv2d_torch

N, C_IN, C_OUT = 4, 3, 5
IMPLS = ["torch", "auto"]


def naive(x: Tensor, weight: Tensor, in_rows: Tensor, out_rows: Tensor, stride: int, padding: int) -> Tensor:
    """The formula as a sum over taps; gates are [N, C]."""
    n, c_in, height, width = x.shape
    c_out, _, kh, kw = weight.shape
    bordered = x.new_zeros(n, c_in, height + 2 * padding, width + 2 * padding)
    bordered[:, :, padding : padding + height, padding : padding + width] = x * in_rows.reshape(n, c_in, 1, 1)
    h_out, w_out = ((size - k) // stride + 1 for size, k in zip(bordered.shape[2:], (kh, kw), strict=True))
    y = x.new_zeros(n, c_out, h_out, w_out)
    for r in range(kh):
        for s in range(kw):
            under_tap = bordered[:, :, r : r + stride * h_out : stride, s : s + stride * w_out : stride]
            y = y + torch.einsum("oc,nchw->nohw", weight[:, :, r, s], under_tap)
    return y * out_rows.reshape(n, c_out, 1, 1)


def rows(gate: Tensor | None, channels: int) -> Tensor:
    """Any accepted gate as [N, C], by its number of values: N, C, N * C and 1 are all different here."""
    if gate is None:
        return torch.ones(N, channels, dtype=torch.float64)
    assert len({1, N, channels, N * channels}) == 4
    shape = {1: (1, 1), N: (N, 1), channels: (1, channels), N * channels: (N, channels)}[gate.numel()]
    return gate.reshape(shape).expand(N, channels)


def gate_of(shape: tuple[int, ...] | None) -> Tensor | None:
    if shape is None:
        return None
    gate = torch.randint(0, 2, shape).double()
    gate.view(-1)[0] = 1  # at least one open and, where there are more, one closed
    if gate.numel() > 1:
        gate.view(-1)[-1] = 0
    return gate


def assert_same(got: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    for name, exact in wanted.items():
        assert (got[name] is None) == (exact is None), name
        if exact is not None:
            # fp64 sums of at most a few hundred terms of unit order, in another order
            torch.testing.assert_close(
                got[name], exact, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
            )


@dataclass(frozen=True)
class Case:
    in_gate: tuple[int, ...] | None = None
    out_gate: tuple[int, ...] | None = None
    size: tuple[int, int] = (5, 7)
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int = 1

    def __str__(self) -> str:
        gates = ["none" if shape is None else "x".join(map(str, shape)) for shape in (self.in_gate, self.out_gate)]
        return f"{'-'.join(gates)}-k{self.kernel[0]}{self.kernel[1]}s{self.stride}p{self.padding}"


CASES = [
    Case(),
    # every form of a gate, on either side
    Case((N,), None),
    Case((N, 1), (C_OUT,)),
    Case((C_IN,), (N, 1)),
    Case((1, C_IN), (1, C_OUT)),
    Case((N, C_IN), (N, C_OUT)),
    Case((N, 1, 1, 1), (1, C_OUT, 1, 1)),
    Case((1, C_IN, 1, 1), (N, 1, 1, 1)),
    Case((N, C_IN, 1, 1), (N, C_OUT, 1, 1)),
    Case((1, 1), (N,)),  # one switch for everything
    Case(None, (1, 1, 1, 1)),
    Case((N,), (N, 1)),  # a sample is open where both are
    # other convolutions
    Case((N, C_IN), (C_OUT,), kernel=(1, 1), padding=0),
    Case((N, C_IN), (C_OUT,), kernel=(1, 1), stride=2, padding=0),
    Case((C_IN,), (N, C_OUT), stride=2),
    Case((C_IN,), (N, C_OUT), padding=0),
    Case((C_IN,), (C_OUT,), kernel=(1, 3), stride=3, padding=2),
    Case((C_IN,), (C_OUT,), size=(1, 1)),
]


@pytest.mark.parametrize("live", [False, True], ids=["constant-gates", "live-gates"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_every_gradient_match_the_formula(case: Case, impl: str, live: bool) -> None:
    tensors = {
        "x": torch.randn(N, C_IN, *case.size, dtype=torch.float64),
        "weight": torch.randn(C_OUT, C_IN, *case.kernel, dtype=torch.float64),
        "in_gate": gate_of(case.in_gate),
        "out_gate": gate_of(case.out_gate),
    }

    def run(own: bool) -> dict[str, Tensor | None]:
        leaves = {
            name: None if t is None else t.clone().requires_grad_(live or "gate" not in name)
            for name, t in tensors.items()
        }
        options = {"stride": case.stride, "padding": case.padding}
        if own:
            gates = {name: leaves[name] for name in ("in_gate", "out_gate")}
            y = gated_conv2d(leaves["x"], leaves["weight"], **gates, **options, impl=impl)
        else:
            gates = (rows(leaves["in_gate"], C_IN), rows(leaves["out_gate"], C_OUT))
            y = naive(leaves["x"], leaves["weight"], *gates, **options)
        torch.manual_seed(1)
        y.backward(torch.randn_like(y))
        return {"y": y.detach()} | {f"d{name}": None if t is None else t.grad for name, t in leaves.items()}

    assert_same(run(own=True), run(own=False))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "gates", [((N, C_IN), (N, C_OUT)), ((C_IN,), (C_OUT,)), ((N,), (N,))], ids=["pairs", "batch", "sample"]
)
@pytest.mark.parametrize("live", [False, True], ids=["constant-gates", "live-gates"])
def test_gradcheck(gates: tuple, impl: str, live: bool) -> None:
    x = torch.randn(N, C_IN, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(C_OUT, C_IN, 3, 3, dtype=torch.float64, requires_grad=True)
    ins, outs = (gate_of(shape).requires_grad_(live) for shape in gates)

    def function(*tensors: Tensor) -> Tensor:
        return gated_conv2d(*tensors[:2], in_gate=tensors[2], out_gate=tensors[3], impl=impl)

    assert torch.autograd.gradcheck(function, (x, weight, ins, outs))
    assert torch.autograd.gradgradcheck(function, (x, weight, ins, outs))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_gate_and_open_gates_are_the_convolution(impl: str) -> None:
    x, weight = torch.randn(N, C_IN, 5, 7), torch.randn(C_OUT, C_IN, 3, 3)
    wanted = torch.nn.functional.conv2d(x, weight, None, 2, 1)
    for gates in ({}, {"in_gate": torch.ones(N)}, {"in_gate": torch.ones(C_IN), "out_gate": torch.ones(N, C_OUT)}):
        assert torch.equal(gated_conv2d(x, weight, **gates, stride=2, impl=impl), wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_empty_batch_is_an_empty_result(impl: str) -> None:
    x, weight = torch.zeros(0, C_IN, 5, 7), torch.zeros(C_OUT, C_IN, 3, 3)
    for gates in ({}, {"in_gate": torch.ones(0)}, {"in_gate": torch.ones(C_IN)}, {"out_gate": torch.ones(0, C_OUT)}):
        assert gated_conv2d(x, weight, **gates, stride=2, impl=impl).shape == (0, C_OUT, 3, 4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gates", [(None, None), ((N, C_IN), (N, C_OUT)), ((C_IN,), (C_OUT,)), ((N,), (N,))], ids=str)
def test_channels_last_is_the_same_and_stays_channels_last(gates: tuple, impl: str) -> None:
    x, weight = torch.randn(N, C_IN, 5, 7), torch.randn(C_OUT, C_IN, 3, 3)
    ins, outs = (None if gate is None else gate.float() for gate in map(gate_of, gates))
    plain = gated_conv2d(x, weight, in_gate=ins, out_gate=outs, impl=impl)
    last = gated_conv2d(x.to(memory_format=torch.channels_last), weight, in_gate=ins, out_gate=outs, impl=impl)
    torch.testing.assert_close(plain, last)
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keeps_the_dtype(dtype: torch.dtype, impl: str) -> None:
    x, weight = torch.ones(2, 3, 4, 4, dtype=dtype), torch.ones(5, 3, 1, 1, dtype=dtype)
    gates = {"in_gate": torch.tensor([1, 0, 1]).to(dtype), "out_gate": torch.tensor([1, 0]).to(dtype)}
    y = gated_conv2d(x, weight, **gates, padding=0, impl=impl)
    assert y.dtype == dtype
    assert y[:, :, 0, 0].tolist() == [[2.0] * 5, [0.0] * 5]


@pytest.mark.parametrize("impl", [*IMPLS, "triton"])
@pytest.mark.parametrize(("n", "autocast"), [(3, False), (4, False), (4, True)], ids=["sample", "batch", "autocast"])
def test_a_wider_gate_does_not_widen_the_result(n: int, autocast: bool, impl: str) -> None:
    # gates of 3 values: one per sample, or, with 4 samples, one per channel
    dtype = torch.float32 if autocast else torch.bfloat16
    x, weight = torch.ones(n, 3, 2, 2, dtype=dtype), torch.ones(3, 3, 1, 1, dtype=dtype).requires_grad_()
    gate = torch.tensor([1.0, 0, 1]).reshape((3, 1) if n == 3 else (1, 3)).requires_grad_()
    for gates in ({"in_gate": gate}, {"out_gate": gate}, {"in_gate": gate.detach()}, {"out_gate": gate.detach()}):
        gate.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = gated_conv2d(x, weight, **gates, padding=0, impl=impl)
        assert y.dtype == torch.bfloat16
        wanted = gated_conv2d_torch(x.float(), weight.float(), gates.get("in_gate"), gates.get("out_gate"), 1, 0)
        assert torch.equal(y.float(), wanted)
        y.sum().backward()
        assert weight.grad.dtype == dtype
        assert gate.grad is None or gate.grad.dtype == torch.float32


@pytest.mark.parametrize("impl", [*IMPLS, "triton"])
@pytest.mark.parametrize("shape", [(N, C_OUT), (C_OUT,), (N,)], ids=["pairs", "batch", "sample"])
@pytest.mark.parametrize("live", [False, True], ids=["constant-gates", "live-gates"])
def test_open_outputs_and_gradients_are_the_same_without_closed_outputs(shape: tuple, live: bool, impl: str) -> None:
    x, weight, in_gate = torch.randn(N, C_IN, 5, 7), torch.randn(C_OUT, C_IN, 3, 3), gate_of((N, C_IN)).float()
    out_gate = gate_of(shape).float()
    opened = rows(out_gate, C_OUT)[:, :, None, None] != 0
    results = []
    for write_closed in (True, False):
        leaves = [x.clone(), weight.clone(), in_gate.clone(), out_gate.clone()]
        for leaf in leaves[: 4 if live else 2]:
            leaf.requires_grad_()
        gates = {"in_gate": leaves[2], "out_gate": leaves[3]}
        y = gated_conv2d(*leaves[:2], **gates, write_closed=write_closed, impl=impl).where(opened, 0.0)
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    for written, left_out in zip(*results, strict=True):
        assert torch.equal(written, left_out)


@pytest.mark.parametrize("name", ["in_gate", "out_gate"])
def test_as_many_samples_as_channels_must_say_which(name: str) -> None:
    x, weight = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 3, 3)
    gate = torch.tensor([1.0, 0.0, 1.0])
    message = rf"{name}: \[3\] could be per sample or per channel, as there are 3 of both; pass \[3, 1\] or \[1, 3\]"
    with pytest.raises(ValueError, match=message):
        gated_conv2d(x, weight, **{name: gate})
    per_sample = gated_conv2d(x, weight, **{name: gate[:, None]})
    per_channel = gated_conv2d(x, weight, **{name: gate[None]})
    plain = torch.nn.functional.conv2d(x, weight, None, 1, 1)
    assert torch.equal(per_sample, plain * gate[:, None, None, None])
    if name == "out_gate":
        assert torch.equal(per_channel, plain * gate[None, :, None, None])
    else:
        torch.testing.assert_close(per_channel, torch.nn.functional.conv2d(x[:, ::2], weight[:, ::2], None, 1, 1))


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize("impl", ["torch", "auto", "triton"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param(
            {"x": zeros(3, 5, 5)}, ValueError,
            r"x, weight: expected \[N, C_in, H, W\] and \[C_out, C_in, kh, kw\], got \[3, 5, 5\] and \[5, 3, 3, 3\]",
            id="three-dimensions",
        ),
        pytest.param({"weight": zeros(5, 3, 3)}, ValueError, r"got \[4, 3, 6, 7\] and \[5, 3, 3\]", id="weight-dims"),
        pytest.param(
            {"weight": zeros(5, 1, 3, 3)}, ValueError, r"got \[4, 3, 6, 7\] and \[5, 1, 3, 3\]", id="grouped-weight"
        ),
        pytest.param(
            {"x": zeros(4, 3, 6, 7).int()}, TypeError,
            r"x: expected a floating-point tensor, got torch\.int32; convert the images first",
            id="integer-images",
        ),
        pytest.param(
            {"weight": zeros(5, 3, 3, 3).to("meta")}, ValueError,
            "weight: expected the device of x, cpu, got meta",
            id="weight-elsewhere",
        ),
        pytest.param(
            {"stride": 0}, ValueError,
            "stride, padding: expected at least 1 and at least 0, got 0 and 1",
            id="no-stride",
        ),
        pytest.param({"padding": -1}, ValueError, "at least 1 and at least 0, got 1 and -1", id="negative-padding"),
        pytest.param(
            {"x": zeros(4, 3, 6, 2), "padding": 0}, ValueError,
            r"x: expected a height and width of at least the kernel size \[3, 3\] with padding 0, got \[6, 2\]",
            id="narrower-than-the-kernel",
        ),
        pytest.param({"x": zeros(4, 3, 2, 6), "padding": 0}, ValueError, r"got \[2, 6\]", id="lower-than-the-kernel"),
        pytest.param(
            {"in_gate": zeros(5)}, ValueError,
            r"in_gate: expected \[4\], \[4, 3\] or \[3\], .* two trailing dimensions of 1, got \[5\]",
            id="in-gate-of-outputs",
        ),
        pytest.param(
            {"out_gate": zeros(3)}, ValueError, r"out_gate: expected \[4\], \[4, 5\] or \[5\], .* got \[3\]",
            id="out-gate-of-inputs",
        ),
        pytest.param({"in_gate": zeros(3, 4)}, ValueError, r"in_gate: expected .* got \[3, 4\]", id="transposed"),
        pytest.param({"in_gate": zeros()}, ValueError, r"in_gate: expected .* got \[\]", id="no-dimension"),
        pytest.param({"in_gate": zeros(4, 3, 6, 7)}, ValueError, r"expected .* got \[4, 3, 6, 7\]", id="a-map"),
        pytest.param({"out_gate": zeros(4, 5, 1)}, ValueError, r"expected .* got \[4, 5, 1\]", id="one-trailing"),
        pytest.param(
            {"in_gate": zeros(4, 3).bool()}, TypeError,
            r"in_gate: expected a floating-point tensor of 0 and 1, got torch\.bool; convert it with \.to\(x\.dtype\)",
            id="bool-gate",
        ),
        pytest.param(
            {"out_gate": zeros(4, 5).long()}, TypeError, r"out_gate: expected .* got torch\.int64", id="integer-gate"
        ),
        pytest.param(
            {"out_gate": zeros(4, 5).to("meta")}, ValueError,
            "out_gate: expected the device of x, cpu, got meta",
            id="gate-elsewhere",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_say_expected_and_got(change: dict, error: type, message: str, impl: str) -> None:
    arguments = {"x": zeros(4, 3, 6, 7), "weight": zeros(5, 3, 3, 3), "stride": 1, "padding": 1} | change
    with pytest.raises(error, match=message):
        gated_conv2d(arguments.pop("x"), arguments.pop("weight"), **arguments, impl=impl)


@pytest.mark.parametrize("name", ["in_gate", "out_gate"])
def test_checked_mode_refuses_what_is_not_0_or_1(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(4, 3, 5, 5), torch.randn(5, 3, 3, 3)
    gate = torch.tensor([1.0, 0.0, 0.5, 1.0])
    gated_conv2d(x, weight, **{name: gate}, impl="torch")  # unchecked: no look at the values
    monkeypatch.setenv("FASTGATE_CHECKED", "1")
    for bad in (gate, torch.tensor([1.0, 0, 0, -1]), torch.tensor([1.0, 0, 0, torch.nan])):
        with pytest.raises(ValueError, match=f"{name}: expected 0 and 1, got other values; threshold the gate first"):
            gated_conv2d(x, weight, **{name: bad})
    gate = (gate > 0.5).float()
    checked = gated_conv2d(x, weight, **{name: gate}, impl="torch")
    monkeypatch.setenv("FASTGATE_CHECKED", "0")
    assert torch.equal(gated_conv2d(x, weight, **{name: gate}, impl="torch"), checked)


def test_an_explicit_triton_request_that_cannot_be_honoured_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3)
    with pytest.raises(ValueError, match=r"gated_conv2d: impl requests 'triton'.*use 'auto' or 'torch'"):
        gated_conv2d(x, weight, impl="triton")
    with pytest.raises(ValueError, match="impl: expected one of auto, triton, torch, got 'cudnn'"):
        gated_conv2d(x, weight, impl="cudnn")
    monkeypatch.setenv("FASTGATE_IMPL", "triton")
    with pytest.raises(ValueError, match="environment variable FASTGATE_IMPL requests 'triton'"):
        gated_conv2d(x, weight)
    assert gated_conv2d(x, weight, impl="torch").shape == (2, 5, 4, 4)


# -- the gathered path: called directly, as which path `auto` takes is measured and may change


def opened(total: int, which: str) -> Tensor:
    """[total] with none, one or all open, or half of them."""
    gate = {"none": torch.zeros(total), "all": torch.ones(total), "half": (torch.arange(total) % 2).float()}.get(which)
    if gate is None:
        gate = torch.zeros(total)
        gate[total // 2] = 1
    return gate.double()


GATHERED = [
    # (form of in_gate, form of out_gate)
    pytest.param("batch", None, id="inputs"),
    pytest.param(None, "batch", id="outputs"),
    pytest.param("batch", "batch", id="inputs-and-outputs"),
    pytest.param("sample", None, id="samples"),
    pytest.param("sample", "sample", id="samples-twice"),
    pytest.param("batch", "sample", id="inputs-and-samples"),
    pytest.param("sample", "batch", id="samples-and-outputs"),
]


def gathered_case(in_form: str | None, out_form: str | None, which: str) -> tuple[Tensor | None, Tensor | None]:
    forms = ((in_form, C_IN), (out_form, C_OUT))
    return tuple(
        None if form is None else opened(N, which)[:, None] if form == "sample" else opened(channels, which)[None]
        for form, channels in forms
    )


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("which", ["none", "one", "half", "all"])
@pytest.mark.parametrize(("in_form", "out_form"), GATHERED)
def test_gathered_equals_the_plain_path(in_form: str | None, out_form: str | None, which: str, last: bool) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    gates = gathered_case(in_form, out_form, which)
    if which == "half" and in_form == out_form == "sample":
        gates = (gates[0], opened(N, "one")[:, None])  # two different gates: open is what both leave open
        assert (gates[0] * gates[1]).sum() == 0 or gates[0].sum() != gates[1].sum()
    results = []
    for function in (gated_conv2d_gathered, gated_conv2d_torch):
        torch.manual_seed(1)
        x = torch.randn(N, C_IN, 5, 7, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
        weight = torch.randn(C_OUT, C_IN, 3, 3, dtype=torch.float64).requires_grad_()
        y = function(x, weight, *gates, 2, 1)
        assert y.is_contiguous(memory_format=layout)
        y.backward(torch.randn_like(y))
        results.append({"y": y.detach(), "dx": x.grad, "dweight": weight.grad})
    assert_same(*results)
    if which == "none":
        for name, tensor in results[0].items():
            assert torch.equal(tensor, torch.zeros_like(tensor)), name


def test_gathered_does_not_look_at_what_is_closed() -> None:
    x, weight = torch.randn(N, C_IN, 5, 7), torch.randn(C_OUT, C_IN, 3, 3)
    in_gate, out_gate = torch.tensor([[1.0, 0, 1]]), torch.tensor([[1.0], [1], [0], [1]])
    wanted = gated_conv2d_torch(x, weight, in_gate, out_gate, 1, 1)
    x[:, 1] = torch.nan
    x[2] = torch.nan
    # the sums are the same but for the order, of 2 x 9 terms of unit order
    torch.testing.assert_close(gated_conv2d_gathered(x, weight, in_gate, out_gate, 1, 1), wanted)


@pytest.mark.parametrize("which", ["none", "half"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gathered_keeps_half_precision(dtype: torch.dtype, which: str) -> None:
    x = torch.ones(N, C_IN, 3, 3, dtype=dtype)
    weight = torch.ones(C_OUT, C_IN, 3, 3, dtype=dtype)
    gates = tuple(gate.to(dtype) for gate in gathered_case("sample", "batch", which))
    y = gated_conv2d_gathered(x, weight, *gates, 1, 1)
    assert y.dtype == dtype
    # small integers: exact in both
    assert torch.equal(y, gated_conv2d_torch(x, weight, *gates, 1, 1))
