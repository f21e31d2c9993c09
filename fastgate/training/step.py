"""The training step; on CUDA it is captured in a CUDA graph and replayed."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastgate.pruning.search import GateSearch
from fastgate.values import Forward, call, tensors_in, with_tensors

# steps of a phase before its capture, in which kernels are compiled and libraries allocate their workspaces
_WARMUP_STEPS = 3

Call = Callable[[], None]
# (outputs, targets) -> scalar; if a batch is not a pair, the targets are the whole batch
Measure = Callable[[Any, Any], Tensor]


class Graphs(Protocol):
    """Runs and captures functions: :class:`CudaGraphs`, or a stand-in where there is no GPU."""

    def run(self, function: Call) -> None:
        """Run the function where it will be captured."""

    def capture(self, function: Call) -> Call:
        """Record the function's operations on tensors without executing them; returns a call that replays them."""


class CudaGraphs:
    """CUDA graphs of functions, which are run and captured on one stream, as autograd requires."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def run(self, function: Call) -> None:
        """Run the function on the capture stream."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)

    def capture(self, function: Call) -> Call:
        """Record the function's kernels; returns a call that launches them all at once."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            function()
        replay: Call = graph.replay
        return replay


def can_be_captured(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's step can be captured: a fused one reads learning rate and loss scale on the device."""
    return isinstance(optimizer, torch.optim.SGD | torch.optim.Adam) and bool(optimizer.defaults.get("fused"))


class TrainingStep:
    """Forward, task loss, gate losses, backward, weight update and the sums of the epoch, for one batch.

    Values that change from step to step are passed in tensors, and state stays in place, so that the step can be
    captured: in each configuration of the search (gates held open, live, some or all final) after a few steps. If a
    capture fails, the step warns and runs without a graph. A batch of another size runs eagerly.

    Args:
        model: the network; the attribute `network` runs its forward, wrapped anew every epoch with several processes.
        optimizer: of the network; only a fused one can be captured, see :func:`can_be_captured`.
        loss_fn: (outputs, targets) -> scalar.
        search: of the network's gates, if it has any.
        scaler: scales the loss.
        dtype: of the forward pass.
        measures: further quantities to sum, by name.
        forward: for networks with another calling convention.
        device: of the network.
        scheduled: whether each step sets the learning rate, with parameter groups at their initial ratio to the first.
            Otherwise groups keep their own rates, whose changes a captured step would not see.
        graphs: captures the step; None runs it eagerly.

    Attributes:
        sums: sums over the epoch, scalars by name: "loss", "task", the gate losses, and the measures.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Measure,
        search: GateSearch | None,
        scaler: torch.amp.GradScaler,
        dtype: torch.dtype,
        *,
        measures: Mapping[str, Measure] | None = None,
        forward: Forward | None = None,
        device: torch.device,
        scheduled: bool = True,
        graphs: Graphs | None = None,
    ) -> None:
        self.network = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.search = search
        self.scaler = scaler
        self.dtype = dtype
        self.measures = dict(measures or {})
        self.graphs = graphs
        self._forward = forward
        self._device = device
        self._scheduled = scheduled
        gate_losses = ("polarization", "activation", "budget", "capacity") if search is not None else ()
        self.sums = {name: torch.zeros((), device=device) for name in ("loss", "task", *gate_losses, *self.measures)}
        # learning rates of the parameter groups in persistent tensors, and their ratios to the scheduled one
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._ratios = [rate / rates[0] if rates[0] else 1.0 for rate in rates]
        self._rates = [torch.zeros((), device=device) for _ in rates]
        self._configuration: object = None
        self._steps = 0  # in this configuration
        self._inputs: list[Tensor] = []
        self._batch: Any = None
        self._replay: Call | None = None

    @property
    def captured(self) -> bool:
        """Whether the next step is a replay."""
        return self.graphs is not None and self._replay is not None

    def schedule(self, learning_rate: float, epoch: float) -> list[float]:
        """The values of a step: the learning rate, and those of the search at an epoch, which may be fractional."""
        return [learning_rate, *(self.search.weights(epoch) if self.search is not None else ())]

    def __call__(self, batch: Any, schedule: Tensor) -> None:
        """Train on a batch on the step's device; `schedule` holds the values of :meth:`schedule`."""
        configuration = self.search.configuration if self.search is not None else ()
        if self._configuration != configuration:
            self._begin_configuration(configuration)
        self._steps += 1
        if self.graphs is None:
            self._compute(batch, schedule)
            return
        values = [*tensors_in(batch), schedule]
        if self._steps == 1:
            self._batch, self._inputs = batch, [value.clone() for value in values]
        if [value.shape for value in values] != [place.shape for place in self._inputs]:
            self.graphs.run(lambda: self._compute(batch, schedule))
            return
        for place, value in zip(self._inputs, values, strict=True):
            place.copy_(value)
        if self._steps <= _WARMUP_STEPS:
            self.graphs.run(self._compute_inputs)
            return
        if self._replay is None:
            self._replay = self._capture(self.graphs)
        self._replay()

    def _begin_configuration(self, configuration: object) -> None:
        """Discard the capture, which is of another network, and prepare the optimizer for a new one."""
        self._configuration, self._steps, self._replay = configuration, 0, None
        fused = bool(self.optimizer.defaults.get("fused"))
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if self._scheduled and (fused or isinstance(self.optimizer, torch.optim.SGD)):  # others read it on the host
                group["lr"] = rate
            if not fused:
                continue
            group["fused"] = True  # a checkpoint from a CPU overrides it
            for parameter in group["params"] if group.get("momentum") else []:
                # a first step, which makes the buffers, cannot be captured; and if fp16 overflows in it, the fused
                # kernel leaves them uninitialised
                state, buffer = self.optimizer.state[parameter], torch.zeros_like(parameter)
                if state.get("momentum_buffer") is not None:
                    buffer.copy_(state["momentum_buffer"])
                state["momentum_buffer"] = buffer

    def _capture(self, graphs: Graphs) -> Call:
        try:
            return graphs.capture(self._compute_inputs)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(f"the training step runs without a CUDA graph, slower: {reason}", stacklevel=2)
            self.graphs = None
            return self._compute_inputs

    def _compute_inputs(self) -> None:
        self._compute(with_tensors(self._batch, self._inputs[:-1]), self._inputs[-1])

    def _compute(self, batch: Any, schedule: Tensor) -> None:
        if self._scheduled:
            self._set_learning_rate(schedule[0])
        inputs, targets = split_batch(batch)
        with torch.autocast(self._device.type, self.dtype, enabled=self.dtype is not torch.float32):
            outputs = call(self.network, inputs, self._forward)
        outputs = _as_fp32(outputs) if self.dtype is not torch.float32 else outputs
        parts = self._losses(outputs, targets, schedule[1:])
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(parts["loss"]).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            parts |= {name: measure(outputs, targets).float() for name, measure in self.measures.items()}
            torch._foreach_add_([self.sums[name] for name in parts], [part.detach() for part in parts.values()])

    def _set_learning_rate(self, value: Tensor) -> None:
        for group, rate, ratio in zip(self.optimizer.param_groups, self._rates, self._ratios, strict=True):
            rate.copy_(value * ratio)
            if group["lr"] is not rate:
                group["lr"] = float(value) * ratio

    def _losses(self, outputs: Any, targets: Any, weights: Tensor) -> dict[str, Tensor]:
        task = total = self.loss_fn(outputs, targets)
        parts = {"task": task}
        for name, (weight, loss) in (self.search.terms(weights) if self.search is not None else {}).items():
            parts[name] = loss
            total = total + weight * loss
        return {"loss": total, **parts}


def split_batch(batch: Any) -> tuple[Any, Any]:
    """A batch's inputs and targets: the items of a pair; a batch that is not a sequence serves as both.

    Raises:
        TypeError: a tuple or list that is not a pair.
    """
    if not isinstance(batch, Sequence):
        return batch, batch
    if len(batch) != 2:
        raise TypeError(
            f"train_loader: expected batches that are (inputs, targets) or mappings, got {type(batch).__name__} of "
            f"{len(batch)} items; let its collate_fn make pairs"
        )
    return batch[0], batch[1]


def _as_fp32(outputs: Any) -> Any:
    """Half-precision outputs as fp32, in which losses are computed."""
    halves = (torch.float16, torch.bfloat16)
    return with_tensors(outputs, [x.float() if x.dtype in halves else x for x in tensors_in(outputs)])
