"""MACs by hand: every way in which PyTorch multiplies matrices, and what cannot be counted is named."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils import flop_counter

import fastgate as fg
from fastgate.pruning.counting import count_macs


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


attention = F.scaled_dot_product_attention
Q, K, V = zeros(2, 4, 8, 16), zeros(2, 4, 6, 16), zeros(2, 4, 6, 5)
TOKENS = zeros(2, 5, 8)
LSTM, ENCODER = 4 * 4 * (3 + 4), 4 * 8 * 8 + 2 * 8 * 12
PACKED = nn.utils.rnn.pack_sequence([zeros(5, 3), zeros(2, 3)])

PRODUCTS = [
    # (name, what multiplies, its inputs, MACs)
    ("linear", nn.Linear(4, 5), zeros(2, 3, 4), 2 * 3 * 4 * 5),
    ("linear-vector", nn.Linear(4, 5), zeros(4), 4 * 5),
    ("mm", torch.mm, (zeros(3, 4), zeros(4, 5)), 60),
    ("bmm", torch.bmm, (zeros(2, 3, 4), zeros(2, 4, 5)), 120),
    ("baddbmm", torch.baddbmm, (zeros(2, 3, 5), zeros(2, 3, 4), zeros(2, 4, 5)), 120),
    ("addbmm", torch.addbmm, (zeros(3, 5), zeros(2, 3, 4), zeros(2, 4, 5)), 120),
    ("matmul-broadcast", torch.matmul, (zeros(2, 1, 3, 4), zeros(6, 4, 5)), 2 * 6 * 60),
    ("mv", torch.matmul, (zeros(3, 4), zeros(4)), 12),
    ("batch-by-vector", torch.matmul, (zeros(2, 3, 4), zeros(4)), 24),
    ("addmv", torch.addmv, (zeros(3), zeros(3, 4), zeros(4)), 12),
    ("dot", torch.dot, (zeros(4), zeros(4)), 4),
    ("einsum", lambda a, b: torch.einsum("bij,bjk->bik", a, b), (zeros(2, 3, 4), zeros(2, 4, 5)), 120),
    ("einsum-heads", lambda a, b: torch.einsum("nthd,nshd->nhts", a, b), (zeros(2, 3, 4, 5), zeros(2, 6, 4, 5)), 720),
    ("tensordot", lambda a, b: torch.tensordot(a, b, 1), (zeros(3, 4), zeros(4, 5)), 60),
    ("bilinear", nn.Bilinear(3, 4, 5), (zeros(2, 3), zeros(2, 4)), 2 * 3 * 4 * 5),
    ("integers", torch._int_mm, (zeros(32, 16, dtype=torch.int8), zeros(16, 8, dtype=torch.int8)), 32 * 16 * 8),
    ("conv1d", nn.Conv1d(2, 3, 2), zeros(1, 2, 5), 4 * 2 * 3 * 2),
    ("conv3d", nn.Conv3d(2, 3, 2), zeros(1, 2, 5, 5, 5), 64 * 2 * 3 * 8),
    ("grouped", nn.Conv2d(4, 6, 3, groups=2, padding="same"), zeros(1, 4, 5, 5), 25 * 6 * 2 * 9),
    ("depthwise", nn.Conv2d(4, 4, 3, groups=4), zeros(2, 4, 5, 5), 2 * 9 * 4 * 9),
    ("transposed", nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), zeros(1, 4, 5, 5), 25 * 4 * 3 * 9),
    ("conv-tbc", torch.conv_tbc, (zeros(5, 2, 3), zeros(2, 3, 4), zeros(4)), 4 * 2 * 2 * 3 * 4),
    # scores [8, 6] over 16, their product with values of 5, in 8 heads
    ("attention", attention, (Q, K, V), 8 * (8 * 6 * 16 + 8 * 6 * 5)),
    ("attention-masked", lambda q: attention(q, q, q, is_causal=True), (Q,), 8 * (8 * 8 * 32)),
    ("attention-by-mask", lambda q: attention(q, q, q, attn_mask=torch.ones(8, 8)), (Q,), 8 * (8 * 8 * 32)),
    ("attention-3d", attention, (Q[0], Q[0], Q[0]), 4 * (8 * 8 * 32)),
    ("attention-grouped", lambda q, k: attention(q, k, k, enable_gqa=True), (Q, Q[:, :2]), 8 * (8 * 8 * 32)),
    # four projections of 10 tokens; scores and values in 2 heads of 4
    ("multihead", nn.MultiheadAttention(8, 2, batch_first=True), (TOKENS,) * 3, 10 * 4 * 64 + 2 * 2 * 25 * 8),
    ("encoder", nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), TOKENS, 10 * ENCODER + 2 * 2 * 25 * 8),
    ("lstm", nn.LSTM(3, 4), zeros(5, 2, 3), 10 * LSTM),
    ("lstm-deep", nn.LSTM(3, 4, 2, bidirectional=True), zeros(5, 2, 3), 10 * 2 * (LSTM + 4 * 4 * (8 + 4))),
    ("lstm-projected", nn.LSTM(3, 4, proj_size=2), zeros(5, 2, 3), 10 * (16 * 3 + 16 * 2 + 4 * 2)),
    ("lstm-packed", nn.LSTM(3, 4), PACKED, 7 * LSTM),
    ("lstm-double", nn.LSTM(3, 4).double(), zeros(5, 2, 3, dtype=torch.float64), 10 * LSTM),
    ("gru", nn.GRU(3, 4, batch_first=True), zeros(5, 2, 3), 10 * 3 * 4 * 7),
    ("rnn", nn.RNN(3, 4), zeros(5, 2, 3), 10 * 4 * 7),
    ("lstm-cell", nn.LSTMCell(3, 4), zeros(5, 3), 5 * LSTM),
    # what is no product: nothing, and no warning
    ("embedding", nn.Embedding(5, 3), zeros(2, 2, dtype=torch.long), 0),
    ("interpolation", nn.Upsample(scale_factor=2, mode="bilinear"), zeros(1, 2, 4, 4), 0),
    ("pool-and-norm", nn.Sequential(nn.AvgPool2d(2), nn.GroupNorm(1, 2), nn.Softmax(1)), zeros(1, 2, 4, 4), 0),
    ("normalize", F.normalize, (zeros(3, 3),), 0),
    ("boxes", torchvision.ops.nms, (zeros(1, 4), zeros(1), 0.5), 0),
]


@pytest.mark.parametrize(("network", "inputs", "macs"), [pytest.param(*case, id=name) for name, *case in PRODUCTS])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("guard", [torch.enable_grad, torch.inference_mode])
def test_macs_by_hand(network: Any, inputs: Any, macs: int, guard: Callable[[], Any]) -> None:
    model = network if isinstance(network, nn.Module) else Function(network)
    with warnings.catch_warnings(), guard():
        warnings.filterwarnings("error", message="the MACs of these operations")
        assert fg.macs(model, inputs) == macs


def test_a_compiled_network_counts_as_the_plain_one() -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("a count needs no compilation")

    plain = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fg.macs(torch.compile(plain, backend=refuse), zeros(2, 4)) == 40


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda model: torch.jit.trace(model, zeros(2, 4))])
def test_torchscript_counts_as_the_plain_network(compiled: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(compiled(nn.Sequential(nn.Linear(4, 5), nn.ReLU())), nn.Linear(5, 2))
    count = count_macs(model, zeros(2, 4))
    assert count.total == 40 + 20 == count.calls[None, model]


def test_fused_layers_are_fused_again_after_the_count() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    fg.macs(layer, TOKENS)
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(AssertionError):
        fg.macs(layer, zeros(2, 5, 3))
    assert torch.backends.mha.get_fastpath_enabled() and not any(m._forward_hooks for m in layer.modules())


@pytest.mark.parametrize(
    ("network", "inputs", "operation"),
    [
        pytest.param(torch.fft.rfft, zeros(8), "aten::_fft_r2c", id="fft"),
        pytest.param(torch.linalg.inv, torch.eye(3), "aten::linalg_inv_ex", id="inverse"),
        pytest.param(torch.cdist, (zeros(3, 4), zeros(5, 4)), "aten::_cdist_forward", id="distances"),
        pytest.param(torch.sparse.mm, (torch.eye(4).to_sparse(), zeros(4, 5)), "aten::_sparse_addmm", id="sparse"),
        pytest.param(lambda x: F.linear(x.to_mkldnn(), x.to_mkldnn()), zeros(2, 4), "aten::mkldnn_linear", id="oneDNN"),
        pytest.param(
            torchvision.ops.DeformConv2d(2, 3, 3),
            (zeros(1, 2, 5, 5), zeros(1, 18, 3, 3)),
            "torchvision::deform_conv2d",
            id="library",
        ),
    ],
)
def test_what_cannot_be_counted_is_named(network: Any, inputs: Any, operation: str) -> None:
    model = network if isinstance(network, nn.Module) else Function(network)
    with pytest.warns(UserWarning, match=rf"the MACs of these operations are not counted: .*{operation} \(1x\); if"):
        assert fg.macs(model, inputs) == 0


def test_quantized_layers_are_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but in use
        model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), {nn.Linear})
    with pytest.warns(UserWarning, match=r"quantized::linear_dynamic \(2x\)"):
        fg.macs(model, zeros(2, 4))


def test_an_operator_of_ones_own_is_named_until_it_has_a_formula() -> None:
    @torch.library.custom_op("fastgate_test::triple", mutates_args=())
    def triple(x: Tensor) -> Tensor:
        return 3 * x

    model = nn.Sequential(Function(triple), nn.Linear(4, 5))
    with pytest.warns(UserWarning, match=r"fastgate_test::triple \(1x\); .*register_flop_formula"):
        assert fg.macs(model, zeros(2, 4)) == 40
    flop_counter.register_flop_formula(torch.ops.fastgate_test.triple)(lambda x, **_: 2 * x[0] * x[1])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert fg.macs(model, zeros(2, 4)) == 8 + 40
    finally:
        del flop_counter.flop_registry[torch.ops.fastgate_test.triple]


def test_the_formula_of_cudnn_is_that_of_the_cpu() -> None:
    """By its shapes: on a CPU the operation does not run."""
    from fastgate.pruning.counting import _formulas

    formula = _formulas()[torch.ops.aten._cudnn_rnn]
    weights = [tuple(parameter.shape) for parameter in nn.LSTM(3, 4, 2, bidirectional=True).parameters()]
    assert formula((5, 2, 3), weights, 4, None, out_shape=None) == 2 * 10 * 2 * (LSTM + 4 * 4 * (8 + 4))


@pytest.mark.gpu
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_on_a_device(layer: type[nn.Module]) -> None:
    model = layer(3, 4, 2, bidirectional=True)
    expected = fg.macs(model, zeros(5, 2, 3))
    assert fg.macs(model.cuda(), zeros(5, 2, 3)) == expected > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_on_a_device(dtype: torch.dtype) -> None:
    model = Function(lambda q: attention(q, q, q))
    assert fg.macs(model, zeros(2, 4, 8, 16, dtype=dtype).cuda()) == 8 * (8 * 8 * 32)


def test_our_convolution_kernel_counts_as_with_everything_open() -> None:
    pytest.importorskip("triton")
    gate = torch.tensor([[1.0, 0.0, 1.0, 1.0]])

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return fg.functional.gated_conv2d(x, weight, in_gate=gate.to(x.device), padding=1, impl="triton")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = (zeros(2, 4, 6, 6).to(device), zeros(5, 4, 3, 3).to(device))
    assert fg.macs(Function(convolve), inputs) == 2 * 36 * 5 * 4 * 9


def test_a_module_counts_where_it_is_called() -> None:
    """One layer in two places, called by name and through a container that is never called itself."""

    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4)
            self.first = nn.Sequential(self.shared, nn.ReLU())
            self.layers = nn.ModuleList([nn.Linear(4, 3)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](self.shared(self.first(x)))

    model = Places()
    count = count_macs(model, zeros(1, 4))
    assert count.total == 2 * 16 + 12 == count.calls[None, model]
    assert count.calls[model.first, model.shared] == 16 == count.calls[model, model.shared]
    assert count.calls[model, model.first] == 16 and count.calls[model, model.layers[0]] == 12
    # a function that calls parts only
    parts = count_macs(model, zeros(1, 4), lambda model, x: model.layers[0](x))
    assert parts.total == 12 == parts.calls[None, model.layers[0]]
