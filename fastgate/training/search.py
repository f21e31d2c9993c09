"""The gates of a run: held open, alive, then final; what final gates closed leaves the network in training."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastgate import losses, schedules
from fastgate.gates import named_gates
from fastgate.modes import eval_mode
from fastgate.pruning.commitment import commit, unanimous
from fastgate.pruning.costs import gate_costs, macs, total_cost
from fastgate.pruning.decisions import Decisions, GateDecision, decide
from fastgate.pruning.targets import lowest_share, meet_target, within_reach
from fastgate.training import distributed
from fastgate.training.data import Batches
from fastgate.training.equality import check_equal, hold_open
from fastgate.training.presets import Recipe
from fastgate.values import call, to_device_of

# as far back as a running average of PyTorch's momentum (0.1) looks
_STATISTICS_BATCHES = 10


def refresh_statistics(model: nn.Module, batches: Iterable[Any]) -> None:
    """Take the running statistics of a network's batch norms, gate heads' among them, anew over these batches.

    Each becomes the mean over the batches of what one batch gives, with weights and decisions as they are now; nothing
    else of the model changes, and no random number is drawn. Batch norms in eval mode stay as they are, as do those
    that do not run (the heads of frozen gates).

    Why: a gate that opens or closes changes at once what every later layer sees, and running statistics lag behind. In
    evaluation that also shifts what later heads see, so that they close what is open in training (digits, seed 3:
    39 % where 83 % were right with fresh statistics: bench/results/search).

    Args:
        model: the network, in training mode.
        batches: the inputs, or tuples or lists whose first item is the inputs, see :func:`fastgate.decide`; as they
            come in training (shuffled, of a training step's size).

    Raises:
        ValueError: no batch norm in training mode, or no batch. Then, and where a batch fails, all stays as it was.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    if not norms:
        raise ValueError("model: expected batch norms in training mode, got none; call model.train() first")
    before = [(norm.momentum, {name: buffer.clone() for name, buffer in norm.named_buffers()}) for norm in norms]
    seen, whole = 0, False
    try:
        with torch.no_grad(), eval_mode(model), torch.compiler.set_stance("force_eager"):
            for norm in norms:
                norm.reset_running_stats()
                norm.train()
                norm.momentum = None  # the mean over all calls
            for batch in batches:
                inputs = batch[0] if isinstance(batch, tuple | list) else batch
                call(model, to_device_of(model, inputs))
                seen += 1
        whole = True
    finally:
        for norm, (momentum, buffers) in zip(norms, before, strict=True):
            norm.momentum = momentum
            ran = whole and bool(norm.num_batches_tracked)
            for name, value in buffers.items():
                if not ran or name == "num_batches_tracked":
                    norm.get_buffer(name).copy_(value)
    if not seen:
        raise ValueError("batches: expected at least one, got none")


class Search:
    """Which gates of a network in training are alive, and what the others have been decided to be.

    Attributes:
        gates: all gates of the run, by name, in forward order.
        live: those that are still in the network.
        decided: final decisions, bool `[gates]`, by name.
        macs: of one image with every gate open; `macs_of` each gate (channel), int64 `[gates]` by name.
        macs_training: of one image in the network as it is now; closed branches of live gates are computed too.
        difference: the largest one that cutting the network made to its outputs.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, image_size: Sequence[int], device: torch.device) -> None:
        self.recipe = recipe
        self.model = model
        self.image_size = image_size
        self.device = device
        self.gates = dict(named_gates(model))
        self.live = self.gates
        self.decided: dict[str, Tensor] = {}
        self.difference = 0.0
        self.macs = self.macs_training = macs(model, image_size)
        self.macs_of = gate_costs(model, image_size) if self.gates else {}
        self._constants: dict[str, Tensor] = {}  # decisions of gates that left the network
        self._weights = [
            schedules.parse(text)
            for text in (recipe.lambda_polar, recipe.lambda_activation, recipe.lambda_budget, recipe.lambda_capacity)
        ]
        parameters = gate_costs(model, image_size, "params") if self.gates else {}
        self._capacity = sum(int(count.sum()) for count in parameters.values())
        self._parameters = {name: count.to(device, torch.float32) for name, count in parameters.items()}
        # measured costs differ from process to process
        self._set_costs(*distributed.from_main(self._measure_costs))

    def _measure_costs(self) -> tuple[dict[str, Tensor], int]:
        """What the target is a share of: what each gate (channel) costs, and the whole network."""
        if not self.gates or self.recipe.cost == "macs":
            return self.macs_of, self.macs
        costs = gate_costs(self.model, self.image_size, self.recipe.cost)
        return costs, total_cost(self.model, self.image_size, self.recipe.cost)

    def _set_costs(self, costs: dict[str, Tensor], total: int) -> None:
        self.costs, self.total = costs, total
        self._switchable = sum(int(cost.sum()) for cost in costs.values())
        self._device_costs = {name: cost.to(self.device, torch.float32) for name, cost in costs.items()}
        target, lowest = self.recipe.target_macs, lowest_share(costs, total)
        if self.gates and target is not None and target < lowest:
            raise ValueError(
                f"target_macs: expected {math.ceil(lowest * 1e4) / 1e4:.4f} to 1 (below that is what gates cannot "
                f"remove), got {target}"
            )

    def decide(self, batches: Batches, dtype: torch.dtype) -> Decisions:
        """Decisions of all gates over the batches; with a target those that meet it. Final ones stay as they are.

        Of several processes each has batches of its own: together they decide.
        """
        gates, samples = {name: GateDecision(opened.double(), opened) for name, opened in self.decided.items()}, 0
        if len(gates) < len(self.gates):
            samples = len(batches.images)
            with torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32):
                gates = {**distributed.merge_decisions(decide(self.model, batches)), **gates}
        decisions = Decisions({name: gates[name] for name in self.gates}, samples=samples)
        target = self.recipe.target_macs
        if target is None:
            return decisions
        return meet_target(decisions, self.costs, target, self.total, held=self.decided)

    @property
    def over(self) -> bool:
        """Whether every decision is final; also where there is no gate."""
        return len(self.decided) == len(self.gates)

    @property
    def phase(self) -> tuple[frozenset[str], frozenset[str]]:
        """Which gates are final, and which of the others are held open: while it stays, every step is the same."""
        held = (name for name, gate in self.live.items() if gate.frozen and name not in self.decided)
        return frozenset(self.decided), frozenset(held)

    def settles_at(self, epoch: int) -> bool:
        """Whether an epoch begins by deciding what is still undecided."""
        settle_at = self.recipe.settle_at
        return not self.over and settle_at is not None and epoch >= round(settle_at * self.recipe.epochs)

    def enter(self, epoch: int, history: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Hold the gates open at the start of an epoch, or let them live; returns decisions that have become final."""
        if epoch < round(self.recipe.open_until * self.recipe.epochs):
            for gate in self.gates.values():
                gate.freeze(torch.ones(gate.gates, dtype=torch.bool))
            return {}
        for name, gate in self.gates.items():
            if gate.frozen and name not in self.decided:
                gate.unfreeze()
        return self._find_unanimous(epoch, history)

    def refresh(self, batches: Iterable[Any], dtype: torch.dtype) -> None:
        """At the end of an epoch: while a target makes gates open and close, take batch norms' statistics anew.

        Without a target gates go their own way, and the run does what the paper says and no more.
        """
        if self.recipe.target_macs is None or all(gate.frozen for gate in self.live.values()):
            return
        with torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32):
            refresh_statistics(self.model, islice(batches, _STATISTICS_BATCHES))

    def _find_unanimous(self, epoch: int, history: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Decisions that all samples of the last `commit_after` epochs agree on and that the target allows."""
        recipe = self.recipe
        if recipe.commit_after is None:
            return {}
        # while the target falls, gates are open because it asks for that: only closed ones are decided then
        searching = epoch - round(recipe.open_until * recipe.epochs)
        steady = searching if recipe.target_macs is None else epoch - math.ceil(recipe.anneal_until * recipe.epochs)
        last = [line["gates"] for line in history[-recipe.commit_after :]]
        found = {
            name: opened
            for name, opened in unanimous(last).items()
            if name not in self.decided and (steady if opened.any() else searching) >= recipe.commit_after
        }
        if recipe.target_macs is None:
            return found
        return within_reach(found, self.decided, self.costs, recipe.target_macs, self.total)

    def make_final(self, decisions: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, images: Tensor) -> None:
        """Freeze these gates for good and, where the recipe says so, remove from the network what they closed.

        Raises:
            NotEqual: the cut network computes something else on `images` `[N, C, H, W]`.
        """
        for name, opened in decisions.items():
            self.gates[name].freeze(opened)
        if self.recipe.compact_training and decisions.keys() - self.decided.keys():
            frozen = copy.deepcopy(self.model)
            self._cut(optimizer)
            cut = copy.deepcopy(self.model)
            hold_open(frozen, cut)
            self.difference = max(self.difference, check_equal(frozen, cut, images, self.recipe.gating))
        self.decided.update(decisions)

    def _cut(self, optimizer: torch.optim.Optimizer) -> None:
        """Let frozen gates and what they closed leave the network and the optimizer."""
        commit(self.model, optimizer)
        self.live = dict(named_gates(self.model))
        self.macs_training = macs(self.model, self.image_size)
        self._constants = {
            name: gate.open.to(self.device, torch.float32) for name, gate in self.gates.items() if name not in self.live
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the search, beside the network and the optimizer."""
        return {"decided": self.decided, "difference": self.difference, "costs": self.costs, "total": self.total}

    def restore(self, state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Bring a freshly built network and its optimizer to the shape they had in a checkpoint."""
        self.decided = {name: opened.cpu() for name, opened in state["decided"].items()}
        self.difference = state["difference"]
        # measured costs differ from time to time: a resumed run goes on with those it began with
        self._set_costs({name: cost.cpu() for name, cost in state["costs"].items()}, state["total"])
        for name, opened in self.decided.items():
            self.gates[name].freeze(opened)
        if self.decided and self.recipe.compact_training:
            self._cut(optimizer)

    def means(self) -> Mapping[str, Tensor]:
        """Mean decisions of the live gates over the samples of the last forward, with graph."""
        return losses.gate_means(self.live.items()) if self.live else {}

    def all_means(self, means: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The means of all gates of the run, in forward order, from those of the live ones."""
        if not self._constants:
            return means
        return {name: means[name] if name in means else self._constants[name] for name in self.gates}

    def schedule(self, epoch: float) -> list[float]:
        """What :meth:`penalties` has to know of an epoch (fractions count): four weights, then the budget's target."""
        target = self.recipe.target_at(epoch)
        if target is None or not self.gates:
            fraction = 0.0
        else:
            fraction = max((target * self.total - (self.total - self._switchable)) / self._switchable, 0.0)
        return [*(weight(epoch) for weight in self._weights), fraction]

    def penalties(self, means: Mapping[str, Tensor], schedule: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Gate losses by name with their weights, from :meth:`schedule` as a tensor; none where no gate learns."""
        if all(gate.frozen for gate in self.live.values()):
            return {}
        means = losses.gate_means(self.all_means(means))
        polarization, activation, budget, capacity, target = schedule.unbind()
        parts = {
            "polarization": (polarization, losses.polarization(means)),
            "activation": (activation, losses.activation(means)),
        }
        if self.recipe.target_macs is not None:
            parts["budget"] = (budget, losses.budget(means, target, self._device_costs, total=self._switchable))
            parts["capacity"] = (capacity, losses.capacity(means, self._parameters, total=self._capacity))
        return parts

    def describe(self, means: Mapping[str, Tensor]) -> dict[str, Any]:
        """The search's part of an epoch's line of metrics, from the epoch's mean decisions of the live gates."""
        means = {name: mean.cpu().double() for name, mean in self.all_means(means).items()}
        closed = sum(float((self.macs_of[name] * (1 - mean)).sum()) for name, mean in means.items())
        return {
            "open_ratio": float(torch.cat(list(means.values())).mean()) if means else 1.0,
            "polarization": float(torch.stack([(m * (1 - m)).mean() for m in means.values()]).mean()) if means else 0.0,
            "macs": round(self.macs - closed),
            "frozen": bool(self.gates) and all(gate.frozen for gate in self.gates.values()),
            "max_abs_difference": self.difference,
            "gates": {name: mean.tolist() for name, mean in means.items()},
        }
