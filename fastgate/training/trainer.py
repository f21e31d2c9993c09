"""The training loop: any network on any batches, with a search of its gates, in runs that can be resumed."""

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastgate import processes
from fastgate.ops import choices
from fastgate.ops.synchronization import synchronized
from fastgate.pruning.costs import macs
from fastgate.pruning.search import GateSearch
from fastgate.training import distributed
from fastgate.training.callbacks import Callback, Checkpoints, MetricsFile
from fastgate.training.checkpoint import load_checkpoint
from fastgate.training.lock import locked
from fastgate.training.records import EpochRecord
from fastgate.training.run_folder import CHECKPOINT
from fastgate.training.step import CudaGraphs, Measure, TrainingStep, can_be_captured
from fastgate.values import Forward, device_of, tensors_in, to_device_of

# what a checkpoint has to hold
_STATE = (
    *("search", "model", "optimizer", "scaler", "epoch", "step", "images", "totals", "sums", "callbacks"),
    *("random", "epoch_random"),
)

# between checks by processes with GPUs whether one of them was interrupted: a check makes them wait for each other
_STEPS_BETWEEN_CHECKS = 50


class Interrupted(Exception):
    """The user stopped the run; its state is saved."""


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or NaN; the last good checkpoint is kept."""


class Trainer:
    """Trains a network on batches, and its gates where a search is given.

    Every epoch ends with a record (:class:`~fastgate.training.records.EpochRecord`); if there is a folder, the record
    becomes a line of its `metrics.jsonl` and the state is saved to its `checkpoint.pt`. Ctrl-C saves one in the middle
    of an epoch. A run resumed from either (:meth:`restore`) ends with the same weights as an undisturbed one, bit by
    bit on a CPU, provided that the batches of an epoch are the same again: those of a loader that has
    `start_at(epoch, step)`, or that draws from torch's random numbers alone, as `DataLoader` does (its batches are then
    read and discarded up to the step).

    Under torchrun every process has a trainer with its own share of every batch; up to rounding they compute what one
    process would. The first one writes.

    Args:
        model: any network, on its device.
        optimizer: of its parameters; those of gates too, see :func:`fastgate.parameter_groups`.
        train_loader: batches with a length, `(inputs, targets)` or mappings (keyword arguments of the network).
        loss_fn: (outputs, targets) -> scalar, a mean over the batch; for a mapping its targets are the whole batch.
        epochs: of the run.
        search: of the network's gates.
        calibration: batches over which gates are decided; default: the training batches.
        evaluate: the network -> numbers by name, after every epoch.
        callbacks: see :class:`~fastgate.training.callbacks.Callback`.
        folder: where metrics and checkpoints are written; None writes nothing.
        learning_rate: epoch (with its fraction) -> learning rate of the optimizer's first parameter group; the others
            keep their initial ratio to it. None leaves learning rates to the optimizer and callbacks.
        measures: what else is averaged over an epoch's steps, (outputs, targets) -> scalar, by name.
        example_inputs: (C, H, W) or example inputs, to count the MACs of a network without a search.
        forward: `(model, inputs) -> outputs`, for networks that are called differently.
        dtype: of the forward pass; half precisions by autocast, fp16 with a loss scaler.
        sync_batch_norms: batch norms use the statistics of all processes.
        compile: compile the network with `torch.compile`.

    Attributes:
        epoch, step: what is trained next, from 0.
        device: of the network.
        records: of all epochs so far; including those before an interruption if there is a folder.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train_loader: Any,
        loss_fn: Measure,
        *,
        epochs: int,
        search: GateSearch | None = None,
        calibration: Iterable[Any] | None = None,
        evaluate: Callable[[nn.Module], Mapping[str, Any]] | None = None,
        callbacks: Sequence[Callback] = (),
        folder: Path | str | None = None,
        learning_rate: Callable[[float], float] | None = None,
        measures: Mapping[str, Measure] | None = None,
        example_inputs: Any = None,
        forward: Forward | None = None,
        dtype: torch.dtype = torch.float32,
        sync_batch_norms: bool = True,
        compile: bool = False,
    ) -> None:
        batches: Any = train_loader
        if not isinstance(train_loader, Sized) or not len(train_loader):
            raise ValueError(
                f"train_loader: expected batches with a length of 1 or more, got {type(train_loader).__name__}"
                f"{f' of length {len(train_loader)}' if isinstance(train_loader, Sized) else ' without one'}"
            )
        if epochs < 1:
            raise ValueError(f"epochs: expected a positive number, got {epochs}")
        if search is not None and (search.model is not model or search.epochs != epochs):
            raise ValueError(
                f"search: expected one of this network over {epochs} epochs, got one of "
                f"{'this' if search.model is model else 'another'} network over {search.epochs}"
            )
        self.model = model
        self.optimizer = optimizer
        self.train_loader = batches
        self.epochs = epochs
        self.search = search
        self.calibration: Iterable[Any] = batches if calibration is None else calibration
        self.evaluate = evaluate
        self.folder = None if folder is None else Path(folder)
        self.learning_rate = learning_rate
        self.dtype = dtype
        self.device = device_of(model) or torch.device("cpu")
        self.epoch = 0
        self.step = 0
        self.records: list[EpochRecord] = []
        self.callbacks = [*callbacks]
        if self.folder is not None:
            have = {type(callback) for callback in callbacks}
            self.callbacks += [kind(self.folder) for kind in (MetricsFile, Checkpoints) if kind not in have]
        self.macs = search.macs if search is not None else None
        if search is None and example_inputs is not None:
            self.macs = macs(model, example_inputs, forward=forward)
        self._totals = {"macs": 0, "all_open": 0}  # of forward passes in training
        self._images = 0  # of this epoch so far, of this process
        self._sync_batch_norms = sync_batch_norms
        self._compile = compile
        self._epoch_rng: dict[str, Any] | None = None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype is torch.float16)
        # several processes exchange statistics and gradients inside the step
        alone = self.device.type == "cuda" and processes.count() == 1
        captures = alone and learning_rate is not None and can_be_captured(optimizer)
        self.training_step = TrainingStep(
            model,
            optimizer,
            loss_fn,
            search,
            self.scaler,
            dtype,
            measures=measures,
            forward=forward,
            device=self.device,
            scheduled=learning_rate is not None,
            graphs=CudaGraphs(self.device) if captures else None,
        )

    @property
    def sums(self) -> dict[str, Tensor]:
        """Sums over this epoch's steps so far, by name."""
        return self.training_step.sums

    @property
    def macs_spent(self) -> int:
        """MACs of all forward passes in training so far; 0 where those of the network are unknown."""
        return self._totals["macs"]

    def fit(self) -> None:
        """Train to the last epoch.

        Raises:
            NonFiniteLoss: the loss became infinite or NaN.
            Interrupted: Ctrl-C; the state is saved, where there is a folder.
            ValueError: another process trains in the folder.
        """
        with nullcontext() if self.folder is None else locked(self.folder):
            self._fit()

    def _fit(self) -> None:
        self._tell("on_fit_begin")
        try:
            with (
                _deferred_interrupt() as interrupted,
                choices.looking_up(),  # what is chosen fixes the order of sums: see callbacks.KernelChoices
                choices.for_graphs(self.training_step.graphs is not None),
            ):
                while self.epoch < self.epochs:
                    try:
                        self._tell("on_epoch_begin")
                        self._begin_epoch()
                        self._tell("on_train_begin")
                        with synchronized(batch_norms=self._sync_batch_norms):
                            self._train_epoch(interrupted)
                            self._refresh_statistics()
                        if not self._sync_batch_norms:
                            processes.share_buffers(self.model)
                    except Interrupted:
                        self._tell("on_train_end")
                        self._check_finite(self.sums["loss"])
                        self._tell("on_interrupt")
                        raise
                    self._tell("on_train_end")
                    self._end_epoch()
        finally:
            self._tell("on_fit_end")

    def _tell(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)

    def _begin_epoch(self) -> None:
        """The gates' part of an epoch."""
        if self.search is not None:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
                self.search.begin_epoch(self.epoch, self.calibration)

    def _train_epoch(self, interrupted: list[bool]) -> None:
        schedule = self._schedule()
        self.model.train()
        network = distributed.parallel(self.model)
        self.training_step.network = torch.compile(network) if self._compile else network  # type: ignore[assignment]
        for batch in self._batches():
            self.training_step(batch, schedule[self.step])
            self.step += 1
            self._images += _count_samples(batch)
            self._tell("on_step_end")
            if self.device.type == "cpu":  # a GPU would have to be waited for: there the epoch's end is soon enough
                self._check_finite(self.sums["loss"])
            alone = self.device.type == "cpu" or processes.count() == 1  # GPUs of several processes wait here
            if (alone or self.step % _STEPS_BETWEEN_CHECKS == 0) and processes.any_process(bool(interrupted)):
                raise Interrupted

    def _refresh_statistics(self) -> None:
        """Refresh the search's statistics, so that the evaluation sees the network that training ends with."""
        if self.search is not None:
            loader: Any = self.train_loader
            batches = loader.start_at(self.epoch) if hasattr(loader, "start_at") else loader
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
                self.search.refresh(batches)

    def _batches(self) -> Iterator[Any]:
        """The epoch's batches from the next step on, on the network's device."""
        loader: Any = self.train_loader
        if hasattr(loader, "start_at"):
            yield from loader.start_at(self.epoch, self.step)
            return
        part: Any
        for part in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(self.epoch)
                break
        goes_on, now = self.step > 0 and self._epoch_rng is not None, _random_state(self.device)
        if goes_on:
            _set_random_state(self._epoch_rng, self.device)
        else:
            self._epoch_rng = now
        first = self.step
        for i, batch in enumerate(loader):
            if i < first:
                continue
            if i == first and goes_on:
                _set_random_state(now, self.device)
            yield to_device_of(self.model, batch)

    def _schedule(self) -> Tensor:
        """The scheduled numbers of this epoch, a row per step, all copied to the device at once."""
        steps = len(self.train_loader)
        rows = [
            self.training_step.schedule(self._learning_rate_at(step), self.epoch + step / steps)
            for step in range(steps)
        ]
        # from pinned memory, so that nothing waits for the copy
        table = torch.tensor(rows, dtype=torch.float32, pin_memory=self.device.type == "cuda")
        return table.to(self.device, non_blocking=True)

    def _learning_rate_at(self, step: int) -> float:
        if self.learning_rate is None:
            return float(self.optimizer.param_groups[0]["lr"])
        return self.learning_rate(self.epoch + (step + 0.5) / len(self.train_loader))

    def _check_finite(self, total: Any) -> None:
        if not torch.isfinite(torch.as_tensor(total)):
            kept = None if self.folder is None else self.folder / CHECKPOINT
            last = f"the last good checkpoint is {kept}" if kept and kept.exists() else "no epoch was saved before"
            raise NonFiniteLoss(
                f"the loss is not finite in epoch {self.epoch + 1} by step {self.step}; {last}. Lower the learning "
                f"rate ({self._learning_rate_at(0):g}), warm it up for longer, or use fp32"
            )

    def _end_epoch(self) -> None:
        self._check_finite(self.sums["loss"])
        steps = len(self.train_loader)
        record: EpochRecord = {"epoch": self.epoch + 1}
        if self.evaluate is not None:
            self._tell("on_eval_begin")
            record["eval"] = dict(self.evaluate(self.model))
            self._tell("on_eval_end")
            self._check_finite(record["eval"].get("loss", 0.0))
        sums = processes.average(self.sums)
        record["train"] = {name: float(value) / steps for name, value in sums.items()}
        record |= self._describe_search()
        record["learning_rate"] = self._learning_rate_at(steps - 1)
        self.epoch, self.step, self._images, self._epoch_rng = self.epoch + 1, 0, 0, None
        for value in self.sums.values():
            value.zero_()  # a captured step adds to these very tensors
        self.records.append(record)
        self._tell("on_epoch_end", record)

    def _describe_search(self) -> EpochRecord:
        """The epoch's gates and MACs; a network without gates is open and never settles anything."""
        described: dict[str, Any] = {
            "open_ratio": 1.0, "polarization": 0.0, "macs": self.macs, "frozen": False, "max_abs_difference": 0.0,
            "gates": {}, "macs_training": self.macs,
        }  # fmt: skip
        if self.search is not None:
            described = self.search.metrics()
        if self.macs is not None:
            images = self._images * processes.count()
            self._totals["macs"] += described["macs_training"] * images
            self._totals["all_open"] += self.macs * images
            described["macs_training"] = {
                "per_image": described["macs_training"],
                "total": self._totals["macs"],
                "all_open_total": self._totals["all_open"],
            }
        return cast(EpochRecord, described)

    def _named_callbacks(self) -> Iterator[tuple[str, Callback]]:
        """Callbacks by the name of their class; further ones of the same class are numbered."""
        seen: Counter[str] = Counter()
        for callback in self.callbacks:
            name = type(callback).__name__
            seen[name] += 1
            yield (name if seen[name] == 1 else f"{name} {seen[name]}"), callback

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` resumes from: tensors, numbers, strings and containers of these."""
        return {
            "search": None if self.search is None else self.search.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "images": self._images,
            "totals": dict(self._totals),
            "sums": processes.average(self.sums),
            "callbacks": {name: callback.state_dict() for name, callback in self._named_callbacks()},
            "random": _random_state(self.device),
            "epoch_random": self._epoch_rng,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from :meth:`state_dict`, with a newly made network, optimizer and search.

        Raises:
            ValueError: the state of an earlier version, or of another network or search.
        """
        if missing := [name for name in _STATE if name not in state]:
            raise ValueError(f"checkpoint: expected one of this version, got one without {missing[0]}; start a new run")
        if (state["search"] is None) != (self.search is None):
            ours, theirs = ("without" if search is None else "with" for search in (self.search, state["search"]))
            raise ValueError(f"checkpoint: expected one of a run {ours} a search, got one {theirs}")
        if self.search is not None:
            self.search.load_state_dict(state["search"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self._images, self._totals = state["images"], dict(state["totals"])
        for name, value in self.sums.items():
            value.copy_(state["sums"][name])
        for name, callback in self._named_callbacks():
            if kept := state["callbacks"].get(name):
                callback.load_state_dict(kept)
        self._epoch_rng = state["epoch_random"]
        _set_random_state(state["random"], self.device)

    def restore(self) -> bool:
        """Resume from the folder's checkpoint; False if there is none, as after a kill before the first was saved."""
        if self.folder is None:
            raise ValueError("folder: expected the folder of the run to resume, got none")
        path = self.folder / CHECKPOINT
        if not path.exists():
            return False
        self.load_state_dict(load_checkpoint(path, self.device))
        return True


def _count_samples(batch: Any) -> int:
    return max((len(x) for x in tensors_in(batch) if x.dim()), default=0)


def _random_state(device: torch.device) -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def _set_random_state(state: Mapping[str, Any] | None, device: torch.device) -> None:
    if state is None:
        return
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


@contextmanager
def _deferred_interrupt() -> Iterator[list[bool]]:
    """While active, the first Ctrl-C only fills the yielded list; a second one interrupts at once."""
    asked: list[bool] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield asked
        return

    def handle(signum: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)
