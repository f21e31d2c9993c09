"""Base class of the callbacks that run a search inside another package's trainer."""

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
from fastgate.values import Forward, inputs_of, tensors_in, with_tensors

FILE = "small.safetensors"


class Session:
    """Adds gates to a network, runs a search while another trainer trains it, and provides the compact network.

    Callbacks for other trainers derive from it.

    Args:
        config: configuration of the search.
        gating: "layer", "channel" or "both": the gates to add; a network that has gates already keeps them.
        calibration: batches on which gates are decided; None reads the training data set in order.
        forward: `(model, batch) -> anything`, for networks with another calling convention.
        gate_options: passed to :func:`fastgate.attach`.

    Attributes:
        search: the search; None before training begins.
        small: the compact network, available after training.
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
        """Return itself: a copied network's hooks refer to it, and optimizer, loader and data must not be copied."""
        return self

    def add_gates(self, model: nn.Module) -> None:
        """Add gates to a network without any; call it before the optimizer is created."""
        if self.search is None and not any(named_gates(model)):
            attach(model, self.gating, **self.gate_options)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint; empty before training begins."""
        if self.search is None:
            return {}
        return {"gating": self.gating, "gate_options": self.gate_options, "search": self.search.state_dict()}

    def restore(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Prune a newly created network with gates to the shape it had when `state` was saved.

        Raises:
            ValueError: the state of another search, or a network that was pruned differently.
        """
        kept = state["search"]
        if self.search is not None and self.search.model is model:
            if {name: x.tolist() for name, x in self.search.final.items()} != {
                name: x.tolist() for name, x in kept["final"].items()
            }:
                raise ValueError(
                    "checkpoint: expected one of the network in its current shape, got one of an earlier or later "
                    "shape; create the network again and load into that"
                )
            return
        search = GateSearch(
            model, kept["example"], None, epochs=kept["epochs"], config=self.config, forward=self.forward
        )
        search.load_state_dict(kept)
        self.search = search

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, loader: Any) -> None:
        """Create the search at the start of training, or resume it.

        Raises:
            ValueError: a resumed run with another number of epochs; errors of :class:`fastgate.GateSearch`.
        """
        self._loader = loader
        if self._calibration is None:
            self._calibration = in_order(loader)
        if self.search is None:
            batch = first_batch(self._calibration)
            inputs = inputs_of(batch, self.forward)
            example = with_tensors(inputs, [x[:1] if x.dim() else x for x in tensors_in(inputs)])
            self.search = GateSearch(model, example, optimizer, epochs=epochs, config=self.config, forward=self.forward)
        elif self.search.epochs != epochs:
            raise ValueError(f"epochs: expected {self.search.epochs}, as at the start of the run, got {epochs}")
        else:
            self.search.use(optimizer)

    def begin_epoch(self, epoch: int) -> list[str]:
        """Begin an epoch of the search; if the network is pruned, its wrappers are reinitialized in place."""
        if self.search is None:
            raise ValueError("search: expected training to have begun")
        names = self.search.begin_epoch(epoch, self._calibration)
        if names and self.search.config.compact_training:
            for wrapper in wrappers_of(self.search.model):
                renew(wrapper)
        return names

    def refresh(self) -> None:
        """Recompute batch norm statistics at the end of an epoch, before an evaluation; see `GateSearch.refresh`."""
        if self.search is not None and isinstance(self._loader, DataLoader):
            self.search.refresh(in_order(self._loader, shuffled_by=self.search.epoch))

    def end(self, folder: str | os.PathLike[str]) -> None:
        """Create the compact network after training and, if a file can describe it, save it in the folder.

        If training ended early (early stopping, a time limit), the remaining gates are decided now, with a warning. If
        gates were still held open, they have learned nothing, and there is no compact network.
        """
        if self.search is None:
            return
        if self.search.epoch + 1 < self.search.epochs and self.search.phase is not Phase.SETTLED:
            left = f"training ended in epoch {self.search.epoch + 1} of {self.search.epochs}"
            if self.search.phase is Phase.OPEN:
                warnings.warn(f"{left}, in which gates were held open: there is no compact network", stacklevel=2)
                return
            warnings.warn(f"{left}, before every gate was decided: the remaining gates are decided now", stacklevel=2)
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
            f"{path}: expected a network that a file can fully describe, got this error: {reasons[0]}; {left}. The "
            "compact network is the callback's attribute `small`",
            stacklevel=2,
        )

    def _children(self) -> list[nn.Module]:
        """The only child with gates, if there is just one: the network inside a module with training code."""
        if self.search is None or self.small is None:
            return []
        names = {name.split(".", maxsplit=1)[0] for name in self.search.gates}
        return [getattr(self.small, names.pop())] if len(names) == 1 else []


def restore_shape(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Prune a plain network to the shape it had when a :class:`Session` was saved, so that its weights fit."""
    if not any(named_gates(model)):
        attach(model, state["gating"], **state["gate_options"])
    gates = dict(named_gates(model))
    for name, opened in state["search"]["final"].items():
        gates[name].freeze(opened)
    if state["search"]["config"]["compact_training"]:
        cut_frozen(model)


def first_batch(batches: Iterable[Any]) -> Any:
    """Return the first batch, with the random number generator state restored.

    Raises:
        ValueError: there are no batches.
    """
    with torch.random.fork_rng(devices=[]):  # loaders use the CPU generator
        for batch in batches:
            return batch
    raise ValueError("calibration: expected at least one batch, got none")


def in_order(loader: Any, shuffled_by: int | None = None) -> Iterable[Any]:
    """One pass over a loader's data in order, each process over its own part; the loader itself does not change.

    Args:
        loader: the training loader.
        shuffled_by: a seed, for random order instead.

    Raises:
        TypeError: `loader` is not a `DataLoader`.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"calibration: expected training data in a single DataLoader, got {type(loader).__name__}; pass "
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
