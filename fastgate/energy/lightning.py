"""Energy of a Lightning run: `Trainer(callbacks=[EnergyCallback()])`. Needs the package lightning."""

from typing import Any

import lightning.pytorch as pl

from fastgate.energy.meter import EnergyMeter
from fastgate.energy.timeline import Timeline


class EnergyCallback(pl.Callback):
    """Meters every epoch, training and validation apart, and logs their joules.

    Each process meters its own device. The work is waited for at the ends of epochs and validations only.

    Args:
        meter: default: one for the device that Lightning trains on.

    Attributes:
        history: one entry per epoch: epoch, and joules, seconds, source and warnings of "train" and "validation".
    """

    def __init__(self, meter: EnergyMeter | None = None) -> None:
        self.history: list[dict[str, Any]] = []
        self._given = meter
        self._meter: EnergyMeter | None = None
        self._timeline: Timeline | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the meter, once the device is known."""
        self._meter = self._given or EnergyMeter(trainer.strategy.root_device)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin an epoch."""
        if self._meter is not None:
            self._timeline = Timeline(self._meter)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What came before in this epoch was training."""
        if self._timeline is not None:
            self._timeline.end_phase("train")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Back to training."""
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
        """An epoch that failed is not logged."""
        self._timeline = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the meter back, unless it was given."""
        self._timeline = None
        if self._meter is not None and self._meter is not self._given:
            self._meter.close()
        self._meter = None
