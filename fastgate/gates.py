"""The gating modules: per-sample binary decisions for a residual layer or for its channels.

Method: Zhi et al., "A New Baseline for GreenAI", Table 1 (https://arxiv.org/abs/2302.10798).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgate import functional
from fastgate.estimators import check_estimator, estimate
from fastgate.ops.dispatch import IMPLEMENTATIONS
from fastgate.ops.gate_head import check_window

LIVE = -1  # in `Gate.stored`: this gate is not frozen

# std of the last layer's weights when init_logit is set: at unit-scale features every logit starts near init_logit,
# inside the window |logit| <= 1, where the straight-through gradient is not cut off
INIT_STD = 0.01


class Gate(nn.Module):
    """What layer and channel gates share: the head, the decisions of the last forward, and the frozen state.

    Use :class:`LayerGate` or :class:`ChannelGate`.

    Attributes:
        logits: of the last forward, `[N, gates]` (`[N]` for a layer gate), with graph; None when frozen.
        decisions: of the last forward, the same shape, 0./1., with graph.
        stored: int8 buffer `[gates]`: -1 while the gate is live, else the frozen decision 0 or 1. In `state_dict`.
    """

    logits: Tensor | None = None
    decisions: Tensor | None = None
    stored: Tensor
    _frozen = False
    _all_open = False  # frozen with nothing closed

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
                f"x: expected maps of {self.spatial_size} (this gate flattens its input), got {tuple(x.shape[2:])}; "
                "use spatial_size=None for a gate that takes any size"
            )
        if self._frozen:
            logits, decisions = None, self.stored.to(self.fc1.weight.dtype).expand(x.shape[0], -1)
        else:
            logits, decisions = self._decide(x)
        self.logits, self.decisions = self._per_sample(logits), self._per_sample(decisions)
        return decisions.to(x.dtype).reshape(-1, self.gates, 1, 1)

    def _decide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        head: dict[str, Any] = {"training": self.training}
        if self.depth == 2:
            bn = self.bn
            momentum = bn.momentum
            if bn.training and bn.num_batches_tracked is not None:
                bn.num_batches_tracked.add_(1)
                if momentum is None:  # cumulative average, as nn.BatchNorm1d does
                    momentum = 1.0 / float(bn.num_batches_tracked)
            head = {
                "training": bn.training,
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
        if self.estimator != "straight_through":
            decisions = estimate(
                self.estimator,
                logits,
                window=self.window,
                temperature=self.temperature,
                training=self.training,
            )
        return logits, decisions

    def _per_sample(self, values: Tensor | None) -> Tensor | None:
        return values

    @property
    def frozen(self) -> bool:
        """Whether the gate returns its stored decision instead of running its head."""
        return self._frozen

    @property
    def all_open(self) -> bool:
        """Whether the gate is frozen with nothing closed; known without asking the device."""
        return self._all_open

    @property
    def open(self) -> Tensor:
        """The frozen decision, bool `[gates]`. Raises `ValueError` while the gate is live."""
        if not self._frozen:
            raise ValueError("the gate is live and has no stored decision; call freeze(open) first")
        return self.stored == 1

    def freeze(self, open: Tensor) -> None:
        """Store a decision, bool `[gates]` (or a scalar for one gate): from now on every sample gets it."""
        if open.dtype != torch.bool:
            raise TypeError(f"open: expected a bool tensor, got {open.dtype}; compare with a threshold first")
        if open.shape != (self.gates,) and not (open.numel() == 1 and self.gates == 1):
            raise ValueError(f"open: expected [{self.gates}], got {list(open.shape)}")
        self.stored.copy_(open.reshape(self.gates))
        self._frozen, self._all_open = True, bool(open.all())

    def unfreeze(self) -> None:
        """Let the head decide again."""
        self.stored.fill_(LIVE)
        self._frozen = self._all_open = False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # mirrored in Python once, here, so that a forward never waits for the device to learn it
        stored = state_dict.get(prefix + "stored")
        if stored is not None:
            self._frozen, self._all_open = bool((stored != LIVE).all()), bool((stored == 1).all())

    def __getstate__(self) -> dict[str, Any]:
        # the last forward's tensors carry a graph, which can be neither copied nor pickled
        return {**super().__getstate__(), "logits": None, "decisions": None}

    def extra_repr(self) -> str:
        """One line: sizes, estimator and state."""
        state = "frozen" if self._frozen else "live"
        return f"{self.in_channels} -> {self.gates}, depth={self.depth}, estimator={self.estimator}, {state}"


class LayerGate(Gate):
    """Decides for each sample whether a residual layer is computed (Table 1, left; Eq. 4 and 5).

    logit = fc2(relu(bn(fc1(mean over H, W of x)))), decision = 1 where logit > 0. Multiply it onto the branch:
    `y = relu(x + gate(x) * f(x))`.

    Args:
        in_channels: C of the input x `[N, C, H, W]`.
        hidden_features: width of the head.
        estimator: `"straight_through"`, `"gumbel"`, `"bernoulli"` or `"mean_threshold"`.
        window: where the straight-through gradient passes: `"restoring"`, `"clipped"` (the paper's) or `"identity"`.
        init_logit: start with every logit near this value; None keeps PyTorch's default initialisation, which starts
            about half of the gates closed.
        temperature: of the Gumbel estimator.
        impl: implementation of the head, `"auto"`, `"triton"` or `"torch"`.

    `forward(x)` returns `[N, 1, 1, 1]` of 0./1. in x.dtype and keeps `.logits` and `.decisions`, `[N]`, with graph.
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

    def _per_sample(self, values: Tensor | None) -> Tensor | None:
        return None if values is None else values.squeeze(1)


class ChannelGate(Gate):
    """Decides for each sample and channel whether the channel is kept (Table 1, right; Eq. 9 asks for one per channel).

    Args:
        in_channels: C of the input x `[N, C, H, W]`.
        out_channels: number of gated channels; default `in_channels`.
        hidden_features: width of the head (depth 2).
        depth: dense layers: 2 is fc1 -> bn -> ReLU -> fc2, 1 is fc1 alone.
        spatial_size: None pools x over H and W; `(H, W)` flattens it as the paper does, which costs C*H*W*hidden
            weights and ties the gate to that size.
        estimator: see :class:`LayerGate`, as are the other options.

    `forward(x)` returns `[N, out_channels, 1, 1]`; `.logits` and `.decisions` are `[N, out_channels]`, with graph.
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

    Forward order is registration order: that of the networks here and of every network whose blocks are registered in
    the order they run.
    """
    for name, module in model.named_modules():
        if isinstance(module, Gate):
            yield name, module
