"""Hugging Face: `Trainer(..., callbacks=[GateSearchCallback(), EnergyCallback()])`. Needs transformers, accelerate."""

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

# the module that carries the search in the model's state, so that it is in every checkpoint beside the weights
_CARRIER = "fastgate_search"


class _Carrier(nn.Module):
    """The state of a search as bytes, in a buffer of the model."""

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.empty(0, dtype=torch.uint8))

    def put(self, state: Mapping[str, Any]) -> None:
        """Replace it."""
        file = io.BytesIO()
        torch.save(dict(state), file)
        self.state = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8).to(self.state.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # of any length
        self.state = state_dict[f"{prefix}state"].to(self.state.device)


class GateSearchCallback(Session, TrainerCallback):
    """Prunes a network while a Hugging Face `Trainer` trains it; `callbacks=[GateSearchCallback()]` is all it takes.

    Gates are added when the trainer is made, unless the model has some; their losses are added to the loss that the
    model returns. At each epoch's start gates may become final, and what they closed leaves the model and the
    optimizer. Checkpoints hold the search in the model's state; a run that goes on (`resume_from_checkpoint`) does so
    from there. Training ends with the compact network in :attr:`small` and, where a file can describe it, in
    `small.safetensors` in the output folder. In the log history: `gates_open_ratio`, `gates_macs` and
    `gates_polarization`.

    The weight decay of `TrainingArguments` counts for the weights of the gates too.

    Args: see :class:`~fastgate.integrations.session.Session`; without `forward` the model is called with a batch's
    keywords.
    """

    def __init__(self, config: SearchConfig | None = None, gating: str = "layer", **options: Any) -> None:
        super().__init__(config, gating, **options)
        self._handles: list[Any] = []
        self._state: TrainerState | None = None
        self._accumulated = 1  # steps that a loss is divided by
        self._reached = False  # whether a loss of the model has taken those of the gates

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the gates, before the optimizer is made or a checkpoint loaded."""
        model = kwargs["model"]
        if args.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor: expected 0, got "
                f"{args.label_smoothing_factor}: the Trainer then ignores the model's loss, to which those of the "
                "gates are added; smooth in the model, for example torch.nn.CrossEntropyLoss(label_smoothing=...)"
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
        """The model's outputs with the gate losses in its loss, in training."""
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
        """Begin the search, or go on with it."""
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        self._state = state
        self.begin(model, kwargs["optimizer"], int(state.num_train_epochs), loader)
        # a loss that counts the items of all accumulated steps is not divided by their number afterwards
        parameters = inspect.signature(model.forward).parameters.values()
        takes_items = getattr(model, "accepts_loss_kwargs", None)
        if takes_items is None:
            takes_items = any(each.kind is each.VAR_KEYWORD for each in parameters)
        self._accumulated = args.gradient_accumulation_steps if takes_items else 1

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The gates' part of the epoch."""
        self.begin_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make sure that the gates learn."""
        if not self._reached:
            raise ValueError(
                "GateSearchCallback: expected a model that returns its loss in a dictionary or ModelOutput, got none; "
                "give the data set labels, or use fastgate.GateSearch in an own compute_loss"
            )

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make running statistics those of the network as it is, for an evaluation, and log what the gates do."""
        self.refresh()
        if self.search is not None:
            metrics = self.search.metrics()
            logged = {f"gates_{name}": float(metrics[name]) for name in ("open_ratio", "macs", "polarization")}
            state.log_history.append({"epoch": state.epoch, "step": state.global_step, **logged})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the compact network and write it, and leave the model without what the callback added."""
        for handle in self._handles:
            handle.remove()
        delattr(kwargs["model"], _CARRIER)
        self.end(str(args.output_dir))


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
