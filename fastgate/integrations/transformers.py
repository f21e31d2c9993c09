"""Callbacks for Hugging Face: `Trainer(..., callbacks=[GateSearchCallback(), EnergyCallback()])`.

Needs the packages transformers and accelerate.
"""

import inspect
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastgate.energy.meter import EnergyMeter
from fastgate.energy.timeline import Timeline
from fastgate.integrations.session import Session
from fastgate.pruning.config import SearchConfig

# name of the module that stores the search in the model's state_dict, and so in every checkpoint
_CARRIER = "fastgate_search"


class _Carrier(nn.Module):
    """Stores the state of a search as bytes in a buffer of the model."""

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.empty(0, dtype=torch.uint8))

    def put(self, state: Mapping[str, Any]) -> None:
        """Store a state."""
        file = io.BytesIO()
        torch.save(dict(state), file)
        self.state = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8).to(self.state.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # may have any length
        self.state = state_dict[f"{prefix}state"].to(self.state.device)


class GateSearchCallback(Session, TrainerCallback):
    """Prunes a network while a Hugging Face `Trainer` trains it; just pass `callbacks=[GateSearchCallback()]`.

    Gates are added when the trainer is created, unless the model has some already; their losses are added to the loss
    that the model returns. Gates may become final at the start of an epoch; their closed parts are then removed from
    the model and the optimizer. Checkpoints include the search in the model's state, and a resumed run
    (`resume_from_checkpoint`) continues it. After training, the compact network is in :attr:`small` and, if a file can
    describe it, in `small.safetensors` in the output folder. The log history contains `gates_open_ratio`, `gates_macs`
    and `gates_polarization`.

    The weight decay of `TrainingArguments` also applies to the gates' weights.

    Args: see :class:`~fastgate.integrations.session.Session`; without `forward`, the model is called with a batch as
    keyword arguments.
    """

    def __init__(self, config: SearchConfig | None = None, gating: str = "layer", **options: Any) -> None:
        super().__init__(config, gating, **options)
        self._handles: list[Any] = []
        self._state: TrainerState | None = None
        self._accumulated = 1  # divisor of the gate losses under gradient accumulation
        self._reached = False  # whether the gate losses have been added to a loss of the model

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the gates, before the optimizer is created or a checkpoint is loaded."""
        model = kwargs["model"]
        if args.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor: expected 0, got "
                f"{args.label_smoothing_factor}, with which the Trainer ignores the model's loss and the gate losses "
                "added to it; smooth in the model, for example torch.nn.CrossEntropyLoss(label_smoothing=...)"
            )
        self.add_gates(model)
        carrier = _Carrier()
        model.add_module(_CARRIER, carrier)
        self._handles = [
            model.register_forward_hook(self._add_losses),
            model.register_state_dict_pre_hook(lambda *_: carrier.put(self.state_dict())),
            model.register_load_state_dict_pre_hook(self._restore),
        ]

    def _restore(self, model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        kept = state_dict.get(f"{prefix}{_CARRIER}.state")
        if kept is not None and kept.numel():
            state = torch.load(io.BytesIO(kept.cpu().numpy().tobytes()), weights_only=True)
            if state:
                self.restore(model, state)

    def _add_losses(self, model: nn.Module, inputs: Any, outputs: Any) -> Any:
        """Add the gate losses to the loss in the model's outputs, in training."""
        if self.search is None or self._state is None or not (model.training and torch.is_grad_enabled()):
            return None
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if loss is None:
            return None
        self._reached = True
        epoch = float(self._state.epoch or 0.0)
        extra = self.search.loss(min(max(epoch - self.search.epoch, 0.0), 1.0)) / self._accumulated
        outputs["loss"] = loss + extra
        return outputs

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin or resume the search."""
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        self._state = state
        self.begin(model, kwargs["optimizer"], int(state.num_train_epochs), loader)
        # if the model's loss is normalized over all accumulated steps, the Trainer does not divide it by their number
        parameters = inspect.signature(model.forward).parameters.values()
        takes_items = getattr(model, "accepts_loss_kwargs", None)
        if takes_items is None:
            takes_items = any(each.kind is each.VAR_KEYWORD for each in parameters)
        self._accumulated = args.gradient_accumulation_steps if takes_items else 1

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin an epoch of the search."""
        self.begin_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that the gate losses reach the model's loss."""
        if not self._reached:
            raise ValueError(
                "GateSearchCallback: expected a model that returns its loss in a dictionary or ModelOutput, got none; "
                "add labels to the data set, or use fastgate.GateSearch in your own compute_loss"
            )

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Recompute running statistics, for an evaluation, and log the gate metrics."""
        self.refresh()
        if self.search is not None:
            metrics = self.search.metrics()
            logged = {f"gates_{name}": float(metrics[name]) for name in ("open_ratio", "macs", "polarization")}
            state.log_history.append({"epoch": state.epoch, "step": state.global_step, **logged})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Create and save the compact network, and remove the callback's hooks and state from the model."""
        for handle in self._handles:
            handle.remove()
        delattr(kwargs["model"], _CARRIER)
        self.end(str(args.output_dir))


class EnergyCallback(TrainerCallback):
    """Meters every epoch, training and evaluation separately, and adds their joules to the trainer's log history.

    Each process meters its own device. The device is synchronized only at the end of epochs and evaluations.

    Args:
        meter: default: a meter for the device that the trainer uses.

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
        """Create the meter, now that the device is known."""
        self._meter = self._given or EnergyMeter(args.device)
        self._timeline, self._phase = Timeline(self._meter), "train"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End a training phase before an evaluation, which has no begin event but follows a step that requests it."""
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
        """Close the meter, unless it was passed in."""
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
