"""Gate modules: per-sample binary decisions for a residual layer or for its channels.

Method: Zhi et al., "A New Baseline for GreenAI", Table 1 (https://arxiv.org/abs/2302.10798).
"""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastgate import functional
from fastgate.calls import Calls, can_be_recorded
from fastgate.estimators import check_estimator, estimate
from fastgate.ops.dispatch import IMPLEMENTATIONS
from fastgate.ops.gate_head import check_window
from fastgate.ops.means import detach
from fastgate.ops.synchronization import batch_norm_processes, synchronized
from fastgate.transfers import TensorState, Transfer, is_capturing, is_on_host, send_to_host

# value of `Gate.stored` while a gate is live. It is far from 0 and 1, so that averages of model states (an exponential
# moving average, rounded to integers in every step) pass through invalid values; from -1 they converged to 0, closed
LIVE = 127
LIVE_BEFORE = -1  # written by earlier versions

# std of the last layer's weights when init_logit is set: at unit-scale features every logit starts near init_logit,
# inside the window |logit| <= 1, where the straight-through gradient is not cut off
INIT_STD = 0.01


# layers of a gate's head and the forward methods whose computation it reproduces; the tensors that it reads
_HEAD_FORWARDS = {
    "fc1": (nn.Linear.forward,),
    "bn": (nn.BatchNorm1d.forward, nn.SyncBatchNorm.forward),
    "fc2": (nn.Linear.forward,),
}
_COMPUTED = {"weight", "bias"}


class Gate(nn.Module):
    """Base class of layer and channel gates: the head, the decisions of the last forward, and the frozen state.

    Use :class:`LayerGate` or :class:`ChannelGate`.

    In training, the head's batch norm uses batch statistics, over all processes if it has been converted to
    `nn.SyncBatchNorm`. For a single sample these are undefined, so the running statistics are used and not updated.

    A NaN logit gives a NaN decision, so that it never closes a gate silently.

    Attributes:
        logits: logits of the last forward pass, `[N, gates]` (`[N]` for a layer gate), differentiable; None if frozen.
        decisions: decisions of the last forward pass, same shape, 0./1., differentiable.
        calls: the calls that the gate losses cover: every call in training since the last loss.
        detach_input: whether no gradient passes through the head into x. False for a new gate; set by
            :class:`fastgate.GateSearch`, and kept after it.
        stored: int8 buffer `[gates]`, in `state_dict`: 127 while the gate is live, otherwise the frozen decision 0 or
            1. It alone determines whether the gate is frozen, whoever writes it (a checkpoint loader, a broadcast, a
            moving average). On an accelerator a forward does not wait for its values to reach the host: until then it
            uses them on the device. Writes that bypass PyTorch's version counter (`.data`,
            `torch.distributed.broadcast`) freeze or unfreeze the gate at the next `train()` or `eval()`.
    """

    logits: Tensor | None = None
    decisions: Tensor | None = None
    stored: Tensor
    calls: Calls
    detach_input = False
    # state of `stored` when it was last read, as plain bools for forwards that must not wait and for compilers
    _frozen = False
    _all_open = False  # frozen with nothing closed
    _seen: TensorState | None = None
    _transfer: Transfer | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> "Gate":
        """Give every gate its own `calls`, copies and unpickled gates included, which do not call `__init__`."""
        gate = super().__new__(cls)
        gate.__dict__["calls"] = Calls()
        return gate

    def __init__(
        self,
        in_channels: int,
        gates: int,
        hidden_features: int,
        depth: int,
        spatial_size: tuple[int, int] | None,
        estimator: str,
        window: str,
        init_logit: float | None,
        temperature: float,
        impl: str,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("gates", gates), ("hidden_features", hidden_features)):
            if value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if depth not in (1, 2):
            raise ValueError(f"depth: expected 1 or 2 dense layers, got {depth}")
        if temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
        self.in_channels = in_channels
        self.gates = gates
        self.hidden_features = hidden_features
        self.depth = depth
        self.spatial_size = None if spatial_size is None else (int(spatial_size[0]), int(spatial_size[1]))
        self.estimator = check_estimator(estimator)
        self.window = check_window(window)
        self.init_logit = init_logit
        self.temperature = temperature
        self.impl = impl
        in_features = in_channels if spatial_size is None else in_channels * spatial_size[0] * spatial_size[1]
        if depth == 1:
            self.fc1 = nn.Linear(in_features, gates)
        else:
            self.fc1 = nn.Linear(in_features, hidden_features)
            self.bn = nn.BatchNorm1d(hidden_features)
            self.fc2 = nn.Linear(hidden_features, gates)
        if init_logit is not None:
            last = self.fc1 if depth == 1 else self.fc2
            nn.init.normal_(last.weight, std=INIT_STD)
            nn.init.constant_(last.bias, init_logit)
        self.register_buffer("stored", torch.full((gates,), LIVE, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        """Decide for each sample of x `[N, C, H, W]`; returns `[N, gates, 1, 1]` of 0./1. in x.dtype."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x: expected [N, {self.in_channels}, H, W], got {list(x.shape)}")
        if self.spatial_size is not None and tuple(x.shape[2:]) != self.spatial_size:
            raise ValueError(
                f"x: expected a spatial size of {self.spatial_size} (this gate flattens its input), got "
                f"{tuple(x.shape[2:])}; use spatial_size=None for a gate that accepts any size"
            )
        dtype = self.fc1.weight.dtype
        known = self._knows()
        if not known and self._exchanges():
            known = self._read()  # processes that learned it at different times would deadlock
        logits = None
        if known and self._frozen:
            frozen = (self.stored != 0).to(dtype)
            if torch.compiler.is_compiling():  # the compile-time state may be outdated: NaN, not silently closed
                frozen = torch.where(self._is_decided(), frozen, torch.nan)
            decisions = frozen.expand(x.shape[0], -1)
        else:
            logits, decisions = self._decide(x)
            if not known:
                decisions = torch.where(self._is_decided().all(), self.stored.to(dtype), decisions)
        recorded = self.training and decisions.requires_grad and can_be_recorded()
        if recorded:
            decisions = self.calls.add(decisions)
        self.logits, self.decisions = self._per_sample(logits), self._per_sample(decisions)
        if recorded:
            self.calls.latest = self.decisions
        return decisions.to(x.dtype).reshape(-1, self.gates, 1, 1)

    def _is_decided(self) -> Tensor:
        return (self.stored == 0) | (self.stored == 1)

    def _exchanges(self) -> bool:
        """Whether the head synchronizes batch statistics across processes."""
        return batch_norm_processes() > 1 or (
            self.depth == 2 and isinstance(self.bn, nn.SyncBatchNorm) and self.bn.training
        )

    def _decide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        alone = batch_norm_processes() == 1
        group: Any = self.bn.process_group if alone and self._exchanges() else None
        with synchronized(group) if alone and self._exchanges() else nullcontext():
            decisions, logits = self._run_head(detach(x) if self.detach_input else x)
        if self.estimator != "straight_through":
            decisions = estimate(
                self.estimator,
                logits,
                window=self.window,
                temperature=self.temperature,
                training=self.training,
            )
        return logits, decisions

    def _check_head(self) -> None:
        """Reject modified head layers: the head reads their tensors without calling them and would miss the change."""
        for name, forward in _HEAD_FORWARDS.items():
            layer = getattr(self, name, None)
            # a hook that computes a tensor (weight norm, pruning) stores it as a plain attribute
            if layer is not None and (type(layer).forward not in forward or not _COMPUTED.isdisjoint(vars(layer))):
                raise ValueError(
                    f"{name}: expected a gate head as built by fastgate, got a {type(layer).__name__} that a "
                    "quantization, pruning or similar tool has changed; exclude gates from it (gate.qconfig = None "
                    "for torch.ao.quantization)"
                )

    def _run_head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_head()
        head: dict[str, Any] = {"training": self.training}
        if self.depth == 2:
            bn = self.bn
            momentum = bn.momentum
            batch = bn.training and (x.shape[0] * batch_norm_processes() > 1 or bn.running_mean is None)
            if batch and bn.num_batches_tracked is not None:
                bn.num_batches_tracked.add_(1)
                if momentum is None:  # cumulative average, as nn.BatchNorm1d does
                    momentum = 1.0 / float(bn.num_batches_tracked)
            head = {
                "training": batch,
                "bn_weight": bn.weight,
                "bn_bias": bn.bias,
                "running_mean": bn.running_mean,
                "running_var": bn.running_var,
                "fc2_weight": self.fc2.weight,
                "fc2_bias": self.fc2.bias,
                "momentum": 0.0 if momentum is None else momentum,  # None in eval, where it is not used
                "eps": bn.eps,
            }
        decisions, logits = functional.gate_head(
            x, self.fc1.weight, self.fc1.bias, window=self.window, impl=self.impl, **head
        )
        return decisions, logits

    def _per_sample(self, values: Tensor | None) -> Tensor | None:
        return values

    @property
    def frozen(self) -> bool:
        """Whether the gate returns its stored decision instead of running its head."""
        self._learn()
        return self._frozen

    @property
    def all_open(self) -> bool:
        """Whether the gate is frozen with nothing closed."""
        self._learn()
        return self._all_open

    @property
    def known_frozen(self) -> bool:
        """Whether the gate is known to be frozen, without synchronizing with a device; for use in a forward."""
        return self._knows() and self._frozen

    @property
    def known_all_open(self) -> bool:
        """Whether the gate is known to be frozen fully open; False when compiling, as the buffer cannot be watched."""
        return not torch.compiler.is_compiling() and self._knows() and self._all_open

    @property
    def open(self) -> Tensor:
        """The frozen decision, bool `[gates]`. Raises `ValueError` while the gate is live."""
        if not self.frozen:
            raise ValueError("the gate is live and has no stored decision; call freeze(open) first")
        return self.stored == 1

    def freeze(self, open: Tensor) -> None:
        """Freeze the gate to a decision for all samples, bool `[gates]` (or a scalar for one gate)."""
        if open.dtype != torch.bool:
            raise TypeError(f"open: expected a bool tensor, got {open.dtype}; compare with a threshold first")
        if open.shape != (self.gates,) and not (open.numel() == 1 and self.gates == 1):
            raise ValueError(f"open: expected [{self.gates}], got {list(open.shape)}")
        self.stored.copy_(open.reshape(self.gates))
        self._remember(TensorState.of(self.stored), open)

    def unfreeze(self) -> None:
        """Make the gate live: its head decides again."""
        self.stored.fill_(LIVE)
        self._remember(TensorState.of(self.stored), torch.tensor(LIVE))

    def _knows(self) -> bool:
        """Whether `_frozen` and `_all_open` are up to date; the buffer is read if that needs no synchronization.

        A compiled forward uses the state at compile time, which is correct for a live gate whatever the buffer holds;
        for a frozen gate see :meth:`train`.
        """
        if torch.compiler.is_compiling():
            return self._frozen
        stored = self.stored
        if is_on_host(stored) and not torch.jit.is_tracing():
            return self._read()
        if self._seen is not None and self._seen.is_that_of(stored):
            return True
        if is_capturing():  # no transfers or synchronization during capture
            return False
        if self._transfer is None or not self._transfer.state.is_that_of(stored):
            self._transfer = send_to_host(stored)
        elif self._transfer.arrived():
            self._remember(self._transfer.state, self._transfer.values)
            return True
        return False

    def _learn(self) -> None:
        """Read the buffer if its state is not known, synchronizing with the device."""
        if not torch.compiler.is_compiling() and (
            is_on_host(self.stored) or self._seen is None or not self._seen.is_that_of(self.stored)
        ):
            self._read()

    def _read(self) -> bool:
        """Read the buffer; False if it has no values to read (meta and fake tensors, under vmap)."""
        seen = TensorState.of(self.stored)
        try:
            self._remember(seen, self.stored)
        except RuntimeError:
            return False
        return True

    def _remember(self, seen: TensorState, values: Tensor) -> None:
        states = set(values.flatten().tolist())
        if odd := states - {0, 1, LIVE, LIVE_BEFORE}:
            warnings.warn(
                f"a gate's stored state is {odd.pop()}, an average of live and frozen states, and counts as live; "
                "copy a model's buffers instead of averaging them, then freeze",
                stacklevel=2,
            )
        self._seen, self._transfer = seen, None
        self._frozen, self._all_open = states <= {0, 1}, states == {1}

    def train(self, mode: bool = True) -> "Gate":
        """Set the mode, as for every module, and re-read the buffer, however it was written."""
        self._read()
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # remember values that are on the host already, so that a forward need not synchronize to read them
        values = state_dict.get(prefix + "stored")
        if values is not None and is_on_host(values) and values.shape == self.stored.shape:
            self._remember(TensorState.of(self.stored), values)

    def __getstate__(self) -> dict[str, Any]:
        # the last forward's tensors have a graph, which can be neither copied nor pickled
        left = ("calls", "logits", "decisions", "_seen", "_transfer")
        return {name: value for name, value in super().__getstate__().items() if name not in left}

    def extra_repr(self) -> str:
        """One line: sizes, estimator and state."""
        state = "frozen" if self.frozen else "live"
        return f"{self.in_channels} -> {self.gates}, depth={self.depth}, estimator={self.estimator}, {state}"


class LayerGate(Gate):
    """Decides for each sample whether a residual layer is computed (Table 1, left; Eq. 4 and 5).

    logit = fc2(relu(bn(fc1(mean over H, W of x)))), decision = 1 where logit > 0. Multiply the branch by it:
    `y = relu(x + gate(x) * f(x))`.

    Args:
        in_channels: C of the input x `[N, C, H, W]`, or of tokens `[N, T, C]`.
        hidden_features: width of the head.
        estimator: `"straight_through"`, `"gumbel"`, `"bernoulli"` or `"mean_threshold"`.
        window: where the straight-through gradient passes: `"restoring"`, `"clipped"` (the paper's) or `"identity"`.
        init_logit: initialize every logit near this value; None keeps PyTorch's default initialization, in which about
            half of the gates start closed.
        temperature: temperature of the Gumbel estimator.
        impl: implementation of the head, `"auto"`, `"triton"` or `"torch"`.

    `forward(x)` returns `[N, 1, 1, 1]` of 0./1. in x.dtype and stores `.logits` and `.decisions`, `[N]`, in the graph.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_features: int = 16,
        *,
        estimator: str = "straight_through",
        window: str = "restoring",
        init_logit: float | None = 0.5,
        temperature: float = 1.0,
        impl: str = "auto",
    ) -> None:
        super().__init__(in_channels, 1, hidden_features, 2, None, estimator, window, init_logit, temperature, impl)

    def forward(self, x: Tensor) -> Tensor:
        """Decide for each sample of x `[N, C, H, W]`, or of tokens `[N, T, C]`; returns `[N, 1, 1, 1]` of 0./1."""
        if x.dim() == 3:
            if x.shape[2] != self.in_channels:
                raise ValueError(f"x: expected tokens [N, T, {self.in_channels}], got {list(x.shape)}")
            x = x.transpose(1, 2).unsqueeze(-1)
        return super().forward(x)

    def _per_sample(self, values: Tensor | None) -> Tensor | None:
        return None if values is None else values.squeeze(1)


class ChannelGate(Gate):
    """Decides for each sample and channel whether the channel is kept (Table 1, right; one output per channel, Eq. 9).

    Args:
        in_channels: C of the input x `[N, C, H, W]`.
        out_channels: number of gated channels; default `in_channels`.
        hidden_features: width of the head (depth 2).
        depth: number of dense layers: 2 is fc1 -> bn -> ReLU -> fc2, 1 is fc1 alone.
        spatial_size: None pools x over H and W; `(H, W)` flattens it as the paper does, which needs C*H*W*hidden
            weights and ties the gate to that size.
        estimator: see :class:`LayerGate`, also for the remaining options.

    `forward(x)` returns `[N, out_channels, 1, 1]`; `.logits` and `.decisions` are `[N, out_channels]`, in the graph.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        hidden_features: int = 16,
        *,
        depth: int = 2,
        spatial_size: tuple[int, int] | None = None,
        estimator: str = "straight_through",
        window: str = "restoring",
        init_logit: float | None = 0.5,
        temperature: float = 1.0,
        impl: str = "auto",
    ) -> None:
        super().__init__(
            in_channels,
            in_channels if out_channels is None else out_channels,
            hidden_features,
            depth,
            spatial_size,
            estimator,
            window,
            init_logit,
            temperature,
            impl,
        )


def named_gates(model: nn.Module) -> Iterator[tuple[str, Gate]]:
    """Yield (name, gate) for every gate of the model, like `named_modules`, in forward order.

    More exactly, in registration order, which is forward order for the networks here and for every network whose blocks
    are registered in the order they run.
    """
    for name, module in model.named_modules():
        if isinstance(module, Gate):
            yield name, module
