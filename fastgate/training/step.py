"""One step of training; on CUDA it is captured in a CUDA graph and replayed."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastgate.pruning.search import GateSearch
from fastgate.values import Forward, call, tensors_in, with_tensors

# steps of a phase before its capture: kernels are compiled and libraries make their workspaces in them
_WARMUP_STEPS = 3

Call = Callable[[], None]
# (outputs, targets) -> scalar; where a batch is no pair, the whole batch takes the place of the targets
Measure = Callable[[Any, Any], Tensor]


class Graphs(Protocol):
    """Who runs a function and captures it; :class:`CudaGraphs`, and a stand-in where there is no GPU."""

    def run(self, function: Call) -> None:
        """Run it where it will be captured."""

    def capture(self, function: Call) -> Call:
        """Record what it does to tensors, without doing it; returns what does it again."""


class CudaGraphs:
    """CUDA graphs of functions; captured on one stream, where they also ran before, as autograd needs it."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def run(self, function: Call) -> None:
        """Run it on the stream of the captures."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)

    def capture(self, function: Call) -> Call:
        """Record its kernels; returns what launches them all at once."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            function()
        replay: Call = graph.replay
        return replay


def can_be_captured(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's step can be: a fused one takes a learning rate and a loss scale that the device knows."""
    return isinstance(optimizer, torch.optim.SGD | torch.optim.Adam) and bool(optimizer.defaults.get("fused"))


class TrainingStep:
    """Forward, loss of the task, gate losses, backward, update of the weights, and the epoch's sums, for one batch.

    What differs from step to step comes in tensors, and what lasts from step to step stays where it is, so that the
    step can be captured: in each configuration of the search (gates held open, alive, some or all final) after a few
    steps. A capture that fails is a warning; the run then goes on without. A batch of another size runs as it is.

    Args:
        model: the network; `network` is what runs it forward, which several processes wrap anew in every epoch.
        optimizer: of the network; to be captured it is a fused one, see :func:`can_be_captured`.
        loss_fn: (outputs, targets) -> scalar.
        search: of the network's gates, if it has any.
        scaler: of the loss.
        dtype: of the forward pass.
        measures: what else is summed up, by name.
        forward: for networks that are called otherwise.
        device: of the network.
        scheduled: whether the learning rate comes with every step; groups of the optimizer that begin with others than
            the first keep their ratio to it. Else the groups keep their own, which no capture would see change.
        graphs: captures the step; None runs it as it is.

    Attributes:
        sums: of the epoch, scalars by name: "loss", "task", the gate losses, and the measures.
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
        # learning rates of the optimizer's groups, in tensors that last, and their ratios to that of the schedule
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._ratios = [rate / rates[0] if rates[0] else 1.0 for rate in rates]
        self._rates = [torch.zeros((), device=device) for _ in rates]
        self._configuration: object = None
        self._steps = 0  # of this configuration
        self._inputs: list[Tensor] = []
        self._batch: Any = None
        self._replay: Call | None = None

    @property
    def captured(self) -> bool:
        """Whether the next step is a replay."""
        return self.graphs is not None and self._replay is not None

    def schedule(self, learning_rate: float, epoch: float) -> list[float]:
        """The numbers of a step: the learning rate, and those of the search at an epoch (fractions count)."""
        return [learning_rate, *(self.search.weights(epoch) if self.search is not None else ())]

    def __call__(self, batch: Any, schedule: Tensor) -> None:
        """Train on a batch on the step's device; `schedule` are the numbers of :meth:`schedule`."""
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
        """What was captured is of another network: start anew, with an optimizer that is ready for a capture."""
        self._configuration, self._steps, self._replay = configuration, 0, None
        fused = bool(self.optimizer.defaults.get("fused"))
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if self._scheduled and (fused or isinstance(self.optimizer, torch.optim.SGD)):  # others read it on the host
                group["lr"] = rate
            if not fused:
                continue
            group["fused"] = True  # a checkpoint from a CPU has it otherwise
            for parameter in group["params"] if group.get("momentum") else []:
                # a first step would have no place in a graph; and if fp16 overflows in it, the fused kernel leaves
                # its buffers uninitialised
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
    """A batch's inputs and targets: the items of a pair; of anything else the batch itself is both.

    Raises:
        TypeError: a tuple or list that is no pair.
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
    """Outputs of half precision as fp32, in which losses are computed."""
    halves = (torch.float16, torch.bfloat16)
    return with_tensors(outputs, [x.float() if x.dtype in halves else x for x in tensors_in(outputs)])
