"""The training loop: epochs of SGD with gate losses, checkpoints that resume bit-identically, metrics per epoch."""

import json
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgate.energy import EnergyMeter
from fastgate.files import write_atomically
from fastgate.ops import choices
from fastgate.ops.synchronization import synchronized
from fastgate.pruning.decisions import Decisions
from fastgate.training import distributed
from fastgate.training.checkpoint import load_checkpoint, save_checkpoint
from fastgate.training.data import Batches, Dataset, ImageSet
from fastgate.training.loggers import TensorBoardLogger
from fastgate.training.networks import build_network, evaluate, resolve_precision
from fastgate.training.presets import Recipe, recipe_from_dict
from fastgate.training.progress import RunProgress
from fastgate.training.search import Search
from fastgate.training.spending import Spending, describe_epoch
from fastgate.training.step import SUMS, CudaGraphs, TrainingStep
from fastgate.tuning import tune

# how often processes with GPUs ask each other whether one was interrupted: for that they wait
_STEPS_BETWEEN_QUESTIONS = 50


class Interrupted(Exception):
    """The user stopped the run; its state is saved."""


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or NaN; the last good checkpoint is kept."""


class Trainer:
    """One run of one recipe in one folder.

    Writes `config.json`, `metrics.jsonl` (one line per epoch) and `checkpoint.pt`. Every epoch ends in a checkpoint, a
    Ctrl-C writes one in the middle of an epoch; from either, a resumed run ends with the same weights, bit by bit on a
    CPU, as an undisturbed one.

    Under torchrun every process has a trainer and takes its share of every batch; up to rounding they compute what one
    process computes, and checkpoints know nothing of their number. The first one writes.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        folder: Path,
        *,
        resume: bool = False,
        title: str | None = None,
        logger: TensorBoardLogger | None = None,
    ) -> None:
        self.recipe = recipe
        self.title = title or f"{recipe.network} {'plain' if recipe.gating == 'none' else recipe.gating}"
        self.dataset = dataset
        self.folder = folder
        self.logger = logger
        self.device = dataset.train.labels.device
        self.dtype = resolve_precision(recipe.precision, self.device)
        # on two CPU cores (AMD EPYC, torch 2.15, ResNet-20, batch 256) channels_last is 1.4x faster than NCHW
        self.channels_last = True
        self.train_batches = self.batches(dataset.train, recipe.batch_size, augment=True, shared=True)
        torch.manual_seed(recipe.seed)
        self.model = build_network(recipe, dataset.image_size, dataset.num_classes).to(self.device)
        self.model.to(memory_format=torch.channels_last)
        self.search = Search(recipe, self.model, dataset.image_size, self.device)
        self.optimizer = self._build_optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.epoch = 0
        self.step = 0
        self.sums = self._new_sums()
        self.spending = Spending()
        self.history: list[dict[str, Any]] = []
        self._chosen_for: object = None  # the phase of the search that kernels were chosen for
        if resume:
            self._restore()
        # several processes exchange statistics and gradients inside the step
        captures = self.device.type == "cuda" and distributed.count() == 1
        graphs = CudaGraphs(self.device) if captures else None
        self.training_step = TrainingStep(
            self.model, self.search, self.optimizer, self.scaler, self.dtype, self.sums, graphs
        )

    def batches(
        self, images: ImageSet, batch_size: int = 500, *, augment: bool = False, shared: bool = False
    ) -> Batches:
        """Batches of a split, in the memory format of this run; `shared` ones are this process' part of them."""
        shard = (distributed.rank(), distributed.count()) if shared else (0, 1)
        if not augment:  # every process has one
            batch_size = min(batch_size, max(len(images) // shard[1], 1))
        return Batches(
            self.dataset,
            images,
            batch_size,
            augment=augment,
            seed=self.recipe.seed,
            channels_last=self.channels_last,
            shard=shard,
        )

    def fit(self) -> None:
        """Train to the last epoch.

        Raises:
            NonFiniteLoss: the loss became infinite or NaN.
            Interrupted: Ctrl-C; the state is saved.
        """
        steps = len(self.train_batches)
        done = self.epoch * steps + self.step
        with (
            RunProgress(self.title, self.recipe.epochs * steps, done) as progress,
            _deferred_interrupt() as interrupted,
            closing(EnergyMeter(self.device)) as meter,
            choices.looking_up(),  # what is chosen fixes the order of sums: see _choose_kernels
            choices.for_graphs(self.training_step.graphs is not None),
        ):
            while self.epoch < self.recipe.epochs:
                window = meter.window("train")
                try:
                    with window:
                        self._enter_phase()
                        self._choose_kernels()
                        with synchronized(batch_norms=self.recipe.sync_batch_norms):
                            self._train_epoch(progress, interrupted)
                            self.search.refresh(self.train_batches.start_at(self.epoch), self.dtype)
                        if not self.recipe.sync_batch_norms:
                            distributed.share_buffers(self.model)
                except Interrupted:
                    self.spending.add(window.result)
                    self._check_finite(self.sums["loss"])
                    self._save_checkpoint()
                    raise
                self.spending.add(window.result)
                record = self._end_epoch(meter)
                joules = record["joules"]["train"]
                progress.note(
                    f"epoch {self.epoch}/{self.recipe.epochs} loss {record['train']['loss']:.4f} "
                    f"accuracy {record['eval']['accuracy']:.4f} ({record['eval']['split']}) "
                    f"open {record['open_ratio']:.3f} MACs {record['macs'] / self.search.macs:.3f}"
                    + ("" if joules is None else f" energy {joules:.0f} J")
                )

    def decide(self) -> Decisions:
        """Decisions of the gates over the training images, without augmentation; with a target those that meet it."""
        return self.search.decide(self.batches(self.dataset.train, shared=True), self.dtype)

    def _enter_phase(self) -> None:
        """At the start of an epoch: hold the gates open, let them live, or make decisions final, as the epoch asks."""
        if self.step or self.search.over:
            return
        if self.search.settles_at(self.epoch):
            decisions = self.decide()
            if distributed.is_main():
                decisions.to_json(self.folder / "decisions.json")
            self.make_final({name: gate.open for name, gate in decisions.items()})
        else:
            self.make_final(self.search.enter(self.epoch, self.history))

    def make_final(self, decisions: Mapping[str, Tensor]) -> None:
        """Freeze gates for good, bool `[gates]` by name; what they close leaves the network if the recipe says so."""
        if decisions:
            x, _ = next(iter(self.batches(self.dataset.test)))
            self.search.make_final(decisions, self.optimizer, x)

    def _choose_kernels(self) -> None:
        """Measure the operations of the network that it is in this phase, in the first process, for all of them.

        What is chosen is written to the run folder: a resumed run takes it from there.
        """
        if choices.make_timer(self.device) is None or not self.search.gates or self.search.phase == self._chosen_for:
            return
        self._chosen_for = self.search.phase
        file = self.folder / "choices.json"

        def measure() -> list[dict[str, Any]]:
            if file.exists():
                choices.pin(json.loads(file.read_text()))
            evaluated = self.batches(self.dataset.test, shared=True).batch_size
            for mode, size in (("train", self.recipe.batch_size // distributed.count()), ("eval", evaluated)):
                x = torch.rand(size, *self.dataset.image_size, device=self.device)
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
                    tune(self.model, x.contiguous(memory_format=torch.channels_last), modes=[mode])
            write_atomically(file, json.dumps(choices.used(), indent=1) + "\n")
            return choices.used()

        choices.pin(distributed.from_main(measure))

    def _train_epoch(self, progress: RunProgress, interrupted: list[bool]) -> None:
        schedule = self._schedule()
        self.model.train()
        self.training_step.network = distributed.parallel(self.model)
        for x, y in self.train_batches.start_at(self.epoch, self.step):
            self.training_step(x, y, schedule[self.step])
            self.step += 1
            progress.step()
            if self.device.type == "cpu":  # a GPU would have to be waited for: there the epoch's end is soon enough
                self._check_finite(self.sums["loss"])
            alone = self.device.type == "cpu" or distributed.count() == 1  # GPUs of several processes wait here
            if (alone or self.step % _STEPS_BETWEEN_QUESTIONS == 0) and distributed.any_process(bool(interrupted)):
                raise Interrupted

    def _schedule(self) -> Tensor:
        """The numbers that the steps of this epoch take, a row for each, all copied to the device at once."""
        steps = len(self.train_batches)
        rows = [
            self.training_step.schedule(self._learning_rate_at(step), self.epoch + step / steps)
            for step in range(steps)
        ]
        # from pinned memory, so that the copy is not waited for
        table = torch.tensor(rows, dtype=torch.float32, pin_memory=self.device.type == "cuda")
        return table.to(self.device, non_blocking=True)

    def _learning_rate_at(self, step: int) -> float:
        return self.recipe.learning_rate_at(self.epoch + (step + 0.5) / len(self.train_batches))

    def _check_finite(self, total: Tensor) -> None:
        if not torch.isfinite(total):
            kept = self.folder / "checkpoint.pt"
            last = f"the last good checkpoint is {kept}" if kept.exists() else "no epoch was finished before"
            raise NonFiniteLoss(
                f"the loss is not finite in epoch {self.epoch + 1} by step {self.step}; {last}. Lower learning_rate "
                f"({self.recipe.learning_rate}), raise warmup_epochs, or use precision fp32"
            )

    def _end_epoch(self, meter: EnergyMeter) -> dict[str, Any]:
        self._check_finite(self.sums["loss"])
        steps = len(self.train_batches)
        split = "test" if self.dataset.validation is None else "validation"
        images = self.dataset.test if self.dataset.validation is None else self.dataset.validation
        with meter.window("eval") as window:
            evaluated = evaluate(self.model, self.batches(images, shared=True), self.dtype)
        evaluation = Spending()
        evaluation.add(window.result)
        self._check_finite(torch.tensor(evaluated["loss"]))
        sums = distributed.average(self.sums)
        means = {name: sums[f"gate:{name}"] / steps for name in self.search.live}
        record = {
            "epoch": self.epoch + 1,
            "train": {
                **{name: float(sums[name]) / steps for name in SUMS[:-1]},
                "accuracy": float(sums["correct"]) / (steps * self.recipe.batch_size),
            },
            "eval": {"split": split, **evaluated},
            **self.search.describe(means),
            "macs_training": self._macs_so_far(steps * self.recipe.batch_size),
            "learning_rate": self._learning_rate_at(steps - 1),
            **describe_epoch(self.spending, evaluation, self.history),
        }
        self.history.append(record)
        self.epoch, self.step, self.spending = self.epoch + 1, 0, Spending()
        for value in self.sums.values():
            value.zero_()  # a captured step adds to these very tensors
        # metrics first: a kill between the two repeats the epoch, and its line is then replaced
        if distributed.is_main():
            write_atomically(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))
        if self.logger is not None:
            self.logger.log(record)
        self._save_checkpoint()
        return record

    def _macs_so_far(self, images: int) -> dict[str, int]:
        """MACs of training, forward passes: per image now, in all epochs so far, and in all with every gate open."""
        before = self.history[-1]["macs_training"] if self.history else {"total": 0, "all_open_total": 0}
        return {
            "per_image": self.search.macs_training,
            "total": before["total"] + self.search.macs_training * images,
            "all_open_total": before["all_open_total"] + self.search.macs * images,
        }

    def _new_sums(self) -> dict[str, Tensor]:
        sums = {name: torch.zeros((), device=self.device) for name in SUMS}
        return sums | {
            f"gate:{name}": torch.zeros(gate.gates, device=self.device) for name, gate in self.search.gates.items()
        }

    def _build_optimizer(self) -> torch.optim.SGD:
        recipe = self.recipe
        in_gates = {id(p) for gate in self.search.gates.values() for p in gate.parameters()}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.model.parameters() if id(p) not in in_gates]},
            {
                "params": [p for p in self.model.parameters() if id(p) in in_gates],
                "weight_decay": recipe.gate_weight_decay,
            },
        ]
        return torch.optim.SGD(
            [group for group in groups if group["params"]],
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov and recipe.momentum > 0,
            weight_decay=recipe.weight_decay,
            fused=True if self.device.type == "cuda" else None,
        )

    def _save_checkpoint(self) -> None:
        state = {
            "recipe": asdict(self.recipe),
            "image_size": list(self.dataset.image_size),
            "num_classes": self.dataset.num_classes,
            "search": self.search.state(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "sums": distributed.average(self.sums),
            "spending": asdict(self.spending),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        if distributed.is_main():
            save_checkpoint(self.folder / "checkpoint.pt", state)
        distributed.wait()  # nobody leaves, or ends, before it is whole

    def _restore(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return  # killed before the first epoch was saved: start over
        state = load_checkpoint(path, self.device)
        if recipe_from_dict(state["recipe"]) != self.recipe:
            raise ValueError(f"{path}: it belongs to another recipe than {self.folder / 'config.json'}")
        self.search.restore(state["search"], self.optimizer)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        # checkpoints written before energy was metered know their seconds only
        unmetered = {"seconds": state.get("seconds"), "microjoules": None, "error_bound_joules": None}
        self.sums, self.spending = state["sums"], Spending(**state.get("spending", unmetered))
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        self.history = [record for record in map(json.loads, lines) if record["epoch"] <= self.epoch]


@contextmanager
def _deferred_interrupt() -> Iterator[list[bool]]:
    """While active, a first Ctrl-C only fills the yielded list; a second one interrupts at once."""
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
