"""The search for the gates to keep, inside any training loop.

It needs a network, its optimizer and the number of epochs. Gates are first held open (*open*), then live while the
target decreases to its final value (*search*). A gate on which all samples agree becomes *final*: if closed, its block
or channel is removed from the network and the optimizer. At a set epoch the remaining gates are decided so that the
target is met (*settled*), and training continues on a plain, smaller network.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fastgate import processes
from fastgate.gates import Gate, named_gates
from fastgate.models.hooks import copy_network
from fastgate.modes import random_state_kept
from fastgate.pruning.commitment import check_optimizer, commit
from fastgate.pruning.compaction import compact
from fastgate.pruning.config import Phase, SearchConfig
from fastgate.pruning.costs import Costs, gate_costs, macs
from fastgate.pruning.deciding import Deciding
from fastgate.pruning.decisions import Decisions, GateDecision, freeze
from fastgate.pruning.equality import check_equal, hold_open
from fastgate.pruning.means import EpochMeans
from fastgate.pruning.objective import Objective
from fastgate.pruning.parallel import unwrapped, wrappers_of
from fastgate.pruning.probe import FirstKept, example_of, random_like
from fastgate.pruning.statistics import has_statistics, refresh_statistics
from fastgate.values import Forward, device_of, inputs_of

_STATE_VERSION = 1
# the time constant of a running average with PyTorch's default momentum (0.1)
_STATISTICS_BATCHES = 10


class GateSearch:
    """Controls a network's gates over a training run: holds them open, trains them, decides them, prunes the network.

        search = fastgate.GateSearch(model, example_inputs, optimizer, epochs=90)
        for epoch in range(90):
            search.begin_epoch(epoch, loader)
            for i, (x, y) in enumerate(loader):
                loss = criterion(model(x), y) + search.loss(i / len(loader))
                ...
        small = search.compact(loader)

    Under `DistributedDataParallel` all processes make the same calls; gate means and decisions cover all samples. If
    :meth:`begin_epoch` returns names, wrap the network again; a stale wrapper raises an error.

    Args:
        model: a network with gates, or a wrapper of one; it and the optimizer are pruned in place.
        example_inputs: (C, H, W) of one image, or example inputs: see :mod:`fastgate.pruning.costs`.
        optimizer: the optimizer of the network and its gates, see :func:`fastgate.parameter_groups`; None if it is
            created later, see :meth:`use`.
        epochs: total number of epochs.
        config: default `SearchConfig()`.
        forward: `(model, inputs) -> outputs`, for networks with another calling convention; it gets whole batches.

    Attributes:
        gates: all gates of the run, by name, in forward order.
        final: final decisions, bool `[gates]`, by name.
        epoch: the epoch begun last; -1 before the first.
        costs: the cost that the target refers to: int64 `[gates]` by gate name; `costs.total` is the whole network's.
        macs: MACs of one example with every gate open; `gate_macs`: those of each gate (channel).
        macs_training: MACs of one example in the current network, including the closed branches of live gates.
        difference: largest absolute difference in outputs that pruning has caused so far.

    Raises:
        ValueError: no gates, an optimizer created before the gates were added, parameters sharded over processes, or a
            target that no decisions can reach.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        optimizer: torch.optim.Optimizer | None,
        *,
        epochs: int,
        config: SearchConfig | None = None,
        forward: Forward | None = None,
    ) -> None:
        if epochs < 1:
            raise ValueError(f"epochs: expected a positive number, got {epochs}")
        self.model = unwrapped(model)
        self.epochs = epochs
        self.config = config or SearchConfig()
        self.gates: dict[str, Gate] = dict(named_gates(self.model))
        if not self.gates:
            raise ValueError("model: expected gates, got none; add them with fastgate.attach(model, 'layer')")
        self.optimizer: torch.optim.Optimizer | None = None
        if optimizer is not None:
            self.use(optimizer)
        self.final: dict[str, Tensor] = {}
        self.epoch = -1
        self.difference = 0.0
        self._forward = forward
        self._example = example_of(self.model, example_inputs)
        self._recent: deque[dict[str, list[float]]] = deque(maxlen=self.config.commit_after or 1)
        self._epoch_means = EpochMeans()
        self._settled_means: dict[str, Tensor] = {}  # mean decisions at the time the gates were decided
        self._samples = 0
        self._checked_state = False
        self._awaited: bool | None = None  # whether a DDP wrapper expects gradients of heads that do not run
        self.macs = self.macs_training = macs(self.model, self._example, forward=forward)
        self.gate_macs = gate_costs(self.model, self._example, forward=forward)
        self._parameters = gate_costs(self.model, self._example, "params", forward=forward)
        # measured costs differ between processes
        measured = self.config.cost == "latency"
        self._set_costs(processes.from_main(self._measure) if measured else self._measure())
        for gate in self.gates.values():
            gate.detach_input = self.config.detach_gates

    def use(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the optimizer to prune along with the network; it may be wrapped, for example by accelerate.

        Raises:
            ValueError: it does not train all gates, or belongs to another network.
        """
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        check_optimizer(self.model, optimizer)
        self.optimizer = optimizer

    def _measure(self) -> Costs:
        if self.config.cost == "macs":
            return self.gate_macs
        return gate_costs(self.model, self._example, self.config.cost, forward=self._forward)

    def _set_costs(self, costs: Costs) -> None:
        self.costs = costs
        self._deciding = Deciding(self.config, self.epochs, costs)
        self._objective = Objective(self.config, self.epochs, self.gates, costs, self._parameters, self._epoch_means)

    # ---- state -------------------------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """The current phase."""
        if len(self.final) == len(self.gates):
            return Phase.SETTLED
        return Phase.OPEN if self.epoch < self._deciding.released_at else Phase.SEARCH

    @property
    def live(self) -> dict[str, Gate]:
        """The gates whose decisions are not final, by name."""
        return {name: gate for name, gate in self.gates.items() if name not in self.final}

    @property
    def configuration(self) -> tuple[frozenset[str], frozenset[str]]:
        """The final gates and the gates held open; while these do not change, every step does the same work."""
        return frozenset(self.final), frozenset(name for name, gate in self.live.items() if gate.frozen)

    @property
    def decisions(self) -> Decisions:
        """The final decisions, with mean decisions over the samples where these were evaluated."""
        gates = {
            name: GateDecision(self._settled_means.get(name, opened.double()), opened)
            for name, opened in ((name, self.final[name]) for name in self.gates if name in self.final)
        }
        return Decisions(gates, samples=self._samples)

    # ---- epochs ------------------------------------------------------------------------------------------------------

    def begin_epoch(
        self, epoch: int, calibration: Iterable[Any] | None = None, *, forward: Forward | None = None
    ) -> list[str]:
        """Begin an epoch: hold gates open, release them, or make decisions final. Call it before each epoch.

        Model and optimizer may be pruned in place. Calling it again for the same epoch (a run resumed in the middle of
        it) does nothing. The random number generator state is restored after reading calibration data.

        Args:
            epoch: from 0.
            calibration: batches to decide on, see :func:`fastgate.decide`; each process passes its own part. Required
                in the epoch in which the remaining gates are decided.
            forward: replaces the `forward` of the search.

        Returns:
            Names of the gates that became final.

        Raises:
            ValueError: an epoch was skipped, the last epoch's loss did not include the search's, calibration data are
                missing, or the optimizer's state cannot be cut. Nothing has changed then.
            NotEqual: the pruned network's outputs differ.
        """
        if epoch == self.epoch:
            return []
        if epoch != self.epoch + 1:
            raise ValueError(
                f"epoch: expected {max(self.epoch, 0)} or {self.epoch + 1}, got {epoch}; call begin_epoch before every "
                "epoch, and load_state_dict before the first one of a resumed run"
            )
        self._check_learned()
        settles = self.phase is not Phase.SETTLED and self._deciding.settles_at(epoch)
        if settles and calibration is None:
            raise ValueError(
                f"calibration: expected batches in epoch {epoch}, in which the remaining gates are decided, got none; "
                "pass a loader of training images"
            )
        if self.optimizer is None:
            raise ValueError("optimizer: expected one before the first epoch, got none; set it with use(optimizer)")
        if not self._checked_state and self.optimizer.state and self.config.compact_training:
            check_optimizer(self.model, self.optimizer)
            self._checked_state = True
        with random_state_kept(device_of(self.model)):
            return self._begin(epoch, settles, calibration, forward or self._forward)

    def _begin(
        self, epoch: int, settles: bool, calibration: Iterable[Any] | None, forward: Forward | None
    ) -> list[str]:
        held = [] if epoch < self._deciding.released_at else [gate for gate in self.live.values() if gate.frozen]
        for gate in held:
            gate.unfreeze()
        decisions, batches = Decisions({}), FirstKept(calibration or ())
        try:
            if settles:
                decisions = self._deciding.decide(self.model, self.decisions, batches, forward)
                self._deciding.warn_if_overruled(decisions)
        except BaseException:  # deciding failed: the epoch has not begun
            for gate in held:
                gate.freeze(torch.ones(gate.gates, dtype=torch.bool))
            raise
        self._end_epoch()
        self.epoch = epoch
        if self.phase is Phase.OPEN:
            hold_open(self.model)
        if self.phase is not Phase.SEARCH:
            return []
        if not settles:
            decisions = self._deciding.unanimous(epoch, list(self._recent), self.final)
            if decisions and calibration is not None:
                batches.first = next(iter(calibration), None)
        return self._finalize(decisions, batches.first, forward)

    def _check_learned(self) -> None:
        if self.phase is Phase.SEARCH and self.epoch >= 0 and self._epoch_means.empty:
            raise ValueError(
                f"loss: expected search.loss(progress) in epoch {self.epoch}, got none, so that its gates learned "
                "nothing; add it to the loss of every step"
            )

    def _end_epoch(self) -> None:
        """Record the epoch's mean decisions for :meth:`Deciding.unanimous`."""
        if self.phase is Phase.SEARCH and self.epoch >= 0:
            self._recent.append({name: mean.tolist() for name, mean in self._means().items()})
        self._epoch_means.clear()
        self._awaited = None

    def decide(self, calibration: Iterable[Any], *, forward: Forward | None = None) -> Decisions:
        """Decide all gates on the batches so that the target, if any, is met; final decisions do not change.

        Neither the search nor the network changes. With several processes, each passes its own batches, and they decide
        together.
        """
        with random_state_kept(device_of(self.model)):
            return self._deciding.decide(self.model, self.decisions, calibration, forward or self._forward)

    def finalize(self, decisions: Mapping[str, GateDecision], inputs: Any = None) -> list[str]:
        """Make decisions of some or all gates final now, whatever the epoch; otherwise as :meth:`begin_epoch`.

        Args:
            decisions: decisions by gate name.
            inputs: batch on which the pruned network is compared with the frozen one; default: the example inputs.
        """
        with random_state_kept(device_of(self.model)):
            return self._finalize(decisions, inputs, self._forward)

    def _finalize(self, decisions: Mapping[str, GateDecision], batch: Any, forward: Forward | None) -> list[str]:
        new = {name: decision for name, decision in decisions.items() if name not in self.final}
        for name, around in self.costs.within.items():  # a closed layer closes its channels
            if name not in self.final and around in new and not bool(new[around].open):
                closed = torch.zeros(self.gates[name].gates, dtype=torch.bool)
                if name not in new or bool(new[name].open.any()):
                    new[name] = GateDecision(closed + new[around].mean, closed)
        for name, decision in new.items():
            self.gates[name].freeze(decision.open)
        if new and self.config.compact_training:
            # gates held open until the search begins are not decided, so they must not be cut
            held = [gate for name, gate in self.live.items() if name not in new and gate.frozen]
            for gate in held:
                gate.unfreeze()
            frozen = copy_network(self.model)
            try:
                self._cut()
            finally:
                for gate in held:
                    gate.freeze(torch.ones(gate.gates, dtype=torch.bool))
            cut = copy_network(self.model)
            hold_open(frozen, cut)
            inputs = self._inputs_of(batch, forward)
            self.difference = max(self.difference, check_equal(frozen, cut, inputs, forward))
        self.final.update({name: decision.open for name, decision in new.items()})
        self._objective.fix(self.final)
        self._settled_means.update({name: decision.mean for name, decision in new.items()})
        self._samples = max(self._samples, getattr(decisions, "samples", 0))
        return list(new)

    def _inputs_of(self, batch: Any, forward: Forward | None) -> Any:
        return random_like(self._example) if batch is None else inputs_of(batch, forward)

    def _cut(self) -> None:
        """Remove frozen gates and their closed parts from the network and the optimizer."""
        commit(self.model, self.optimizer)
        self.macs_training = macs(self.model, self._example, forward=self._forward)

    def refresh(self, batches: Iterable[Any], *, forward: Forward | None = None) -> None:
        """Recompute the running statistics of batch norms; call it before an evaluation.

        Running statistics average over about ten steps, during which live gates may have changed, so that they no
        longer match the network; see :func:`fastgate.pruning.statistics.refresh_statistics`. Does nothing if no gate is
        live, without a target, or without batch norms. Batch norms in eval mode are not changed.

        Args:
            batches: training batches, shuffled and of the training batch size; ten are read.
            forward: replaces the `forward` of the search.

        Raises:
            ValueError: a network in eval mode.
        """
        live = [gate for gate in self.live.values() if not gate.frozen]
        if live and not live[0].training:
            raise ValueError("model: expected it in training mode, got eval; refresh before model.eval()")
        if live and self.config.target is not None and has_statistics(self.model):
            with random_state_kept(device_of(self.model)):
                refresh_statistics(self.model, islice(batches, _STATISTICS_BATCHES), forward=forward or self._forward)

    def compact(self, calibration: Iterable[Any] | None = None, *, forward: Forward | None = None) -> nn.Module:
        """Return the compact network, a plain one without gates; the network in training does not change.

        Args:
            calibration: batches on which gates that are not final are decided; not needed if all are final.
            forward: replaces the `forward` of the search.

        Raises:
            ValueError: calibration data are needed but missing.
            NotEqual: its outputs differ from those of the frozen network.
        """
        processes.share_buffers(self.model)  # every process has the same network
        if not any(named_gates(self.model)):
            return copy_network(self.model)
        forward = forward or self._forward
        frozen = copy_network(self.model)
        batch = None
        if self.live:
            if calibration is None:
                raise ValueError(
                    f"calibration: expected batches on which to decide {len(self.live)} gates that are not final, got "
                    "none; pass a loader of training images"
                )
            batches = FirstKept(calibration)
            decisions = self.decide(batches, forward=forward)
            self._deciding.warn_if_overruled(decisions)
            freeze(frozen, {name: decisions[name] for name, _ in named_gates(frozen)})
            batch = batches.first
        small = compact(frozen)
        difference = check_equal(frozen, small, self._inputs_of(batch, forward), forward)
        self.difference = max(self.difference, difference)
        return small

    # ---- the losses --------------------------------------------------------------------------------------------------

    def loss(self, progress: float = 0.0) -> Tensor:
        """Return the gate loss of a step, a differentiable scalar; add it to the task loss after the forward pass.

        Zero if no gate is live. Under :func:`torch.no_grad`, mean decisions are not recorded.

        Args:
            progress: completed fraction of the epoch, 0 to 1.
        """
        if self.epoch < 0:
            raise ValueError("loss: expected begin_epoch before the first step, got none; call it before every epoch")
        terms = self.terms(self.weights(self.epoch + progress))
        total = torch.zeros((), device=device_of(self.model))
        for weight, term in terms.values():
            total = total + weight * term
        return total + self._untrained() if torch.is_grad_enabled() else total

    def weights(self, epoch: float) -> list[float]:
        """The inputs of :meth:`terms` at a (fractional) epoch: the loss weights, then the target."""
        return self._objective.weights(epoch)

    def terms(self, weights: Iterable[Any]) -> dict[str, tuple[Any, Tensor]]:
        """Gate losses of the last forward: name -> (weight, loss); empty if no gate is live.

        It does not synchronize with the device: with :meth:`weights` in a tensor there, a step can be captured in a
        CUDA graph. Mean decisions are recorded unless gradients are disabled.
        """
        return self._objective.terms(weights)

    def _untrained(self) -> Tensor | float:
        """Zero times the parameters of heads that do not run: `DistributedDataParallel` expects their gradients."""
        if self._awaited is None:
            self._awaited = any(not wrapper.find_unused_parameters for wrapper in wrappers_of(self.model))
        if not self._awaited:
            return 0.0
        idle = [p for _, gate in named_gates(self.model) if gate.frozen for p in gate.parameters() if p.requires_grad]
        return sum((0.0 * p.sum() for p in idle), start=0.0)

    # ---- metrics and checkpoints -------------------------------------------------------------------------------------

    def _means(self) -> dict[str, Tensor]:
        """Mean decision of every gate over this epoch's steps so far, float64 `[gates]` on the CPU."""
        held = {name: torch.ones(gate.gates, dtype=torch.bool) for name, gate in self.live.items() if gate.frozen}
        return self._epoch_means.by_gate(self.gates, {**self.final, **held})

    def metrics(self) -> dict[str, Any]:
        """Metrics of this epoch to log: numbers, strings and lists of numbers.

        `phase`; the current `target` (a fraction of `cost`); `open_ratio`, the fraction of open gates (channels);
        `polarization` (Eq. 8); `macs` of one example at the mean decisions of the epoch so far; `macs_training` of the
        current network; `frozen`, whether no gate is live; `max_abs_difference` caused by pruning; `gates`, mean
        decisions by gate.

        Raises:
            ValueError: gates are live, and no step has been made in this epoch.
        """
        means = self._means()
        return {
            "phase": str(self.phase),
            "target": self.config.target_at((max(self.epoch, 0) + 1) / self.epochs),
            "open_ratio": float(torch.cat(list(means.values())).mean()),
            "polarization": float(torch.stack([(mean * (1 - mean)).mean() for mean in means.values()]).mean()),
            "macs": round(self.gate_macs.of(means)),
            "macs_training": self.macs_training,
            "frozen": all(gate.frozen for gate in self.gates.values()),
            "max_abs_difference": self.difference,
            "gates": {name: mean.tolist() for name, mean in means.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """State of the search for a checkpoint, loadable by `torch.load(weights_only=True)`.

        Save it together with `model.state_dict()` and `optimizer.state_dict()`.
        """
        return {
            "version": _STATE_VERSION,
            "epochs": self.epochs,
            "config": asdict(self.config),
            "epoch": self.epoch,
            "final": dict(self.final),
            "means": dict(self._settled_means),
            "samples": self._samples,
            "recent": list(self._recent),
            "epoch_means": self._epoch_means.state(),
            "costs": dict(self.costs),
            "total": self.costs.total,
            "difference": self.difference,
            "example": self._example,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a new search, and prune its network and optimizer to the shapes they had.

        Call it first, then `model.load_state_dict` and `optimizer.load_state_dict`, whose tensors then fit. Wrap the
        network only afterwards.

        Raises:
            ValueError: the state belongs to another network or configuration, or this search has already begun.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(
                f"state: expected the state of a GateSearch, version {_STATE_VERSION}, got {state.get('version')!r}"
            )
        if self.epoch >= 0 or self.final:
            raise ValueError(
                "load_state_dict: expected a search that has not begun, got one in epoch "
                f"{self.epoch}; create network, optimizer and search again"
            )
        self.config.check_saved(state["config"], self.epochs, state["epochs"])
        sizes = {name: gate.gates for name, gate in self.gates.items()}
        if sizes != {name: len(cost) for name, cost in state["costs"].items()}:
            raise ValueError("state: expected the state of a search with the same gates, got that of another network")
        # measured costs vary: a resumed run keeps those it started with
        kept = {name: cost.cpu() for name, cost in state["costs"].items()}
        self._set_costs(Costs(kept, state["total"], self.costs.within))
        self.epoch, self.difference, self._samples = state["epoch"], state["difference"], state["samples"]
        self.final = {name: opened.cpu() for name, opened in state["final"].items()}
        self._settled_means = {name: mean.cpu() for name, mean in state["means"].items()}
        self._recent.extend(state["recent"])
        self._epoch_means.restore(state["epoch_means"])
        self._objective.fix(self.final)
        for name, opened in self.final.items():
            self.gates[name].freeze(opened)
        if self.final and self.config.compact_training:
            self._cut()
        if self.phase is Phase.OPEN and self.epoch >= 0:
            hold_open(self.model)
