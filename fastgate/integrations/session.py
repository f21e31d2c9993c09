"""A search inside another package's trainer: what its callbacks share."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sized
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from fastgate import processes
from fastgate.gates import named_gates
from fastgate.models.attachment import attach
from fastgate.pruning.compaction import cut_frozen
from fastgate.pruning.config import Phase, SearchConfig
from fastgate.pruning.parallel import renew, wrappers_of
from fastgate.pruning.search import GateSearch
from fastgate.pruning.storage import load, save
from fastgate.values import Forward, tensors_in, with_tensors

FILE = "small.safetensors"


class Session:
    """Adds gates to a network, searches while somebody else trains it, and leaves the compact network.

    A callback for another package's trainer derives from it.

    Args:
        config: when gates are open, live and final, and the target.
        gating: "layer", "channel" or "both", of the gates that are added; a network that has gates keeps those.
        calibration: batches that gates are decided over; None reads the training data set in order.
        forward: `(model, batch) -> anything`, for networks that are called otherwise.
        gate_options: of :func:`fastgate.attach`.

    Attributes:
        search: None before training begins.
        small: the compact network, once training has ended.
    """

    def __init__(
        self,
        config: SearchConfig | None = None,
        gating: str = "layer",
        *,
        calibration: Iterable[Any] | None = None,
        forward: Forward | None = None,
        **gate_options: Any,
    ) -> None:
        self.config = config or SearchConfig()
        self.gating = gating
        self.forward = forward
        self.gate_options = gate_options
        self.search: GateSearch | None = None
        self.small: nn.Module | None = None
        self._calibration = calibration
        self._loader: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Session":
        """Itself: a copy of the network, whose hooks know it, leaves optimizer, loader and data where they are."""
        return self

    def add_gates(self, model: nn.Module) -> None:
        """Add gates to a network that has none: before its optimizer is made."""
        if self.search is None and not any(named_gates(model)):
            attach(model, self.gating, **self.gate_options)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; empty before training begins."""
        if self.search is None:
            return {}
        return {"gating": self.gating, "gate_options": self.gate_options, "search": self.search.state_dict()}

    def restore(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Bring a network that is freshly made, with its gates, to the shape it had when `state` was saved.

        Raises:
            ValueError: the state of another search, or a network that has been cut otherwise.
        """
        kept = state["search"]
        if self.search is not None and self.search.model is model:
            if {name: x.tolist() for name, x in self.search.final.items()} != {
                name: x.tolist() for name, x in kept["final"].items()
            }:
                raise ValueError(
                    "checkpoint: expected one of the network as it is, got one of an earlier or later shape; make the "
                    "network anew and load into that"
                )
            return
        search = GateSearch(
            model, kept["example"], None, epochs=kept["epochs"], config=self.config, forward=self.forward
        )
        search.load_state_dict(kept)
        self.search = search

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, loader: Any) -> None:
        """Training begins: the search is made, unless it goes on.

        Raises:
            ValueError: a run that goes on with another number of epochs, or see :class:`fastgate.GateSearch`.
        """
        self._loader = loader
        if self._calibration is None:
            self._calibration = in_order(loader)
        if self.search is None:
            batch = first_batch(self._calibration)
            inputs = batch[0] if self.forward is None and isinstance(batch, tuple | list) else batch
            example = with_tensors(inputs, [x[:1] if x.dim() else x for x in tensors_in(inputs)])
            self.search = GateSearch(model, example, optimizer, epochs=epochs, config=self.config, forward=self.forward)
        elif self.search.epochs != epochs:
            raise ValueError(f"epochs: expected {self.search.epochs} as the run began with, got {epochs}")
        else:
            self.search.use(optimizer)

    def begin_epoch(self, epoch: int) -> list[str]:
        """The gates' part of an epoch; wrappers of the network are made anew, in place, where it was cut."""
        if self.search is None:
            raise ValueError("search: expected training to have begun")
        names = self.search.begin_epoch(epoch, self._calibration)
        if names and self.search.config.compact_training:
            for wrapper in wrappers_of(self.search.model):
                renew(wrapper)
        return names

    def refresh(self) -> None:
        """At the end of an epoch: the evaluation that may follow sees the network as it is now, see `GateSearch`."""
        if self.search is not None and isinstance(self._loader, DataLoader):
            self.search.refresh(in_order(self._loader, shuffled_by=self.search.epoch))

    def end(self, folder: str | os.PathLike[str]) -> None:
        """Training has ended: make the compact network, and write it to the folder where a file can describe it.

        Where it ended early (early stopping, a limit of time), gates that are not final are decided now, with a
        warning; gates that were still held open have learned nothing, and no network is made.
        """
        if self.search is None:
            return
        if self.search.epoch + 1 < self.search.epochs and self.search.phase is not Phase.SETTLED:
            left = f"training ended in epoch {self.search.epoch + 1} of {self.search.epochs}"
            if self.search.phase is Phase.OPEN:
                warnings.warn(f"{left}, in which gates were held open: there is no compact network", stacklevel=2)
                return
            warnings.warn(f"{left}, before every gate was decided: the rest is decided now", stacklevel=2)
        self.small = self.search.compact(self._calibration)
        if not processes.is_main():
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        path, reasons = Path(folder) / FILE, []
        for network in (self.small, *self._children()):
            try:
                save(network, path)
                load(path)
            except ValueError as error:
                reasons.append(str(error))
            else:
                return
        path.unlink(missing_ok=True)
        with suppress(ValueError):  # the whole model, for load(path, classes=...)
            save(self.small, path)
        left = "read it with fastgate.load(path, classes=[...])" if path.exists() else "it was not written"
        warnings.warn(
            f"{path}: expected a network that a file can describe by itself, got one of which fastgate says: "
            f"{reasons[0]}; {left}. The compact network is the callback's attribute `small`",
            stacklevel=2,
        )

    def _children(self) -> list[nn.Module]:
        """The only child that has the gates: the network inside a module that knows how to train it."""
        if self.search is None or self.small is None:
            return []
        names = {name.split(".", maxsplit=1)[0] for name in self.search.gates}
        return [getattr(self.small, names.pop())] if len(names) == 1 else []


def restore_shape(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Bring a plain network to the shape it had when a :class:`Session` was saved, to load its weights."""
    if not any(named_gates(model)):
        attach(model, state["gating"], **state["gate_options"])
    gates = dict(named_gates(model))
    for name, opened in state["search"]["final"].items():
        gates[name].freeze(opened)
    if state["search"]["config"]["compact_training"]:
        cut_frozen(model)


def first_batch(batches: Iterable[Any]) -> Any:
    """The first batch, with the random numbers that it took given back.

    Raises:
        ValueError: there is none.
    """
    with torch.random.fork_rng(devices=[]):  # loaders draw from the CPU's
        for batch in batches:
            return batch
    raise ValueError("calibration: expected at least one batch, got none")


def in_order(loader: Any, shuffled_by: int | None = None) -> Iterable[Any]:
    """A loader's data in order and once, for this process its own part; the loader itself is left alone.

    Args:
        loader: of training.
        shuffled_by: a seed, for data in random order instead.

    Raises:
        TypeError: what is trained on is no `DataLoader`.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"calibration: expected training data in one DataLoader to take it from, got {type(loader).__name__}; pass "
            "calibration=, a loader of training images"
        )
    dataset: Any = loader.dataset
    if not isinstance(dataset, IterableDataset) and isinstance(dataset, Sized):
        own = range(processes.rank(), len(dataset), processes.count())
        dataset = Subset(dataset, own)  # type: ignore[arg-type]
    size = loader.batch_size or getattr(getattr(loader, "batch_sampler", None), "batch_size", None) or 1
    options: dict[str, Any] = {"collate_fn": loader.collate_fn, "num_workers": loader.num_workers}
    if shuffled_by is not None and isinstance(dataset, Subset):
        options |= {
            "shuffle": True,
            "generator": torch.Generator().manual_seed(shuffled_by),
            "drop_last": len(dataset) >= size,
        }
    return DataLoader(dataset, size, **options)
