"""Counts the multiply-adds of a forward pass, operation by operation, while it runs."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastgate.gates import named_gates
from fastgate.pruning.probe import open_for_probing
from fastgate.values import Forward, call

# names of PyTorch operations that multiply matrices or do comparable work; interpolation (upsample_bilinear2d),
# pooling, norms and elementwise operations do not
_PRODUCT = re.compile(
    r"mm($|_)|mv($|_)|(^|_)v?dot($|_)|matmul|conv(?!ert)|(^|_)(tri)?linear($|_)|attention|rnn|lstm|gru"
    r"|^_fft_|linalg|cholesky|solve|inverse|svd|geqrf|ormqr|cdist|pdist|euclidean_dist"
)
# names that match but are not products; the products of fused cells are separate operations
_NO_PRODUCT = re.compile(r"vector_norm|linalg_cross|powsum|check_errors|flatten_weight|reorder|fused_\w+_cell")
# operators of these libraries are classified by name; ours have formulas or belong to gates
_KNOWN = ("aten", "prim", "prims", "fastgate", "c10d", "_c10d_functional", "profiler")
_FREE = ("torchvision::nms", "torchvision::roi_align", "torchvision::roi_pool", "torchvision::ps_roi_align")


class MacCount:
    """Multiply-adds of one forward pass.

    Attributes:
        total: multiply-adds of the whole network, without gates.
        calls: (caller, module) -> multiply-adds of the module in calls by the caller; None calls the outermost module.
    """

    def __init__(self) -> None:
        self.total = 0
        self.calls: Counter[tuple[nn.Module | None, nn.Module]] = Counter()


def count_macs(model: nn.Module, inputs: Any, forward: Forward | None = None) -> MacCount:
    """Count the multiply-adds of a network on these inputs, in eval mode with every gate open.

    Uses PyTorch's `FlopCounterMode`, with additional formulas for operations that it leaves out. A warning names
    operations without a formula that multiply matrices or are unknown, such as quantized ones. Operations that bypass
    PyTorch's dispatcher, such as directly launched Triton kernels, cannot be counted.
    """
    found = MacCount()
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    uncounted = _Uncounted(counter.flop_registry)
    running: list[tuple[nn.Module, int]] = []

    # hooks instead of the counter's own attribution by name, which knows only one name of a shared module and starts at
    # the module that is called first
    def enter(module: nn.Module, _: Any) -> None:
        running.append((module, counter.get_total_flops()))

    def leave(*_: Any) -> None:
        module, before = running.pop()
        found.calls[running[-1][0] if running else None, module] += (counter.get_total_flops() - before) // 2

    # on the fast path, attention and encoder layers are single operations in eval mode; without it, parts are counted
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        # torch.compile warns about the counter's global hooks; nothing is compiled under the counter
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".* when there are global hooks")
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # does not support hooks: its operations count for its caller
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(open_for_probing(model))
        # the outer mode sees operations after the counter has decomposed them
        stack.enter_context(uncounted)
        stack.enter_context(counter)
        call(model, inputs, forward)
    gates = {gate for _, gate in named_gates(model)}
    in_gates = sum(count for (_, module), count in found.calls.items() if module in gates)
    found.total = counter.get_total_flops() // 2 - in_gates
    if uncounted.names:
        warnings.warn(
            "the MACs of these operations are not counted: "
            f"{', '.join(f'{name} ({times}x)' for name, times in uncounted.names.items())}; if they have any, "
            "register a formula with torch.utils.flop_counter.register_flop_formula()",
            UserWarning,
            stacklevel=3,
        )
    return found


class _Uncounted(TorchDispatchMode):
    """Records operations without a formula that multiply matrices, or may do so."""

    def __init__(self, formulas: dict[Any, Any]) -> None:
        super().__init__()
        self.formulas = formulas
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.OpOverload) and func.overloadpacket not in self.formulas:
            name = func.name().partition(".")[0]
            library, _, operation = name.partition("::")
            product = _PRODUCT.search(operation) is not None and _NO_PRODUCT.search(operation) is None
            if product if library in _KNOWN else name not in _FREE:
                self.names[name] += 1
        return func(*args, **(kwargs or {}))


def _formulas() -> dict[Any, Callable[..., int]]:
    """FLOP formulas (two per multiply-add) for operations that `FlopCounterMode` leaves out, and for all attention."""
    aten = torch.ops.aten
    attention = (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
        aten._scaled_dot_product_fused_attention_overrideable,
    )
    return {
        **dict.fromkeys((aten.mv, aten.dot, aten.vdot, aten._int_mm), _product),
        **dict.fromkeys((aten.addmv, aten.addbmm, aten._addmm_activation), _added_product),
        **dict.fromkeys((aten.conv_tbc, torch.ops.fastgate.gated_conv_fwd), _convolution),
        **dict.fromkeys(attention, _attention),
        aten._trilinear: _trilinear,
        aten.mkldnn_rnn_layer: lambda x, *weights, **_: _recurrent(x, weights[:2]),
        aten._cudnn_rnn: lambda x, weights, *_, **__: _recurrent(x, weights),
    }


# Formulas take the operation's arguments, with tensors replaced by their shapes, and `out_shape`.
Shape = Sequence[int]


def _product(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    """(Batches of) matrices or vectors: every entry of the first times every column of the second."""
    return 2 * prod(a) * (b[-1] if len(b) > 1 else 1)


def _added_product(_: Shape, a: Shape, b: Shape, *__: Any, **___: Any) -> int:
    return _product(a, b)


def _convolution(_: Shape, weight: Shape, *__: Any, out_shape: Shape, **___: Any) -> int:
    """Every output times the weights that it sums over: `[O, I, H, W]`, with everything open, or `[T, I, O]`."""
    outputs = weight[0] if len(weight) == 4 else weight[-1]
    return 2 * prod(out_shape) * (prod(weight) // outputs)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores and their product with the values, `[N, heads, T, D]`; masked positions count too."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(x: Shape, weights: Sequence[Shape]) -> int:
    """Each matrix once per step and sample: x is `[T, N, F]`, or `[steps, F]` if packed."""
    return 2 * prod(x[:-1]) * sum(prod(weight) for weight in weights if len(weight) == 2)


def _trilinear(a: Shape, b: Shape, c: Shape, *expand: Any, **_: Any) -> int:
    """One multiply-add per entry of the product of all three: in `nn.Bilinear`, one per weight and sample."""
    shapes = [list(shape) for shape in (a, b, c)]
    for shape, dims in zip(shapes, expand[:3], strict=True):
        for dim in sorted(dims):
            shape.insert(dim, 1)
    return 2 * prod(torch.broadcast_shapes(*shapes))
