"""The kernel in Triton's interpreter (on a GPU: as compiled) against the fp64 meaning."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastgate.functional import gate_head
from tests.kernels.compare import assert_close_to_oracle, poisoned_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """One head on one shape."""

    shape: tuple[int, int, int, int]
    out: int
    hidden: int = 16
    training: bool = True
    channels_last: bool = False
    window: str = "restoring"
    pooled: bool = False
    bare: bool = False  # no biases, no affine batch norm


CASES = [
    pytest.param(Case((5, 3, 4, 5), 1), id="layer"),
    pytest.param(Case((5, 3, 4, 5), 1, training=False, channels_last=True), id="layer-eval-channels-last"),
    # in training one channel or two samples would leave no gradient behind batch norm, and rounding alone to compare
    pytest.param(Case((1, 1, 1, 1), 1, hidden=1, training=False), id="one-of-everything-eval"),
    pytest.param(Case((5, 3, 1, 1), 1), id="one-pixel"),
    pytest.param(Case((4, 70, 3, 3), 70, hidden=5), id="several-blocks-of-channels"),
    pytest.param(Case((4, 70, 3, 3), 70, hidden=5, channels_last=True), id="several-blocks-of-channels-last"),
    pytest.param(Case((3, 3, 37, 41), 3, window="clipped"), id="several-tiles-of-pixels"),
    pytest.param(Case((6, 17, 3, 5), 9, window="identity", pooled=True), id="pooled-by-the-producer"),
    pytest.param(Case((6, 17, 3, 5), 90), id="several-tiles-of-gates"),
    pytest.param(Case((70, 8, 2, 2), 8), id="one-large-tile-of-samples"),
    pytest.param(Case((300, 3, 1, 2), 1), id="several-tiles-of-samples-layer"),
    pytest.param(Case((70, 8, 2, 2), 8, hidden=100), id="several-tiles-of-samples-wide"),
    pytest.param(Case((300, 3, 1, 2), 2, training=False), id="several-tiles-of-samples-eval"),
    pytest.param(Case((5, 3, 4, 5), 2, bare=True), id="no-biases-no-affine"),
]


def make(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(leaves, running statistics, upstream gradients), x rounded to the dtype."""
    n, c = case.shape[:2]
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    x = (2 * torch.randn(case.shape, device=DEVICE)).to(dtype).contiguous(memory_format=layout)
    leaves = {"x": x, "fc1_weight": torch.randn(case.hidden, c, device=DEVICE) / c**0.5}
    if not case.bare:
        leaves["fc1_bias"] = torch.randn(case.hidden, device=DEVICE) * 0.3
        leaves["bn_weight"] = torch.rand(case.hidden, device=DEVICE) + 0.5
        leaves["bn_bias"] = torch.randn(case.hidden, device=DEVICE) * 0.3
        leaves["fc2_bias"] = torch.randn(case.out, device=DEVICE) * 0.3
    leaves["fc2_weight"] = torch.randn(case.out, case.hidden, device=DEVICE) / case.hidden**0.5
    running = {
        "running_mean": torch.randn(case.hidden, device=DEVICE) * 0.2,
        "running_var": torch.rand(case.hidden, device=DEVICE) + 0.5,
    }
    upstream = {name: torch.randn(n, case.out, device=DEVICE) for name in ("decisions", "logits")}
    return leaves, running, upstream


def run(impl: str, case: Case, dtype: torch.dtype | None, parts: tuple[dict[str, Tensor], ...]) -> dict[str, Tensor]:
    """Outputs, updated running statistics and every gradient, by name; `dtype` None keeps each tensor's own."""
    leaves, running, upstream = ({k: t.detach().to(dtype or t.dtype) for k, t in part.items()} for part in parts)
    running = {name: tensor.clone() for name, tensor in running.items()}
    leaves = {name: tensor.clone(memory_format=torch.preserve_format) for name, tensor in leaves.items()}
    for tensor in leaves.values():
        tensor.requires_grad_()
    pooled = leaves["x"].mean((2, 3), dtype=leaves["fc1_weight"].dtype) if case.pooled else None
    decisions, logits = gate_head(
        **{"fc1_bias": None, **leaves}, **running, training=case.training, window=case.window, pooled=pooled, impl=impl
    )
    ((decisions * upstream["decisions"]).sum() + (logits * upstream["logits"]).sum()).backward()
    gradients = {f"d{name}": tensor.grad for name, tensor in leaves.items()}
    return {"decisions": decisions.detach(), "logits": logits.detach(), **running, **gradients}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_equals_its_meaning(case: Case, dtype: torch.dtype) -> None:
    parts = make(case, dtype)
    with poisoned_memory():
        kernel = run("triton", case, None, parts)
    plain, oracle = run("torch", case, None, parts), run("torch", case, torch.float64, parts)
    # batch statistics take fc1's bias out again: its gradient is 0, left of terms like those of fc1's weight
    cancels = {"dfc1_bias": "dfc1_weight"} if case.training and not case.bare else {}
    assert_close_to_oracle(kernel, plain, oracle, cancels=cancels)


def test_only_one_of_the_outputs_is_used() -> None:
    case = Case((4, 5, 3, 3), 5)
    parts = make(case, torch.float32)
    for used in ("decisions", "logits"):
        upstream = {name: grad if name == used else torch.zeros_like(grad) for name, grad in parts[2].items()}
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in parts[0].items()}
        running = {name: tensor.clone() for name, tensor in parts[1].items()}
        outputs = dict(
            zip(("decisions", "logits"), gate_head(**leaves, **running, training=True, impl="triton"), strict=True)
        )
        (outputs[used] * upstream[used]).sum().backward()
        expected = run("torch", Case((4, 5, 3, 3), 5, window="clipped"), torch.float64, (*parts[:2], upstream))
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            # fp32 sums over at most 4 x 16 terms of unit order
            torch.testing.assert_close(leaf.grad.double(), expected[f"d{name}"], atol=1e-5, rtol=1e-5, msg=name)


def test_pooled_means_in_another_order() -> None:
    leaves, running, _ = make(Case((4, 5, 3, 3), 5), torch.float32)
    pooled = leaves["x"].mean((2, 3)).t().contiguous().t()
    logits = [
        gate_head(**leaves, **running, training=False, pooled=pooled, impl=impl)[1] for impl in ("triton", "torch")
    ]
    torch.testing.assert_close(*logits)


def test_nan_is_never_closed() -> None:
    """Not by the ReLU of the head either, which would leave a decision by the biases alone."""
    leaves, running, _ = make(Case((5, 3, 2, 2), 3, training=False), torch.float32)
    leaves["x"][1, 0, 0, 0] = torch.nan
    for found in zip(
        *(gate_head(**leaves, **running, training=False, impl=i) for i in ("triton", "torch")), strict=True
    ):
        assert all(values[1].isnan().all() and values.isnan().sum() == 3 for values in found)


def test_twice_gives_the_same_bits() -> None:
    case = Case((9, 33, 5, 5), 33)
    parts = make(case, torch.float32)
    first, second = run("triton", case, None, parts), run("triton", case, None, parts)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_opcheck() -> None:
    leaves, running, _ = make(Case((4, 3, 2, 2), 3), torch.float32)
    values = {**leaves, **running}
    order = (
        "x",
        "fc1_weight",
        "fc1_bias",
        "bn_weight",
        "bn_bias",
        "running_mean",
        "running_var",
        "fc2_weight",
        "fc2_bias",
    )
    arguments = tuple(values[name] for name in order)
    torch.library.opcheck(torch.ops.fastgate.gate_head_fwd.default, (*arguments, True, 0.1, 1e-5))
    outs = torch.ops.fastgate.gate_head_fwd(*arguments, True, 0.1, 1e-5)
    backward = (outs[0], None, *outs[1:], leaves["fc1_weight"], leaves["bn_weight"], leaves["bn_bias"])
    options = (4, True, "clipped")
    torch.library.opcheck(torch.ops.fastgate.gate_head_bwd.default, (*backward, leaves["fc2_weight"], *options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda t: t.double(), "its kernel supports float32 parameters", id="fp64"),
        pytest.param(lambda t: t.half(), "its kernel supports float32 parameters", id="fp16-parameters"),
    ],
)
def test_what_the_kernel_cannot_serve_is_refused(change: object, message: str) -> None:
    leaves, running, _ = make(Case((4, 3, 2, 2), 3), torch.float32)
    values = {name: change(tensor) for name, tensor in (leaves | running).items()}  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        gate_head(**values, training=True, impl="triton")


def test_too_many_hidden_features() -> None:
    leaves, running, _ = make(Case((4, 3, 2, 2), 3, hidden=129), torch.float32)
    with pytest.raises(ValueError, match="its kernel supports up to 128 hidden features, and there are 129"):
        gate_head(**leaves, **running, training=True, impl="triton")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        pytest.param({"fc1_weight": (3, 3)}, "supports heads with two dense layers", id="one-layer"),
        pytest.param({"fc1_weight": (16, 12), "fc2_weight": (3, 16)}, "supports pooled features", id="flattened"),
    ],
)
def test_heads_of_the_papers_ablations_take_the_plain_path(weights: dict[str, tuple], message: str) -> None:
    x = torch.randn(4, 3, 2, 2, device=DEVICE)
    head = {"fc1_bias": None, **{name: torch.randn(shape, device=DEVICE) for name, shape in weights.items()}}
    with pytest.raises(ValueError, match=message):
        gate_head(x, **head, training=True, impl="triton")
    assert gate_head(x, **head, training=True)[0].shape == (4, 3)


def test_the_gradient_of_a_half_precision_map_is_not_written_out() -> None:
    """It is the same for every pixel: a cast after the expansion would write a whole map."""
    leaves, running, upstream = make(Case((4, 5, 3, 3), 1), torch.float16)
    x = leaves.pop("x").requires_grad_()
    logits = gate_head(x, **leaves, **running, training=True, impl="triton")[1]
    (dx,) = torch.autograd.grad(logits, x, upstream["logits"])
    assert dx.dtype == torch.float16 and dx.shape == x.shape
    assert dx.stride()[2:] == (0, 0)
