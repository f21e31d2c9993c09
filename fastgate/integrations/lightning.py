"""Callbacks for Lightning: `Trainer(callbacks=[GateSearchCallback(), EnergyCallback()])`. Needs the package lightning.

Importing this module replaces `LightningModule.load_from_checkpoint` with :func:`load_from_checkpoint`, which also
reads checkpoints of networks that were pruned in training.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from fastgate.energy.meter import EnergyMeter
from fastgate.energy.timeline import Timeline
from fastgate.gates import named_gates
from fastgate.integrations.session import Session, restore_shape
from fastgate.pruning.config import SearchConfig
from fastgate.values import Forward


class _Method:
    """A wrapped method of a module; a copy of the module has the original method."""

    def __init__(self, wrapper: Callable[..., Any], module: pl.LightningModule, name: str) -> None:
        self.wrapper, self.module, self.name = wrapper, module, name
        self.original = getattr(module, name)
        self.__wrapped__ = self.original  # Lightning checks it to see whether a module overrides the method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapper(self.module, self.original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # the wrapper refers to the trainer, and through it to the whole run, which must not be copied
        return MethodType(getattr(type(self.module), self.name), memo[id(self.module)])


class GateSearchCallback(Session, pl.Callback):
    """Prunes the network of a `LightningModule` during an ordinary `trainer.fit(model)`.

    Gates are added before the optimizer is created, unless the module has some already; their losses are added to the
    result of `training_step`. Gates may become final at the start of an epoch; their closed parts are then removed from
    the network and the optimizer. Checkpoints include the search, and a resumed run (`ckpt_path`) continues it. After
    training, the compact network is in :attr:`small` and, if a file can describe it, in `small.safetensors` in the
    trainer's folder. Logged once per epoch: `gates/open_ratio`, `gates/macs` and `gates/polarization`.

    The optimizer's weight decay also applies to the gates' parameters; to exempt them, add the gates in the module
    itself and pass :func:`fastgate.parameter_groups` to the optimizer.

    Args:
        config, gating, calibration, forward, gate_options: see :class:`~fastgate.integrations.session.Session`; without
            `forward`, the module, or its child that has the gates, is called with a batch's first item.
        folder: folder for the compact network; None: the trainer's `default_root_dir`.
    """

    def __init__(
        self,
        config: SearchConfig | None = None,
        gating: str = "layer",
        *,
        folder: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, gating, **options)
        self._folder = folder
        self._wrapped: list[str] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wrap the module's methods before a checkpoint is loaded or the optimizer is created."""
        if not self._wrapped:
            self._wrap(pl_module, "on_load_checkpoint", self._loading)
            self._wrap(pl_module, "configure_optimizers", self._configuring)
            self._wrap(pl_module, "training_step", functools.partial(self._training, trainer))

    def _wrap(self, module: pl.LightningModule, name: str, wrapper: Callable[..., Any]) -> None:
        """Replace a method of the module by the wrapper, which is passed the original; undone by :meth:`teardown`."""
        setattr(module, name, _Method(wrapper, module, name))
        self._wrapped.append(name)

    def _loading(self, module: pl.LightningModule, original: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        if state := checkpoint.get("callbacks", {}).get(self.state_key):
            self._add_gates(module)
            self.restore(module, state)
        original(checkpoint)

    def _configuring(self, module: pl.LightningModule, original: Callable[..., Any]) -> Any:
        self._add_gates(module)
        return original()

    def _add_gates(self, module: pl.LightningModule) -> None:
        self.add_gates(module)
        if self.forward is None and type(module).forward is pl.LightningModule.forward:
            self.forward = _only_child_with_gates(module)

    def _training(
        self, trainer: pl.Trainer, module: pl.LightningModule, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The module's training step plus the gate losses."""
        output, search = original(*args, **kwargs), self.search
        if search is None or output is None:
            return output
        if not module.automatic_optimization:
            raise ValueError(
                "GateSearchCallback: expected automatic optimization, got a module that calls backward itself; use "
                "fastgate.GateSearch in its training_step"
            )
        extra = search.loss(trainer.fit_loop.batch_idx / max(trainer.num_training_batches, 1))
        if isinstance(output, Tensor):
            return output + extra
        return {**output, "loss": output["loss"] + extra}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin or resume the search."""
        if len(trainer.optimizers) != 1:
            raise ValueError(f"optimizers: expected one that the search can prune, got {len(trainer.optimizers)}")
        if trainer.max_epochs is None or trainer.max_epochs < 1:
            raise ValueError(
                f"max_epochs: expected a number of epochs, to which the phases of the search are relative, got "
                f"{trainer.max_epochs}"
            )
        self.begin(pl_module, trainer.optimizers[0], trainer.max_epochs, trainer.train_dataloader)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin an epoch of the search."""
        self.begin_epoch(trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Recompute running statistics after the last batch, before the validation."""
        if batch_idx + 1 == trainer.num_training_batches:
            self.refresh()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the gate metrics."""
        if self.search is None:
            return
        metrics = self.search.metrics()
        logged = {f"gates/{name}": float(metrics[name]) for name in ("open_ratio", "macs", "polarization")}
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Create the compact network and save it."""
        self.end(self._folder or trainer.default_root_dir)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the module's own methods."""
        for name in self._wrapped:
            pl_module.__dict__.pop(name, None)
        self._wrapped = []


def _only_child_with_gates(module: nn.Module) -> Forward:
    """Forward for a module without one: calls its child that has the gates with a batch's first item."""
    names = {name.split(".", maxsplit=1)[0] for name, _ in named_gates(module)}
    if len(names) != 1:
        raise ValueError(
            f"forward: expected a LightningModule with a forward, got one whose gates are in {', '.join(names)}; pass "
            "forward= to the callback, a function (module, batch) that calls the network"
        )
    name = names.pop()

    def forward(module: nn.Module, batch: Any) -> Any:
        return getattr(module, name)(batch[0] if isinstance(batch, tuple | list) else batch)

    return forward


def load_from_checkpoint(module_class: type[pl.LightningModule], *args: Any, **kwargs: Any) -> Any:
    """`module_class.load_from_checkpoint(...)` that also supports networks pruned by a :class:`GateSearchCallback`.

    The module is created again, pruned to the shape it had, and loaded; gates that were live are still in it.
    """
    original, own = module_class.on_load_checkpoint, vars(module_class).get("on_load_checkpoint")

    def with_shape(self: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        states: Mapping[str, Any] = checkpoint.get("callbacks", {})
        for state in states.values():
            if isinstance(state, Mapping) and {"gating", "gate_options", "search"} <= state.keys():
                restore_shape(self, state)
        original(self, checkpoint)

    module_class.on_load_checkpoint = with_shape
    try:
        return _load(module_class, *args, **kwargs)
    finally:
        if own is None:
            del module_class.on_load_checkpoint
        else:
            module_class.on_load_checkpoint = own


_LIGHTNINGS = vars(pl.LightningModule)["load_from_checkpoint"]


def _load(module_class: type[pl.LightningModule], *args: Any, **kwargs: Any) -> Any:
    return _LIGHTNINGS.__get__(None, module_class)(*args, **kwargs)


pl.LightningModule.load_from_checkpoint = classmethod(load_from_checkpoint)


class EnergyCallback(pl.Callback):
    """Meters every epoch, training and validation separately, and logs their joules.

    Each process meters its own device. The device is synchronized only at the end of epochs and validations.

    Args:
        meter: default: a meter for the device that Lightning trains on.

    Attributes:
        history: one entry per epoch: epoch, and joules, seconds, source and warnings of "train" and "validation".
    """

    def __init__(self, meter: EnergyMeter | None = None) -> None:
        self.history: list[dict[str, Any]] = []
        self._given = meter
        self._meter: EnergyMeter | None = None
        self._timeline: Timeline | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Create the meter, now that the device is known."""
        self._meter = self._given or EnergyMeter(trainer.strategy.root_device)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin an epoch."""
        if self._meter is not None:
            self._timeline = Timeline(self._meter)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End a training phase."""
        if self._timeline is not None:
            self._timeline.end_phase("train")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the validation phase."""
        if self._timeline is not None:
            self._timeline.end_phase("validation")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the epoch."""
        if self._timeline is None:
            return
        self._timeline.end_phase("train")
        phases = {phase: self._timeline.collect(phase) for phase in ("train", "validation")}
        self._timeline = None
        self.history.append({"epoch": trainer.current_epoch, **phases})
        joules = {f"energy/{name}_joules": phase["joules"] for name, phase in phases.items()}
        known = {name: value for name, value in joules.items() if value is not None}
        for logger in trainer.loggers if known else []:
            logger.log_metrics(known, step=trainer.global_step)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Discard the failed epoch."""
        self._timeline = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the meter, unless it was passed in."""
        self._timeline = None
        if self._meter is not None and self._meter is not self._given:
            self._meter.close()
        self._meter = None
