"""The training loop: epochs of SGD with gate losses, checkpoints that resume bit-identically, metrics per epoch."""

import copy
import json
import math
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgate import losses, schedules
from fastgate.energy import EnergyMeter
from fastgate.files import write_atomically
from fastgate.gates import named_gates
from fastgate.models.resnet import resnet
from fastgate.modes import eval_mode
from fastgate.pruning.commitment import commit, unanimous
from fastgate.pruning.compaction import cut_frozen
from fastgate.pruning.costs import gate_costs, macs
from fastgate.pruning.decisions import Decisions, GateDecision, decide, freeze
from fastgate.pruning.targets import lowest_share, meet_target, within_reach
from fastgate.training.checkpoint import load_checkpoint, save_checkpoint
from fastgate.training.data import Batches, Dataset, ImageSet
from fastgate.training.equality import check_equal, hold_open
from fastgate.training.presets import Recipe, recipe_from_dict
from fastgate.training.progress import RunProgress
from fastgate.training.spending import Spending, describe_epoch

# how often a GPU run looks whether its loss is still finite; a CPU run looks at every step, where it costs nothing
_STEPS_BETWEEN_CHECKS = 50
_SUMS = ("loss", "task", "polarization", "activation", "budget", "correct")


class Interrupted(Exception):
    """The user stopped the run; its state is saved."""


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or NaN; the last good checkpoint is kept."""


def build_network(recipe: Recipe, image_size: Sequence[int], num_classes: int) -> nn.Module:
    """The network of a recipe for images of `image_size` (C, H, W), gated as the recipe says."""
    channels, height, width = image_size
    if recipe.gating == "none":
        return resnet(recipe.depth, num_classes, in_channels=channels, shortcut=recipe.shortcut)
    options: dict[str, Any] = {
        "hidden_features": recipe.hidden_features,
        "estimator": recipe.estimator,
        "window": recipe.window,
        "init_logit": recipe.init_logit,
        "temperature": recipe.temperature,
    }
    if recipe.gating == "channel":
        options["depth"] = recipe.gate_depth
        if recipe.gate_input == "flatten":
            options["spatial_size"] = (height, width)
    return resnet(
        recipe.depth,
        num_classes,
        in_channels=channels,
        gating=recipe.gating,
        position=recipe.position,
        shortcut=recipe.shortcut,
        **options,
    )


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass: "auto" is fp32 on a CPU, fp16 below sm_80, else bf16."""
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if precision == "fp16" and device.type != "cuda":
        raise ValueError(f"precision: fp16 training needs a GPU, got device {device}; use fp32 or bf16")
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def load_network(checkpoint: Path, decisions: Mapping[str, GateDecision] | None = None) -> tuple[nn.Module, Recipe]:
    """The network in a run's checkpoint, on the CPU, and its recipe; gates that left it during training are not in it.

    Args:
        checkpoint: the file.
        decisions: of all gates of the run, to freeze those that are still there with.
    """
    state = load_checkpoint(checkpoint)
    recipe = recipe_from_dict(state["recipe"])
    model = build_network(recipe, state["image_size"], state["num_classes"])
    gates = dict(named_gates(model))
    if decisions is not None:
        freeze(copy.deepcopy(model), decisions)  # refuses those of another network
    for name, opened in state["decided"].items():
        gates[name].freeze(opened)
    if recipe.compact_training:
        model = cut_frozen(model)
    model.load_state_dict(state["model"])
    if decisions is not None:
        freeze(model, {name: decisions[name] for name, _ in named_gates(model)})
    return model, recipe


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Accuracy and mean cross-entropy over the batches, in eval mode; the mode is restored.

    Raises:
        ValueError: the network has another number of classes than the data set.
    """
    device = batches.images.labels.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with eval_mode(model):
        for x, y in batches:
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                scores = model(x)
            if scores.shape[1] != batches.dataset.num_classes:
                raise ValueError(
                    f"model: it has {scores.shape[1]} classes, but {batches.dataset.name} has "
                    f"{batches.dataset.num_classes}; use the data set it was trained on"
                )
            sums[0] += (scores.argmax(1) == y).sum()
            sums[1] += F.cross_entropy(scores.float(), y, reduction="sum")
    correct, loss = (sums / len(batches.images)).tolist()
    return {"accuracy": correct, "loss": loss}


class Trainer:
    """One run of one recipe in one folder.

    Writes `config.json`, `metrics.jsonl` (one line per epoch) and `checkpoint.pt`. Every epoch ends in a checkpoint, a
    Ctrl-C writes one in the middle of an epoch; from either, a resumed run ends with the same weights, bit by bit on a
    CPU, as an undisturbed one.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset, folder: Path, *, resume: bool = False) -> None:
        self.recipe = recipe
        self.dataset = dataset
        self.folder = folder
        self.device = dataset.train.labels.device
        self.dtype = resolve_precision(recipe.precision, self.device)
        # on two CPU cores (AMD EPYC, torch 2.15, ResNet-20, batch 256) channels_last is 1.4x faster than NCHW
        self.channels_last = True
        self.train_batches = self.batches(dataset.train, recipe.batch_size, augment=True)
        torch.manual_seed(recipe.seed)
        self.model = build_network(recipe, dataset.image_size, dataset.num_classes).to(self.device)
        self.model.to(memory_format=torch.channels_last)
        # all gates of the run; those that are still in the network; the decisions that are final
        self.gates = dict(named_gates(self.model))
        self.live = self.gates
        self.decided: dict[str, Tensor] = {}
        self.difference = 0.0  # the largest one that cutting the network made
        self.macs = macs(self.model, dataset.image_size)
        self.costs = gate_costs(self.model, dataset.image_size) if self.gates else {}
        self.macs_training = self.macs
        self.switchable = sum(int(cost.sum()) for cost in self.costs.values())
        self._constants: dict[str, Tensor] = {}  # decisions of gates that left the network
        self._device_costs = {name: cost.to(self.device, torch.float32) for name, cost in self.costs.items()}
        target, lowest = recipe.target_macs, lowest_share(self.costs, self.macs)
        if self.gates and target is not None and target < lowest:
            raise ValueError(
                f"target_macs: expected {math.ceil(lowest * 1e4) / 1e4:.4f} to 1 (below that is what gates cannot "
                f"remove), got {target}"
            )
        self.optimizer = self._build_optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.epoch = 0
        self.step = 0
        self.sums = self._new_sums()
        self.spending = Spending()
        self.history: list[dict[str, Any]] = []
        if resume:
            self._restore()

    def batches(self, images: ImageSet, batch_size: int = 500, *, augment: bool = False) -> Batches:
        """Batches of a split, in the memory format of this run."""
        return Batches(
            self.dataset,
            images,
            batch_size,
            augment=augment,
            seed=self.recipe.seed,
            channels_last=self.channels_last,
        )

    def fit(self) -> None:
        """Train to the last epoch.

        Raises:
            NonFiniteLoss: the loss became infinite or NaN.
            Interrupted: Ctrl-C; the state is saved.
        """
        steps = len(self.train_batches)
        done = self.epoch * steps + self.step
        title = f"{self.recipe.network} {self.recipe.gating if self.gates else 'unpruned'}"
        with (
            RunProgress(title, self.recipe.epochs * steps, done) as progress,
            _deferred_interrupt() as interrupted,
            closing(EnergyMeter(self.device)) as meter,
        ):
            while self.epoch < self.recipe.epochs:
                window = meter.window("train")
                try:
                    with window:
                        self._enter_phase()
                        self._train_epoch(progress, interrupted)
                except Interrupted:
                    self.spending.add(window.result)
                    self._save_checkpoint()
                    raise
                self.spending.add(window.result)
                record = self._end_epoch(meter)
                joules = record["joules"]["train"]
                progress.note(
                    f"epoch {self.epoch}/{self.recipe.epochs} loss {record['train']['loss']:.4f} "
                    f"accuracy {record['eval']['accuracy']:.4f} ({record['eval']['split']}) "
                    f"open {record['open_ratio']:.3f} MACs {record['macs'] / self.macs:.3f}"
                    + ("" if joules is None else f" energy {joules:.0f} J")
                )

    def decide(self) -> Decisions:
        """Decisions of the gates over the training images, without augmentation; with a target those that meet it.

        Final decisions are among them as they are.
        """
        gates, samples = {name: GateDecision(opened.double(), opened) for name, opened in self.decided.items()}, 0
        if len(gates) < len(self.gates):
            samples = len(self.dataset.train)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
                gates = {**decide(self.model, self.batches(self.dataset.train)), **gates}
        decisions = Decisions({name: gates[name] for name in self.gates}, samples=samples)
        target = self.recipe.target_macs
        if target is None:
            return decisions
        return meet_target(decisions, self.costs, target, self.macs, held=self.decided)

    def _enter_phase(self) -> None:
        """Hold the gates open, let them live, or make decisions final, as the epoch asks."""
        if self.step or len(self.decided) == len(self.gates):
            return
        recipe = self.recipe
        if self.epoch < round(recipe.open_until * recipe.epochs):
            for gate in self.gates.values():
                gate.freeze(torch.ones(gate.gates, dtype=torch.bool))
        elif recipe.settle_at is not None and self.epoch >= round(recipe.settle_at * recipe.epochs):
            decisions = self.decide()
            decisions.to_json(self.folder / "decisions.json")
            self._make_final({name: gate.open for name, gate in decisions.items()})
        else:
            for name, gate in self.gates.items():
                if gate.frozen and name not in self.decided:
                    gate.unfreeze()
            self._make_final(self._find_unanimous())

    def _find_unanimous(self) -> dict[str, Tensor]:
        """Decisions that all samples of the last `commit_after` epochs agree on and that the target allows."""
        recipe = self.recipe
        if recipe.commit_after is None:
            return {}
        # while the target falls, gates are open because it asks for that: only closed ones are decided then
        searching = self.epoch - round(recipe.open_until * recipe.epochs)
        steady = (
            searching if recipe.target_macs is None else self.epoch - math.ceil(recipe.anneal_until * recipe.epochs)
        )
        last = [line["gates"] for line in self.history[-recipe.commit_after :]]
        found = {
            name: opened
            for name, opened in unanimous(last).items()
            if name not in self.decided and (steady if opened.any() else searching) >= recipe.commit_after
        }
        if recipe.target_macs is None:
            return found
        return within_reach(found, self.decided, self.costs, recipe.target_macs, self.macs)

    def _make_final(self, decisions: Mapping[str, Tensor]) -> None:
        """Freeze these gates for good and, where the recipe says so, remove from the network what they closed."""
        for name, opened in decisions.items():
            self.gates[name].freeze(opened)
        if self.recipe.compact_training and decisions.keys() - self.decided.keys():
            frozen = copy.deepcopy(self.model)
            self._cut()
            cut = copy.deepcopy(self.model)
            hold_open(frozen, cut)
            x, _ = next(iter(self.batches(self.dataset.test)))
            self.difference = max(self.difference, check_equal(frozen, cut, x, self.recipe.gating))
        self.decided.update(decisions)

    def _cut(self) -> None:
        """Let frozen gates and what they closed leave the network and the optimizer."""
        self.model = commit(self.model, self.optimizer)
        self.live = dict(named_gates(self.model))
        self.macs_training = macs(self.model, self.dataset.image_size)
        self._constants = {
            name: gate.open.to(self.device, torch.float32) for name, gate in self.gates.items() if name not in self.live
        }

    def _train_epoch(self, progress: RunProgress, interrupted: list[bool]) -> None:
        recipe, steps = self.recipe, len(self.train_batches)
        self.model.train()
        for x, y in self.train_batches.start_at(self.epoch, self.step):
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.learning_rate_at(self.epoch + (self.step + 0.5) / steps)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
                scores = self.model(x)
            means = losses.gate_means(self.live.items()) if self.live else {}
            parts = self._losses(scores.float(), y, means)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(parts["loss"]).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self._accumulate(parts, means, scores, y)
            self.step += 1
            progress.step()
            if self.device.type == "cpu" or self.step % _STEPS_BETWEEN_CHECKS == 0 or self.step == steps:
                self._check_finite(self.sums["loss"])
            if interrupted:
                raise Interrupted

    def _losses(self, scores: Tensor, y: Tensor, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        task = F.cross_entropy(scores, y)
        zero = torch.zeros((), device=self.device)
        parts = {"task": task, "polarization": zero, "activation": zero, "budget": zero}
        total = task
        if not all(gate.frozen for gate in self.live.values()):
            recipe, means = self.recipe, self._add_constants(means)
            parts["polarization"] = losses.polarization(means)
            parts["activation"] = losses.activation(means)
            target = recipe.target_at(self.epoch + self.step / len(self.train_batches))
            if target is not None:
                ungated = self.macs - self.switchable
                fraction = max((target * self.macs - ungated) / self.switchable, 0.0)
                parts["budget"] = losses.budget(means, fraction, self._device_costs)
            for name, weight in (
                ("polarization", recipe.lambda_polar),
                ("activation", recipe.lambda_activation),
                ("budget", recipe.lambda_budget),
            ):
                total = total + schedules.parse(weight)(self.epoch) * parts[name]
        return {"loss": total, **parts}

    def _add_constants(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The means of all gates of the run, in forward order."""
        return {name: means[name] if name in means else self._constants[name] for name in self.gates}

    def _accumulate(self, parts: dict[str, Tensor], means: Mapping[str, Tensor], scores: Tensor, y: Tensor) -> None:
        with torch.no_grad():
            for name, value in parts.items():
                self.sums[name] += value
            self.sums["correct"] += (scores.argmax(1) == y).sum()
            for name, mean in means.items():
                self.sums[f"gate:{name}"] += mean

    def _check_finite(self, total: Tensor) -> None:
        if not torch.isfinite(total):
            kept = self.folder / "checkpoint.pt"
            last = f"the last good checkpoint is {kept}" if kept.exists() else "no epoch was finished before"
            raise NonFiniteLoss(
                f"the loss is not finite in epoch {self.epoch + 1} by step {self.step}; {last}. Lower learning_rate "
                f"({self.recipe.learning_rate}), raise warmup_epochs, or use precision fp32"
            )

    def _end_epoch(self, meter: EnergyMeter) -> dict[str, Any]:
        steps = len(self.train_batches)
        split = "test" if self.dataset.validation is None else "validation"
        images = self.dataset.test if self.dataset.validation is None else self.dataset.validation
        with meter.window("eval") as window:
            evaluated = evaluate(self.model, self.batches(images), self.dtype)
        evaluation = Spending()
        evaluation.add(window.result)
        self._check_finite(torch.tensor(evaluated["loss"]))
        means = self._add_constants({name: self.sums[f"gate:{name}"] / steps for name in self.live})
        means = {name: mean.cpu().double() for name, mean in means.items()}
        closed_macs = sum(float((self.costs[name] * (1 - mean)).sum()) for name, mean in means.items())
        record = {
            "epoch": self.epoch + 1,
            "train": {
                **{name: float(self.sums[name]) / steps for name in _SUMS[:-1]},
                "accuracy": float(self.sums["correct"]) / (steps * self.recipe.batch_size),
            },
            "eval": {"split": split, **evaluated},
            "open_ratio": float(torch.cat(list(means.values())).mean()) if means else 1.0,
            "polarization": float(torch.stack([(m * (1 - m)).mean() for m in means.values()]).mean()) if means else 0.0,
            "macs": round(self.macs - closed_macs),
            "macs_training": {
                "per_image": self.macs_training,
                "total": self.macs_training * steps * self.recipe.batch_size
                + (self.history[-1]["macs_training"]["total"] if self.history else 0),
            },
            "frozen": bool(self.gates) and all(gate.frozen for gate in self.gates.values()),
            "max_abs_difference": self.difference,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "gates": {name: mean.tolist() for name, mean in means.items()},
            **describe_epoch(self.spending, evaluation, self.history),
        }
        self.history.append(record)
        self.epoch, self.step, self.sums, self.spending = self.epoch + 1, 0, self._new_sums(), Spending()
        # metrics first: a kill between the two repeats the epoch, and its line is then replaced
        write_atomically(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))
        self._save_checkpoint()
        return record

    def _new_sums(self) -> dict[str, Tensor]:
        sums = {name: torch.zeros((), device=self.device) for name in _SUMS}
        return sums | {f"gate:{name}": torch.zeros(gate.gates, device=self.device) for name, gate in self.gates.items()}

    def _build_optimizer(self) -> torch.optim.SGD:
        recipe = self.recipe
        in_gates = {id(p) for gate in self.gates.values() for p in gate.parameters()}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.model.parameters() if id(p) not in in_gates]},
            {
                "params": [p for p in self.model.parameters() if id(p) in in_gates],
                "weight_decay": recipe.gate_weight_decay,
            },
        ]
        return torch.optim.SGD(
            [group for group in groups if group["params"]],
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov and recipe.momentum > 0,
            weight_decay=recipe.weight_decay,
        )

    def _save_checkpoint(self) -> None:
        state = {
            "recipe": asdict(self.recipe),
            "image_size": list(self.dataset.image_size),
            "num_classes": self.dataset.num_classes,
            "decided": self.decided,
            "difference": self.difference,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.sums,
            "spending": asdict(self.spending),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        save_checkpoint(self.folder / "checkpoint.pt", state)

    def _restore(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return  # killed before the first epoch was saved: start over
        state = load_checkpoint(path, self.device)
        if recipe_from_dict(state["recipe"]) != self.recipe:
            raise ValueError(f"{path}: it belongs to another recipe than {self.folder / 'config.json'}")
        self.decided = {name: opened.cpu() for name, opened in state["decided"].items()}
        self.difference = state["difference"]
        for name, opened in self.decided.items():
            self.gates[name].freeze(opened)
        if self.decided and self.recipe.compact_training:
            self._cut()
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        # checkpoints written before energy was metered know their seconds only
        unmetered = {"seconds": state.get("seconds"), "microjoules": None, "error_bound_joules": None}
        self.sums, self.spending = state["sums"], Spending(**state.get("spending", unmetered))
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        self.history = [record for record in map(json.loads, lines) if record["epoch"] <= self.epoch]


@contextmanager
def _deferred_interrupt() -> Iterator[list[bool]]:
    """While active, a first Ctrl-C only fills the yielded list; a second one interrupts at once."""
    asked: list[bool] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield asked
        return

    def handle(signum: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)
