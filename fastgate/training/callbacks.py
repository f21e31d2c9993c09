"""Callbacks of a training run: a base class with every event, and those that the command line uses."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastgate import processes
from fastgate.energy import EnergyMeter
from fastgate.files import write_atomically
from fastgate.ops import choices
from fastgate.pruning.config import Phase
from fastgate.training.checkpoint import save_checkpoint
from fastgate.training.loggers import TensorBoardLogger
from fastgate.training.progress import RunProgress
from fastgate.training.records import EpochRecord
from fastgate.training.run_folder import CHECKPOINT, CHOICES, DECISIONS, METRICS
from fastgate.training.spending import Spending, describe_epoch
from fastgate.tuning import tune

if TYPE_CHECKING:
    from fastgate.training.trainer import Trainer


class Callback:
    """Events of a :class:`~fastgate.training.trainer.Trainer`, in the order of a run; by default each does nothing.

    With several processes each has callbacks of its own; only those of the main process may write.
    """

    def on_fit_begin(self, trainer: "Trainer") -> None:
        """Training begins or resumes."""

    def on_epoch_begin(self, trainer: "Trainer") -> None:
        """Before the gates' part of an epoch, also when a run resumes in the middle of one."""

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Before the first step, after the gates' part: what it prunes has left the network."""

    def on_step_end(self, trainer: "Trainer") -> None:
        """After every step; on a GPU it may still be running."""

    def on_train_end(self, trainer: "Trainer") -> None:
        """After the last step of an epoch, or the last before an interruption."""

    def on_eval_begin(self, trainer: "Trainer") -> None:
        """Before the evaluation."""

    def on_eval_end(self, trainer: "Trainer") -> None:
        """After it."""

    def on_epoch_end(self, trainer: "Trainer", record: EpochRecord) -> None:
        """After an epoch, with its record, to add to or to write; `trainer.epoch` is already the next one."""

    def on_interrupt(self, trainer: "Trainer") -> None:
        """The run was interrupted between two steps and is about to end."""

    def on_fit_end(self, trainer: "Trainer") -> None:
        """Training has ended, or failed."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the callback: tensors, numbers, strings, and containers of these."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""


class Metering(Callback):
    """Seconds and joules of training and of evaluation, in every record as `seconds`, `joules` and `energy`."""

    def __init__(self) -> None:
        self._meter: EnergyMeter | None = None
        self._window = ExitStack()
        self._train, self._evaluation = Spending(), Spending()
        self._totals: dict[str, Any] = {"seconds": 0.0, "joules": 0.0}  # of the epochs before

    def on_fit_begin(self, trainer: "Trainer") -> None:
        """Make a meter."""
        self._meter = EnergyMeter(trainer.device)

    def _open(self, name: str, spending: Spending) -> None:
        if self._meter is not None:
            window = self._meter.window(name)
            self._window.callback(lambda: spending.add(window.result))
            self._window.enter_context(window)

    def on_epoch_begin(self, trainer: "Trainer") -> None:
        """Training begins."""
        self._open("train", self._train)

    def on_train_end(self, trainer: "Trainer") -> None:
        """Training ends."""
        self._window.close()

    def on_eval_begin(self, trainer: "Trainer") -> None:
        """Evaluation begins."""
        self._open("eval", self._evaluation)

    def on_eval_end(self, trainer: "Trainer") -> None:
        """Evaluation ends."""
        self._window.close()

    def on_epoch_end(self, trainer: "Trainer", record: EpochRecord) -> None:
        """Add what the epoch used."""
        record |= describe_epoch(self._train, self._evaluation, **self._totals)
        self._totals = {"seconds": record["seconds"]["total"], "joules": record["joules"]["total"]}
        self._train, self._evaluation = Spending(), Spending()

    def on_fit_end(self, trainer: "Trainer") -> None:
        """Close the meter; a window that a failure left open is discarded."""
        self._window.pop_all()
        if self._meter is not None:
            self._meter.close()
            self._meter = None

    def state_dict(self) -> dict[str, Any]:
        """What the epoch has used so far, and the run before it."""
        return {"train": asdict(self._train), "totals": dict(self._totals)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        self._train, self._totals = Spending(**state["train"]), dict(state["totals"])


class MetricsFile(Callback):
    """`metrics.jsonl`: a line of JSON for every epoch; and `decisions.json`, once every decision is final.

    Both are output only: a resumed run takes its history from its checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines = ""

    def on_fit_begin(self, trainer: "Trainer") -> None:
        """Restore the records of earlier epochs."""
        trainer.records = [json.loads(line) for line in self._lines.splitlines()]

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Write the decisions."""
        search = trainer.search
        if search is not None and search.phase is Phase.SETTLED and processes.is_main():
            text = search.decisions.to_json()
            path = self.folder / DECISIONS
            if not path.exists() or path.read_text() != text:
                write_atomically(path, text)

    def on_epoch_end(self, trainer: "Trainer", record: EpochRecord) -> None:
        """Rewrite all lines, before the checkpoint: a run killed between the two repeats the epoch and its line."""
        self._lines = "".join(json.dumps(line) + "\n" for line in trainer.records)
        if processes.is_main():
            write_atomically(self.folder / METRICS, self._lines)

    def state_dict(self) -> dict[str, Any]:
        """The lines."""
        return {"lines": self._lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._lines = state["lines"]


class TensorBoard(Callback):
    """Sends every record to a logger."""

    def __init__(self, logger: TensorBoardLogger) -> None:
        self.logger = logger

    def on_epoch_end(self, trainer: "Trainer", record: EpochRecord) -> None:
        """Log it, in the main process."""
        if processes.is_main():
            self.logger.log(record)


class Checkpoints(Callback):
    """Saves `checkpoint.pt` after every epoch and when a run is interrupted.

    Args:
        folder: of the run.
        extra: what else to keep in it, for its readers.
    """

    def __init__(self, folder: Path, extra: dict[str, Any] | None = None) -> None:
        self.path = folder / CHECKPOINT
        self.extra = dict(extra or {})

    def _save(self, trainer: "Trainer") -> None:
        state = {**self.extra, **trainer.state_dict()}
        if processes.is_main():
            save_checkpoint(self.path, state)
        processes.wait()  # no process goes on, or ends, before the file is whole

    def on_epoch_end(self, trainer: "Trainer", record: EpochRecord) -> None:
        """Save."""
        self._save(trainer)

    def on_interrupt(self, trainer: "Trainer") -> None:
        """Save in the middle of an epoch."""
        self._save(trainer)


class Progress(Callback):
    """Prints a line per epoch to standard error; in a terminal, with a live progress bar below.

    Args:
        title: what is being trained.
        notes: printed before the first step.
    """

    def __init__(self, title: str, notes: Sequence[str] = ()) -> None:
        self.title = title
        self.notes = notes
        self._bar: RunProgress | None = None

    def on_fit_begin(self, trainer: "Trainer") -> None:
        """Show the bar."""
        steps = len(trainer.train_loader)
        self._bar = RunProgress(self.title, trainer.epochs * steps, trainer.epoch * steps + trainer.step)
        self._bar.__enter__()
        for note in self.notes if trainer.epoch == trainer.step == 0 else ():
            self._bar.note(note)

    def on_step_end(self, trainer: "Trainer") -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.step()

    def on_epoch_end(self, trainer: "Trainer", record: EpochRecord) -> None:
        """Print the results of the epoch."""
        if self._bar is None:
            return
        parts = [f"epoch {record['epoch']}/{trainer.epochs} loss {record['train']['loss']:.4f}"]
        if "accuracy" in record.get("eval", {}):
            parts.append(f"accuracy {record['eval']['accuracy']:.4f} ({record['eval']['split']})")
        if trainer.search is not None and record["macs"] is not None:
            share = record["macs"] / trainer.search.macs
            parts.append(f"{record['phase']} open {record['open_ratio']:.3f} MACs {share:.3f}")
        if (joules := record.get("joules", {}).get("train")) is not None:
            parts.append(f"energy {joules:.0f} J")
        self._bar.note(" ".join(parts))

    def on_fit_end(self, trainer: "Trainer") -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


class KernelChoices(Callback):
    """Measures, on a GPU, which implementations of its operations the network uses in each configuration of its gates.

    The main process does so for all. The choice determines the order of summation, so it is kept in the run folder's
    `choices.json`, from which a resumed run reads it.

    Args:
        folder: of the run.
        image_size: (C, H, W).
        batch_sizes: by mode, "train" and "eval", of one process.
    """

    def __init__(self, folder: Path, image_size: tuple[int, int, int], batch_sizes: dict[str, int]) -> None:
        self.file = folder / CHOICES
        self.image_size = image_size
        self.batch_sizes = batch_sizes
        self._chosen_for: object = None

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Measure, if the configuration is new."""
        search = trainer.search
        if choices.make_timer(trainer.device) is None or search is None or search.configuration == self._chosen_for:
            return
        self._chosen_for = search.configuration

        def measure() -> list[dict[str, Any]]:
            if self.file.exists():
                choices.pin(json.loads(self.file.read_text()))
            for mode, size in self.batch_sizes.items():
                x = torch.rand(size, *self.image_size, device=trainer.device)
                with torch.autocast(trainer.device.type, trainer.dtype, enabled=trainer.dtype is not torch.float32):
                    tune(trainer.model, x.contiguous(memory_format=torch.channels_last), modes=[mode])
            write_atomically(self.file, json.dumps(choices.used(), indent=1) + "\n")
            return choices.used()

        choices.pin(processes.from_main(measure))
