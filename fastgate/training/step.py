"""One step of training; on CUDA it is captured in a CUDA graph and replayed."""

import warnings
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgate import processes
from fastgate.training.search import Search

# what an epoch adds up beside the decisions of every gate
SUMS = ("loss", "task", "polarization", "activation", "budget", "capacity", "correct")

# steps of a phase before its capture: kernels are compiled and libraries make their workspaces in them
_WARMUP_STEPS = 3

Call = Callable[[], None]


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


class TrainingStep:
    """Forward, gate losses, backward, update of the weights, and the epoch's sums, for one batch.

    What differs from step to step comes in tensors, and what lasts from step to step stays where it is, so that the
    step can be captured: in each phase of the search (gates held open, alive, some or all final) after a few steps.
    A capture that fails is a warning; the run then goes on without.

    Args:
        model: the network; `network` is what runs it forward, which several processes wrap anew in every epoch.
        search: of its gates.
        optimizer: SGD; on CUDA fused, which takes a learning rate and a loss scale that only the device knows.
        scaler: of the loss.
        dtype: of the forward pass.
        sums: scalars by name, :data:`SUMS`, and `[gates]` by `gate:` and name; added to in place.
        graphs: captures the step; None runs it as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        search: Search,
        optimizer: torch.optim.SGD,
        scaler: torch.amp.GradScaler,
        dtype: torch.dtype,
        sums: Mapping[str, Tensor],
        graphs: Graphs | None = None,
    ) -> None:
        self.network = model
        self.search = search
        self.optimizer = optimizer
        self.scaler = scaler
        self.dtype = dtype
        self.sums = sums
        self.graphs = graphs
        self._learning_rate = torch.zeros((), device=search.device)
        self._phase: object = None
        self._steps = 0  # of this phase
        self._inputs: list[Tensor] = []
        self._replay: Call | None = None

    @property
    def captured(self) -> bool:
        """Whether the next step of this phase is a replay."""
        return self.graphs is not None and self._replay is not None

    def schedule(self, learning_rate: float, epoch: float) -> list[float]:
        """The numbers of a step: the learning rate, and those of the search at an epoch (fractions count)."""
        return [learning_rate, *self.search.schedule(epoch)]

    def __call__(self, x: Tensor, y: Tensor, schedule: Tensor) -> None:
        """Train on images `[N, C, H, W]` with labels `[N]`; `schedule` are the numbers of :meth:`schedule`."""
        if self._phase != self.search.phase:
            self._begin_phase()
        self._steps += 1
        if self.graphs is None:
            self._compute(x, y, schedule)
            return
        if self._steps == 1:
            self._inputs = [x.clone(), y.clone(), schedule.clone()]
        for place, value in zip(self._inputs, (x, y, schedule), strict=True):
            place.copy_(value)
        if self._steps <= _WARMUP_STEPS:
            self.graphs.run(self._compute_inputs)
            return
        if self._replay is None:
            self._replay = self._capture(self.graphs)
        self._replay()

    def _begin_phase(self) -> None:
        """What was captured is of another network: start anew, with an optimizer that is ready for a capture."""
        self._phase, self._steps, self._replay = self.search.phase, 0, None
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate
            if not self.optimizer.defaults["fused"]:
                continue
            group["fused"] = True  # a checkpoint from a CPU has it otherwise
            for parameter in group["params"] if group["momentum"] else []:
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
        self._compute(*self._inputs)

    def _compute(self, x: Tensor, y: Tensor, schedule: Tensor) -> None:
        self._learning_rate.copy_(schedule[0])
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            scores = self.network(x)
        means = self.search.means()
        parts = self._losses(scores.float(), y, means, schedule[1:])
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(parts["loss"]).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            # sums are averaged over the processes, each of which sees its share of the batch
            parts["correct"] = (scores.argmax(1) == y).sum(dtype=torch.float32) * processes.count()
            parts |= {f"gate:{name}": mean for name, mean in means.items()}
            torch._foreach_add_([self.sums[name] for name in parts], list(parts.values()))

    def _losses(self, scores: Tensor, y: Tensor, means: Mapping[str, Tensor], schedule: Tensor) -> dict[str, Tensor]:
        task = total = F.cross_entropy(scores, y)
        parts = {"task": task}
        for name, (weight, loss) in self.search.penalties(means, schedule).items():
            parts[name] = loss
            total = total + weight * loss
        return {"loss": total, **parts}
