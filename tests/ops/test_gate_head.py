import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fastgate as fg
from fastgate.functional import gate_head
from tests.helpers import numerical_gradient

WINDOWS = ("clipped", "restoring", "identity")
PARAMETERS = ("fc1_weight", "fc1_bias", "bn_weight", "bn_bias", "fc2_weight", "fc2_bias")


def window_by_hand(logit: float, gradient: float, window: str) -> float:
    """The straight-through gradient, from the words of DESIGN.md."""
    inside = -1 <= logit <= 1
    # a descent step moves the logit by -gradient: down, back into the window, from above 1; up from below -1
    comes_back = (logit > 1 and gradient > 0) or (logit < -1 and gradient < 0)
    if window == "identity" or inside or (window == "restoring" and comes_back):
        return gradient
    return 0.0


@pytest.mark.parametrize("window", WINDOWS)
def test_decisions_and_windows_at_every_kind_of_logit(window: str) -> None:
    just_above = math.nextafter(1.0, 2.0)
    values = [-3.0, -just_above, -1.0, -0.25, -0.0, 0.0, math.nextafter(0.0, 1.0), 0.25, 1.0, just_above, 3.0]
    for gradient in (-2.0, 0.5):
        # one channel of one pixel, weight 1: the logit is x itself
        x = torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1).requires_grad_()
        one = torch.ones(1, 1, dtype=torch.float64)
        decisions, logits = gate_head(x, one, None, training=False, window=window)
        assert logits.flatten().tolist() == values
        assert decisions.flatten().tolist() == [1.0 if v > 0 else 0.0 for v in values]
        decisions.backward(torch.full_like(decisions, gradient))
        assert x.grad.flatten().tolist() == [window_by_hand(v, gradient, window) for v in values]


def test_gradients_of_logits_and_decisions_add_up() -> None:
    # decisions pass 2 inside the window and nothing outside; logits pass 10 everywhere
    x = torch.tensor([0.5, 7.0], dtype=torch.float64).reshape(2, 1, 1, 1).requires_grad_()
    decisions, logits = gate_head(x, torch.ones(1, 1, dtype=torch.float64), None, training=False, window="clipped")
    (2 * decisions + 10 * logits).sum().backward()
    assert x.grad.flatten().tolist() == [12.0, 10.0]


@dataclass(frozen=True)
class Case:
    n: int
    channels: int
    height: int
    width: int
    hidden: int
    out: int
    depth: int = 2
    flat: bool = False
    training: bool = True
    bias: bool = True

    def __str__(self) -> str:
        parts = [f"n{self.n}c{self.channels}x{self.height}x{self.width}", f"h{self.hidden}o{self.out}d{self.depth}"]
        parts += [
            word for word, on in (("flat", self.flat), ("eval", not self.training), ("nobias", not self.bias)) if on
        ]
        return "-".join(parts)


CASES = [
    Case(8, 3, 5, 7, 6, 1),  # a layer gate, maps that are odd and not square
    Case(8, 3, 5, 7, 6, 1, training=False),
    Case(7, 17, 1, 1, 16, 17),  # a channel gate on a single pixel, odd channels
    Case(7, 17, 1, 1, 16, 17, training=False),
    Case(5, 1, 4, 4, 1, 1),  # one of everything
    Case(2, 3, 5, 7, 4, 3),  # the smallest batch that has a variance
    Case(1, 3, 5, 7, 4, 3, training=False),  # one sample in evaluation
    Case(6, 3, 5, 7, 4, 2, flat=True),  # flattened as in the paper
    Case(6, 1, 1, 1, 4, 2, flat=True),  # flattened and pooled mean the same
    Case(6, 3, 5, 7, 4, 3, flat=True, training=False),
    Case(6, 3, 5, 7, 3, 3, depth=1),
    Case(6, 3, 2, 3, 5, 5, depth=1, flat=True),
    Case(6, 3, 5, 7, 4, 2, bias=False),  # dense layers without bias, batch norm without affine values
]


def make_inputs(case: Case) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]:
    """x, the parameters by name, and the running statistics, all fp64 and away from their defaults."""
    in_features = case.channels * (case.height * case.width if case.flat else 1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).requires_grad_()

    # means over the pixels of unit order too, so that logits lie on both sides of the window's edges
    x = draw(case.n, case.channels, case.height, case.width)
    x.data += 2 * torch.randn(case.n, case.channels, 1, 1, dtype=torch.float64)
    first = case.hidden if case.depth == 2 else case.out
    parameters: dict[str, Tensor | None] = dict.fromkeys(PARAMETERS)
    parameters["fc1_weight"] = draw(first, in_features)
    parameters["fc1_bias"] = draw(first) if case.bias else None
    running = {}
    if case.depth == 2:
        parameters["bn_weight"] = draw(case.hidden) if case.bias else None
        parameters["bn_bias"] = draw(case.hidden) if case.bias else None
        parameters["fc2_weight"] = draw(case.out, case.hidden)
        parameters["fc2_bias"] = draw(case.out) if case.bias else None
        running = {
            "running_mean": torch.randn(case.hidden, dtype=torch.float64),
            "running_var": torch.rand(case.hidden, dtype=torch.float64) + 0.5,
        }
    return x, parameters, running


def head_by_hand(
    x: Tensor, p: dict[str, Tensor | None], running: dict[str, Tensor], training: bool, eps: float, momentum: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the new running statistics, in explicit matrix algebra."""
    n, channels, height, width = x.shape
    if p["fc1_weight"].shape[1] == channels:
        features = x.reshape(n, channels, -1).sum(2) / (height * width)
    else:
        features = x.reshape(n, -1)
    dense = features @ p["fc1_weight"].T
    if p["fc1_bias"] is not None:
        dense = dense + p["fc1_bias"]
    if p["fc2_weight"] is None:
        return dense, {}
    mean, var = running["running_mean"], running["running_var"]
    after = running
    if training:
        batch_mean = dense.sum(0) / n
        batch_var = ((dense - batch_mean) ** 2).sum(0) / n
        unbiased = batch_var * n / (n - 1)
        after = {
            "running_mean": (1 - momentum) * mean + momentum * batch_mean,
            "running_var": (1 - momentum) * var + momentum * unbiased,
        }
        mean, var = batch_mean, batch_var
    normal = (dense - mean) / (var + eps) ** 0.5
    if p["bn_weight"] is not None:
        normal = normal * p["bn_weight"] + p["bn_bias"]
    logits = normal * (normal > 0) @ p["fc2_weight"].T
    if p["fc2_bias"] is not None:
        logits = logits + p["fc2_bias"]
    return logits, after


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("window", ["clipped", "restoring"])
def test_outputs_statistics_and_every_gradient_match_the_formula(case: Case, window: str) -> None:
    x, parameters, running = make_inputs(case)
    eps, momentum = 1e-3, 0.3  # not the defaults, so that passing them on is tested too
    with torch.no_grad():
        wanted, after = head_by_hand(x, parameters, running, case.training, eps, momentum)

    statistics = {name: tensor.clone() for name, tensor in running.items()}
    decisions, logits = gate_head(
        x, training=case.training, momentum=momentum, eps=eps, window=window, **parameters, **statistics
    )
    # fp64 sums of at most 100 products of unit order: 1e-12 is above their rounding
    torch.testing.assert_close(logits, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(decisions, (wanted > 0).double())
    for name, tensor in statistics.items():
        torch.testing.assert_close(tensor, after[name].detach(), rtol=1e-12, atol=1e-12)

    grad_decisions, grad_logits = torch.randn_like(decisions), torch.randn_like(logits)
    ((decisions * grad_decisions).sum() + (logits * grad_logits).sum()).backward()

    # the straight-through step replaced by its window: a constant weight on each logit
    weights = grad_logits.clone()
    for i, (logit, gradient) in enumerate(
        zip(wanted.flatten().tolist(), grad_decisions.flatten().tolist(), strict=True)
    ):
        weights.view(-1)[i] += window_by_hand(logit, gradient, window)

    def objective() -> Tensor:
        return (head_by_hand(x, parameters, running, case.training, eps, momentum)[0] * weights).sum()

    with torch.no_grad():
        for name, tensor in {"x": x, **parameters}.items():
            if tensor is None:
                continue
            expected = numerical_gradient(objective, tensor)
            # central differences at step 1e-6: rounding 1e-16 / 1e-6 of sums of order 100, curvature 1e-12
            torch.testing.assert_close(
                tensor.grad, expected, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[7], CASES[10]], ids=str)
def test_gradcheck_of_the_logits(case: Case) -> None:
    x, parameters, running = make_inputs(case)
    names = [name for name, tensor in parameters.items() if tensor is not None]

    def logits(x: Tensor, *tensors: Tensor) -> Tensor:
        # clones: gradcheck calls this often, and training writes into the statistics
        statistics = {name: tensor.clone() for name, tensor in running.items()}
        full = {**parameters, **dict(zip(names, tensors, strict=True))}
        return gate_head(x, training=case.training, **full, **statistics)[1]

    assert torch.autograd.gradcheck(logits, (x, *(parameters[name] for name in names)))


def test_channels_last_means_the_same() -> None:
    case = CASES[0]
    x, parameters, running = make_inputs(case)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        statistics = {name: tensor.clone() for name, tensor in running.items()}
        leaf = x.detach().to(memory_format=layout).requires_grad_()
        decisions, logits = gate_head(leaf, training=True, **parameters, **statistics)
        (gradient,) = torch.autograd.grad(decisions.sum() + logits.square().sum(), leaf)
        results.append((decisions, logits, gradient))
    for plain, last in zip(*results, strict=True):
        # the order of the pooled sum may differ: a few ulp of fp64
        torch.testing.assert_close(plain, last, rtol=1e-13, atol=1e-13)


def test_flattened_channels_last_reads_channels_first() -> None:
    # flatten means [C, H, W] order whatever the memory layout
    x, weight = torch.randn(4, 3, 2, 2, dtype=torch.float64), torch.randn(2, 12, dtype=torch.float64)
    wanted = gate_head(x, weight, None, training=False)[1]
    got = gate_head(x.to(memory_format=torch.channels_last), weight, None, training=False)[1]
    torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("flat", [False, True], ids=["pooled", "flattened"])
def test_half_precision_input_is_accumulated_in_the_parameters_dtype(dtype: torch.dtype, flat: bool) -> None:
    # 4096 pixels of about 1: a half-precision sum would stop growing at 2048 (fp16) or 256 (bf16)
    x = (1 + 0.1 * torch.randn(4, 2, 64, 64)).to(dtype)
    weight = torch.randn(3, 2 * 64 * 64 if flat else 2) / (64 if flat else 1)
    decisions, logits = gate_head(x, weight, torch.zeros(3), training=False)
    features = x.double().flatten(1) if flat else x.double().mean((2, 3))
    assert decisions.dtype == logits.dtype == torch.float32
    # fp32 sums of up to 8192 terms of order 1/64: a blocked sum's rounding is below 1e-5
    torch.testing.assert_close(logits.double(), features @ weight.double().T, rtol=0, atol=1e-5)


def test_autocast_does_not_lower_the_head() -> None:
    x, weight = torch.randn(4, 3, 5, 5), torch.randn(2, 3)
    plain = gate_head(x, weight, None, training=False)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate_head(x, weight, None, training=False)[1], plain)


def test_running_statistics_may_be_left_out_in_training() -> None:
    x, parameters, running = make_inputs(CASES[0])
    kept = gate_head(x, training=True, **parameters, **running)[1]
    assert torch.equal(gate_head(x, training=True, **parameters)[1], kept)


def test_evaluation_leaves_the_running_statistics() -> None:
    x, parameters, running = make_inputs(CASES[1])
    before = {name: tensor.clone() for name, tensor in running.items()}
    gate_head(x, training=False, **parameters, **running)
    assert all(torch.equal(running[name], before[name]) for name in before)


GOOD = {
    "x": torch.zeros(4, 3, 5, 7),
    "fc1_weight": torch.zeros(6, 3),
    "fc1_bias": torch.zeros(6),
    "bn_weight": torch.ones(6),
    "bn_bias": torch.zeros(6),
    "running_mean": torch.zeros(6),
    "running_var": torch.ones(6),
    "fc2_weight": torch.zeros(2, 6),
    "fc2_bias": torch.zeros(2),
    "training": True,
}


def test_the_good_arguments_are_good() -> None:
    decisions, logits = gate_head(**{name: t.clone() if torch.is_tensor(t) else t for name, t in GOOD.items()})
    assert decisions.shape == logits.shape == (4, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 3)}, ValueError, r"x: expected \[N, C, H, W\], got \[4, 3\]"),
        ({"x": torch.zeros(4, 3, 5, 7, dtype=torch.uint8)}, TypeError, r"x: expected a floating-point .* torch\.uint8"),
        (
            {"fc1_weight": torch.zeros(6, 4)},
            ValueError,
            r"fc1_weight: expected \[hidden, 3\] \(pooled\) or \[hidden, 105\] .* got \[6, 4\]",
        ),
        ({"fc1_weight": torch.zeros(3)}, ValueError, r"fc1_weight: expected .* got \[3\]"),
        ({"fc1_bias": torch.zeros(5)}, ValueError, r"fc1_bias: expected \[6\], got \[5\]"),
        ({"bn_weight": torch.zeros(1, 6)}, ValueError, r"bn_weight: expected \[6\], got \[1, 6\]"),
        ({"bn_bias": torch.zeros(5)}, ValueError, r"bn_bias: expected \[6\], got \[5\]"),
        ({"running_mean": torch.zeros(5)}, ValueError, r"running_mean: expected \[6\], got \[5\]"),
        ({"running_var": torch.zeros(7)}, ValueError, r"running_var: expected \[6\], got \[7\]"),
        ({"fc2_weight": torch.zeros(2, 5)}, ValueError, r"fc2_weight: expected \[out, 6\], got \[2, 5\]"),
        ({"fc2_bias": torch.zeros(6)}, ValueError, r"fc2_bias: expected \[2\], got \[6\]"),
        ({"fc2_weight": None}, ValueError, r"fc2_bias: expected None without fc2_weight, got \[2\]"),
        ({"training": False, "running_var": None}, ValueError, r"running_var: expected tensors .* got None"),
        ({"x": torch.zeros(1, 3, 5, 7)}, ValueError, r"x: expected at least 2 samples in training .* got 1"),
        (
            {"fc2_bias": torch.zeros(2, dtype=torch.float64)},
            TypeError,
            r"fc2_bias: expected the dtype of fc1_weight, torch\.float32, got torch\.float64",
        ),
        (
            {"running_mean": torch.zeros(6, dtype=torch.bfloat16)},
            TypeError,
            r"running_mean: expected the dtype of fc1_weight, torch\.float32, got torch\.bfloat16",
        ),
        (
            {"bn_weight": torch.ones(6, device="meta")},
            ValueError,
            "bn_weight: expected the device of fc1_weight, cpu, got meta",
        ),
        (
            {"x": torch.zeros(4, 3, 5, 7, device="meta")},
            ValueError,
            "x: expected the device of fc1_weight, cpu, got meta",
        ),
        ({"window": "soft"}, ValueError, r"window: expected one of clipped, restoring, identity, got 'soft'"),
        ({"impl": "cuda"}, ValueError, r"impl: expected one of auto, triton, torch, got 'cuda'"),
    ],
)
def test_bad_arguments_say_expected_and_got(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gate_head(**{**GOOD, **change})


def test_an_explicit_triton_request_that_cannot_be_honoured_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"gate_head: impl requests 'triton'.*use 'auto' or 'torch'"):
        gate_head(**GOOD, impl="triton")


def test_the_environment_overrides_auto_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("FASTGATE_IMPL", "triton")
    with pytest.raises(ValueError, match="environment variable FASTGATE_IMPL requests 'triton'"):
        gate_head(**GOOD)
    gate_head(**GOOD, impl="torch")
    with pytest.raises(ValueError, match="FASTGATE_IMPL"):
        fg.LayerGate(3)(torch.zeros(4, 3, 5, 7))
    monkeypatch.setenv("FASTGATE_IMPL", "torch")
    gate_head(**GOOD)
    # empty is unset, as a shell's `FASTGATE_IMPL= command` means it
    monkeypatch.setenv("FASTGATE_IMPL", "")
    gate_head(**GOOD)
    monkeypatch.setenv("FASTGATE_IMPL", "fast")
    with pytest.raises(ValueError, match="FASTGATE_IMPL: expected one of auto, triton, torch, got 'fast'"):
        gate_head(**GOOD)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_device_outputs_and_gradients_equal_the_cpu(case: Case) -> None:
    x, parameters, running = make_inputs(case)
    tensors = {"x": x, **{name: t for name, t in parameters.items() if t is not None}}
    results = []
    for device in ("cpu", "cuda"):
        leaves = {name: t.detach().to(device).requires_grad_() for name, t in tensors.items()}
        statistics = {name: t.clone().to(device) for name, t in running.items()}
        decisions, logits = gate_head(training=case.training, **{**dict.fromkeys(PARAMETERS), **leaves}, **statistics)
        (decisions.sum() + logits.square().sum()).backward()
        results.append([decisions, logits, *(t.grad for t in leaves.values()), *statistics.values()])
    for wanted, got in zip(*results, strict=True):
        # fp64, the sums split differently
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-10, atol=1e-10)
