"""Energy of a Hugging Face run: `Trainer(..., callbacks=[EnergyCallback()])`. Needs transformers and accelerate."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastgate.energy.meter import EnergyMeter
from fastgate.energy.timeline import Timeline


class EnergyCallback(TrainerCallback):
    """Meters every epoch, training and evaluation apart, and adds their joules to the trainer's log history.

    Each process meters its own device. The work is waited for at the ends of epochs and evaluations only.

    Args:
        meter: default: one for the device that the trainer uses.

    Attributes:
        history: one entry per epoch of training ("train") and per evaluation in it ("eval"): epoch, step, phase,
            joules, seconds, source and warnings.
    """

    def __init__(self, meter: EnergyMeter | None = None) -> None:
        self.history: list[dict[str, Any]] = []
        self._given = meter
        self._meter: EnergyMeter | None = None
        self._timeline: Timeline | None = None
        self._phase = "train"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the meter, once the device is known."""
        self._meter = self._given or EnergyMeter(args.device)
        self._timeline, self._phase = Timeline(self._meter), "train"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """There is no event where an evaluation begins: it follows a step, or an epoch, that asks for one."""
        if self._timeline is not None and control.should_evaluate:
            self._timeline.end_phase(self._phase)
            self._phase = "eval"

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the epoch's training."""
        if self._timeline is not None:
            self._timeline.end_phase(self._phase)
            self._record(state, "train")
            self._phase = "eval" if control.should_evaluate else "train"

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record an evaluation."""
        if self._timeline is not None and self._phase == "eval":
            self._timeline.end_phase("eval")
            self._record(state, "eval")
            self._phase = "train"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the meter back, unless it was given."""
        self._timeline = None
        if self._meter is not None and self._meter is not self._given:
            self._meter.close()
        self._meter = None

    def _record(self, state: TrainerState, phase: str) -> None:
        if self._timeline is None:
            return
        record = {"epoch": state.epoch, "step": state.global_step, "phase": phase, **self._timeline.collect(phase)}
        self.history.append(record)
        state.log_history.append(
            {"epoch": state.epoch, "step": state.global_step, f"energy_{phase}_joules": record["joules"]}
        )
