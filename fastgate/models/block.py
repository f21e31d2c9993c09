"""The residual block used by all networks here: with a gate, without one, and after compaction."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgate import functional
from fastgate.gates import Gate, LayerGate, named_gates
from fastgate.models.cuts import check_cut, check_size, runs_as
from fastgate.models.gated import GatedModule, has_gates
from fastgate.models.hooks import has_call_hooks
from fastgate.ops.dispatch import requested_impl, transforms_active
from fastgate.ops.gated_conv import take

# a torch.fx Proxy does not know the memory format that `take` queries
torch.fx.wrap("take")

POSITIONS = ("middle", "before", "after")

# minimum batch size at which closed outputs of a convolution are skipped: for smaller batches the overhead is larger
# (with one image a frozen ResNet-20 took 2.8 times as long as the plain one)
_BATCH_WORTH_CUTTING = 16


class ResidualBlock(nn.Module):
    """y = activation(shortcut(x) + gate * branch(x)), the branch a chain of named child modules.

    A layer gate decides from x and multiplies the branch's result. A channel gate decides from the features that it
    multiplies: before branch module number `gate_at`, or after the whole branch if `gate_at` is its length.

    Args:
        modules: the children by name, in registration order.
        branch: names of the children that form the branch, in the order they run; a name may occur twice (a ReLU).
        shortcut: name of the child on the shortcut; None for the identity.
        activation: name of the child applied to the sum; None for no activation.
        gate: a layer gate, a channel gate, or None.
        gate_at: position of a channel gate; ignored otherwise.
    """

    # TorchScript treats these as constants, and need not compile `own_gate`
    __jit_unused_properties__ = ("own_gate",)
    __constants__ = ("activation_name", "branch", "gate_at", "shortcut_name")

    in_index: Tensor | None
    out_index: Tensor | None
    mixes_samples = False  # set by attach() if a sample's result in eval mode depends on the other samples

    def __init__(
        self,
        modules: dict[str, nn.Module],
        branch: Sequence[str],
        shortcut: str | None,
        activation: str | None,
        *,
        gate: Gate | None = None,
        gate_at: int = 0,
    ) -> None:
        super().__init__()
        self.branch = list(branch)
        self.shortcut_name = shortcut
        self.activation_name = activation
        self.gate_at = gate_at
        for name, module in modules.items():
            self.add_module(name, module)
        self.gate = gate
        # set by compaction: the channels kept at `gate_at`, and the channels of the sum to which the branch is added
        self.register_buffer("in_index", None)
        self.register_buffer("out_index", None)

    @property
    def own_gate(self) -> Gate | None:
        """The gate, under the name common to all gated modules."""
        return self.gate

    def set_gate(self, gate: Gate | None) -> None:
        """Set the gate, or remove it temporarily with None."""
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block for x `[N, C, H, W]`; in eval mode, closed parts are skipped if that pays off."""
        # separate methods hide the gates from tracers and from TorchScript, which compiles only reachable code
        if self.gate is None:  # noqa: SIM108 (TorchScript leaves out the other branch of a statement only)
            y = self._forward_plain(x)
        else:
            y = self._forward_gated(x)
        return y

    def _forward_plain(self, x: Tensor) -> Tensor:
        """Compute the block without a gate, as built or as compacted, with operations that every exporter supports."""
        shortcut = x if self.shortcut_name is None else self._run_child(self.shortcut_name, x)
        in_index, out_index = self.in_index, self.out_index
        y = x
        for i, name in enumerate(self.branch):
            if i == self.gate_at and in_index is not None:
                y = take(y, in_index, 1)
            y = self._run_child(name, y)
        y = shortcut + y if out_index is None else shortcut.index_add(1, out_index, y.to(shortcut.dtype))
        return y if self.activation_name is None else self._run_child(self.activation_name, y)

    def _run_child(self, name: str, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            # TorchScript supports getattr with literals only, and unrolls this loop
            for child_name, child in self.named_children():
                if child_name == name:
                    return child(x)
            return x
        return getattr(self, name)(x)

    def _forward_gated(self, x: Tensor) -> Tensor:
        # the decision comes first: a branch that begins with an in-place ReLU changes x
        decision = self.gate(x) if isinstance(self.gate, LayerGate) else None
        shortcut = x if self.shortcut_name is None else getattr(self, self.shortcut_name)(x)
        if decision is not None and self._may_gather(decision):
            samples = decision.flatten().nonzero().flatten()
            if len(samples) < len(x) and not decision.sum().isnan():
                return self._activate(self._add_open(shortcut, x, samples))
        y = self._run_branch(x, decision)
        activation = None if self.activation_name is None else getattr(self, self.activation_name)
        relu = activation is not None and runs_as(activation, nn.ReLU) and not has_call_hooks(activation)
        if decision is None and self.gate is not None and self.gate_at == len(self.branch):
            decision = self.gate(y)
        if self.gate is not None and decision is not None:
            y = functional.gated_residual(shortcut, y, decision, relu=relu, impl=self.gate.impl)
            return y if relu else self._activate(y)
        return self._activate(shortcut + y)

    def _activate(self, y: Tensor) -> Tensor:
        activation: Tensor = y if self.activation_name is None else getattr(self, self.activation_name)(y)
        return activation

    def _run_branch(self, x: Tensor, decision: Tensor | None) -> Tensor:
        """Compute the branch for every sample; `decision` is a layer gate's, which the caller also applies."""
        # in eval mode, channels closed by a frozen gate and closed samples need not be computed
        unread: dict[str, Tensor] = {}
        if self.gate is not None and self._in_eval():
            cuts = decision is None and self.gate.known_frozen and not self.gate.known_all_open and self._cut_outputs()
            if cuts and len(x) >= _BATCH_WORTH_CUTTING:
                unread[self._cut_outputs()] = self.gate.stored.to(x.dtype)[None]
            elif decision is not None and requested_impl(self.gate.impl)[0] == "triton":
                unread = dict.fromkeys((name for _, name, _ in self.branch_convs()), decision)
        y = x
        for i, name in enumerate(self.branch):
            mask = None
            if i == self.gate_at and self.gate is not None and not isinstance(self.gate, LayerGate):
                # one row of a frozen gate's decisions: the same for the whole batch
                mask = self.gate(y)[:1] if self.gate.known_frozen else self.gate(y)
                if self.gate.known_all_open:
                    mask = None  # bit-identical to the plain network: a separately added bias may round differently
            y = self._run(name, y, mask, unread.get(name))
        return y

    def _run(self, name: str, y: Tensor, in_gate: Tensor | None, out_gate: Tensor | None) -> Tensor:
        """Run one module of the branch on gated input; outputs closed by `out_gate` are never read."""
        module = getattr(self, name)
        if self.gate is None or (in_gate is None and out_gate is None):
            return module(y)
        if not _is_plain_conv(module):
            return module(y if in_gate is None else y * in_gate)
        y = functional.gated_conv2d(
            y, module.weight, in_gate=in_gate, out_gate=out_gate, stride=module.stride[0], padding=module.padding[0],
            impl=self.gate.impl,
        )  # fmt: skip
        return y if module.bias is None else y + module.bias.to(y.dtype)[:, None, None]

    def _cut_outputs(self) -> str:
        """Name of the convolution whose outputs a channel gate closes; "" if there is none or others read them too."""
        try:
            self.cut_with_gate()
        except ValueError:
            return ""  # a module on the way to the gate, such as a group norm, mixes channels
        return next((name for name, _, dim in self.cut_convs() if dim == 0), "")

    def _in_eval(self) -> bool:
        """Whether the branch computes each sample independently, so that closed ones can be skipped."""
        return not (self.training or self.mixes_samples or any(_mixes(getattr(self, name)) for name in self.branch))

    def _may_gather(self, decision: Tensor) -> bool:
        """Whether to run the branch on the open samples only, which requires their values: on a CPU, for constants."""
        return not (
            decision.requires_grad
            or decision.device.type != "cpu"
            or torch.jit.is_tracing()
            or torch.compiler.is_compiling()
            or transforms_active()
            or getattr(getattr(self, self.branch[0]), "inplace", False)  # changes the shortcut of every sample
            or not self._in_eval()
            or any(has_gates(getattr(self, name)) for name in self.branch)  # inner gates decide for every sample
        )

    def _add_open(self, shortcut: Tensor, x: Tensor, samples: Tensor) -> Tensor:
        """The sum of shortcut and branch, with the branch computed for these samples only."""
        if len(samples) == 0:
            return shortcut.clone()  # the activation may work in place
        y = self._run_branch(take(x, samples, 0), None)
        return shortcut.index_add(0, samples, y.to(shortcut.dtype))

    def branch_convs(self) -> list[tuple[int, str, nn.Conv2d]]:
        """The branch's convolutions as (index in the branch, name, module), in the order they run."""
        found = []
        for i, name in enumerate(self.branch):
            module = getattr(self, name)
            if isinstance(module, nn.Conv2d):
                found.append((i, name, module))
        return found

    def cut_convs(self) -> list[tuple[str, nn.Conv2d, int]]:
        """The convolutions cut by a channel gate at `gate_at`, as (name, module, weight dimension).

        Dimension 0 (outputs) of the last convolution before the gate, dimension 1 (inputs) of the first one after it;
        at the branch's start or end there is only one of them.
        """
        before = [(name, conv, 0) for at, name, conv in self.branch_convs() if at < self.gate_at]
        behind = [(name, conv, 1) for at, name, conv in self.branch_convs() if at >= self.gate_at]
        return before[-1:] + behind[:1]

    def cut_with_gate(self) -> list[str]:
        """The branch's modules between the convolution whose outputs the gate cuts and the gate itself.

        Raises:
            ValueError: one of them is neither a batch norm nor an elementwise operation and cannot be cut.
        """
        cut = self.cut_convs()
        if not cut or cut[0][2] != 0:
            return []
        names = self.branch[self.branch.index(cut[0][0]) + 1 : self.gate_at]
        for name in names:
            check_cut(name, getattr(self, name))
        return names

    def check_cut(self, shared: set[nn.Module]) -> None:
        """Raise ValueError unless everything that the gate cuts can be cut exactly and is used nowhere else.

        Args:
            shared: modules used in several places of the network, or with tensors that are.
        """
        # if convolutions were wrapped or fused after attaching gates, there may be none left to cut
        behind = getattr(self, self.branch[self.gate_at]) if self.gate_at < len(self.branch) else None
        if not isinstance(behind, nn.Conv2d) and (behind is not None or not self.cut_convs()):
            found = "none" if behind is None else f"{type(behind).__name__} {self.branch[self.gate_at]!r}"
            raise ValueError(
                f"expected an nn.Conv2d whose channels the gate closes, got {found}; wrap or fuse modules of the "
                "compact network, or use gating='layer'"
            )
        between = self.cut_with_gate()
        for name, conv, _ in self.cut_convs():
            check_cut(name, conv)
            if conv.groups != 1:
                raise ValueError(
                    f"a channel gate there would cut {name!r}, a grouped convolution, which is not supported; use "
                    "another position or gating='layer'"
                )
        runs = [getattr(self, name) for name in self.branch]
        for name in (*between, *(name for name, _, _ in self.cut_convs())):
            module = getattr(self, name)
            if (module._parameters or module._buffers) and (module in shared or runs.count(module) > 1):
                raise ValueError(
                    f"cannot cut the channels of {type(module).__name__} {name!r}: the module or one of its tensors is "
                    "also used elsewhere in the network; use a separate module in each place, or gating='layer'"
                )

    def gone_when_empty(self) -> list[str]:
        """The branch's modules that only feed the convolution after the gate, and are unused if no channel is left.

        Raises:
            ValueError: it is not known how one of them, or that convolution, changes the size of feature maps.
        """
        behind = next(name for name, _, dim in self.cut_convs() if dim == 1)
        start = 0 if len(self.cut_convs()) == 2 else self.gate_at
        names = self.branch[start : self.branch.index(behind)]
        for name in (*names, behind):
            check_size(name, getattr(self, name))
        return names

    def extra_repr(self) -> str:
        """One line: the chain of the branch, the shortcut and the activation."""
        return f"{' -> '.join(self.branch)}, shortcut={self.shortcut_name}, activation={self.activation_name}"


# modules that hold a gate
Gated = ResidualBlock | GatedModule


def gated_blocks(model: nn.Module) -> dict[str, Gated]:
    """The module that holds each gate, by the gate's name.

    Raises:
        ValueError: a gate outside a residual block of this library, whose computation is unknown.
    """
    blocks: dict[str, Gated] = {}
    for name, gate in named_gates(model):
        parent = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(parent, Gated) or parent.own_gate is not gate:
            raise ValueError(
                f"gate {name!r}: expected it in a residual block gated by fastgate.attach(), got it in "
                f"{type(parent).__name__}; declare that class with fastgate.register_block() and attach the gates"
            )
        blocks[name] = parent
    return blocks


def _mixes(module: nn.Module) -> bool:
    """Whether a module or a submodule uses batch statistics: in training mode, or without running statistics."""
    return (
        module.training
        or "observer_enabled" in module._buffers  # torch.ao.quantization.FakeQuantize
        or (isinstance(module, nn.modules.batchnorm._BatchNorm) and module._buffers.get("running_mean") is None)
        or any(_mixes(child) for child in module._modules.values() if child is not None)
    )


def _is_plain_conv(module: nn.Module) -> bool:
    """Whether `functional.gated_conv2d` can replace a call of the module, which must not have hooks."""
    return (
        type(module) is nn.Conv2d
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and tuple(module.dilation) == (1, 1)
        and len({*module.stride}) == len({*module.padding}) == 1
        and "forward" not in vars(module)
        and not has_call_hooks(module)
    )


class PadShortcut(nn.Module):
    """The parameter-free shortcut of CIFAR ResNets (He et al., option A): subsample and pad with zero channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, ceil(H / stride), ceil(W / stride)]."""
        x = x[:, :, :: self.stride, :: self.stride]
        low = (self.out_channels - self.in_channels) // 2
        return nn.functional.pad(x, (0, 0, 0, 0, low, self.out_channels - self.in_channels - low))


class EmptyConv2d(nn.Module):
    """Replaces a chain of convolutions whose last one has no input channels: returns its bias, or zeros.

    Args:
        out_channels: channels of the result.
        geometry: (kernel_size, stride, padding, dilation) of each replaced convolution, for the output size.
        bias: whether there is a bias.
    """

    def __init__(self, out_channels: int, geometry: Sequence[Sequence[Any]], bias: bool) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.geometry = [[list(pair) for pair in conv] for conv in geometry]
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, out_channels, H', W']."""
        size = [x.shape[2], x.shape[3]]
        for kernel, stride, padding, dilation in self.geometry:
            size = [(size[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(2)]
        y = x.new_zeros(x.shape[0], self.out_channels, size[0], size[1])
        return y if self.bias is None else y + self.bias.to(x.dtype)[:, None, None]
