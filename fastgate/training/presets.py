"""Training recipes as data: every field is a command-line option of `fastgate train`."""

import math
import types
import typing
from dataclasses import dataclass, field, fields, replace
from typing import Any

from fastgate import schedules
from fastgate.estimators import check_estimator
from fastgate.models.attachment import GATINGS
from fastgate.models.block import POSITIONS
from fastgate.models.resnet import SHORTCUTS
from fastgate.ops.gate_head import check_window
from fastgate.pruning.costs import COSTS

PRECISIONS = ("auto", "fp32", "fp16", "bf16")
GATE_INPUTS = ("pool", "flatten")
CONTROLS = ("unpruned", "equal-macs", "random", "retrain")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run, apart from where its data and files lie.

    Raises `ValueError` for a field that no run could honour.
    """

    dataset: str = _option("cifar10", "digits, cifar10 or cifar100")
    network: str = _option("resnet110", "resnet20, resnet32, ... (any depth 6n + 2)")
    widths: str = _option("16,32,64", "channels of the network's three stages")
    shortcut: str = _option("conv", "shortcut of downsampling blocks: conv or pad")

    gating: str = _option("layer", "layer, channel, or none for the plain network")
    position: str = _option("middle", "channel gates: before, middle or after")
    gate_depth: int = _option(2, "channel gates: dense layers, 1 or 2")
    gate_input: str = _option("pool", "channel gates: pool or flatten (the paper's)")
    hidden_features: int = _option(16, "width of the gate heads")
    estimator: str = _option("straight_through", "straight_through, gumbel, bernoulli or mean_threshold")
    window: str = _option("restoring", "straight-through gradient: clipped (the paper's), restoring or identity")
    init_logit: float | None = _option(0.5, "where gate logits start; none keeps PyTorch's default initialisation")
    temperature: float = _option(1.0, "of the Gumbel estimator")

    epochs: int = _option(300, "epochs of training")
    batch_size: int = _option(256, "samples per step, of all processes together")
    learning_rate: float = _option(0.1, "peak learning rate of SGD")
    lr_schedule: str = _option("cosine", 'cosine, or factors over epochs such as "0:1, 60:0.1, 120:0.01"')
    warmup_epochs: float = _option(5.0, "epochs over which the learning rate rises from 0")
    momentum: float = _option(0.9, "of SGD")
    nesterov: bool = _option(True, "Nesterov momentum")
    weight_decay: float = _option(5e-4, "of the network's parameters")
    gate_weight_decay: float = _option(0.0, "of the gate heads' parameters")

    lambda_polar: str = _option("1", "weight of the polarization loss, a number or a schedule over epochs")
    lambda_activation: str = _option("0", "weight of the activation loss, a number or a schedule over epochs")
    lambda_budget: str = _option("16", "weight of the budget loss, a number or a schedule over epochs")
    lambda_capacity: str = _option(
        "0.1", "weight of the share of parameters given up for the target, a number or a schedule over epochs"
    )
    target_macs: float | None = _option(0.5, "share of the cost that the compact network has; none for no target")
    cost: str = _option("macs", "what target_macs is a share of: macs, params, or latency (measured on this device)")
    open_until: float = _option(0.1, "gates are held open for this share of the epochs")
    anneal_until: float = _option(0.25, "the target falls from 1 to target_macs until this share of the epochs")
    settle_at: float | None = _option(0.4, "gates are decided and frozen at this share of the epochs; none: at the end")
    commit_after: int | None = _option(
        5, "a gate is frozen earlier once all samples of this many epochs agree; none: no"
    )
    compact_training: bool = _option(True, "what frozen gates closed leaves the network in training at once")

    sync_batch_norms: bool = _option(True, "batch norms take the statistics of all processes, where there are several")
    validation: int = _option(0, "training images held out for validation")
    precision: str = _option("auto", "auto, fp32, fp16 or bf16; auto is fp32 on a CPU, fp16 on sm_75, else bf16")
    seed: int = _option(1, "of initialisation, data order and augmentation")
    control: str = _option(
        "none",
        "also train, the same way: unpruned (no gates), equal-macs (a plain ResNet of the compact network's MACs), "
        "random (a random sub-network of its MACs), retrain (the compact network from scratch); several with commas",
    )

    def __post_init__(self) -> None:
        choices = {
            "dataset": ("digits", "cifar10", "cifar100"),
            "shortcut": SHORTCUTS,
            "gating": ("none", *GATINGS),
            "position": POSITIONS,
            "gate_input": GATE_INPUTS,
            "precision": PRECISIONS,
            "cost": COSTS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        self.depth, self.stage_widths  # noqa: B018 (checks them)
        names = self.controls
        if len(set(names)) < len(names) or not set(names) <= set(CONTROLS):
            raise ValueError(
                f"control: expected none, or some of {', '.join(CONTROLS)} with commas between, got {self.control!r}"
            )
        if self.gating == "none" and set(names) - {"unpruned"}:
            raise ValueError(
                f"control: expected none for a network without gates, got {self.control!r}; set gating to layer or "
                "channel"
            )
        check_estimator(self.estimator)
        check_window(self.window)
        for name in ("lambda_polar", "lambda_activation", "lambda_budget", "lambda_capacity"):
            schedules.parse(getattr(self, name))
        if self.lr_schedule != "cosine":
            schedules.parse(self.lr_schedule)
        bounds = {
            "gate_depth": (1, 2),
            "hidden_features": (1, math.inf),
            "temperature": (1e-6, math.inf),
            "epochs": (1, math.inf),
            "batch_size": (2, math.inf),
            "learning_rate": (0, math.inf),
            "warmup_epochs": (0, math.inf),
            "momentum": (0, 1),
            "weight_decay": (0, math.inf),
            "gate_weight_decay": (0, math.inf),
            "target_macs": (0, 1),
            "open_until": (0, 1),
            "anneal_until": (0, 1),
            "settle_at": (0, 1),
            "commit_after": (1, math.inf),
            "validation": (0, math.inf),
            "seed": (0, 2**31),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}: expected a number from {low} to {high}, got {value}")
        if not self.open_until <= self.anneal_until <= (1 if self.settle_at is None else self.settle_at):
            raise ValueError(
                "open_until, anneal_until, settle_at: expected increasing shares of the epochs, got "
                f"{self.open_until}, {self.anneal_until}, {self.settle_at}"
            )

    @property
    def depth(self) -> int:
        """Depth of the network, from its name."""
        number = self.network.removeprefix("resnet")
        if not self.network.startswith("resnet") or not number.isdigit() or int(number) < 8 or int(number) % 6 != 2:
            raise ValueError(
                f"network: expected resnetN with N = 6n + 2 (resnet20, resnet56, ...), got {self.network!r}"
            )
        return int(number)

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Channels of the stages."""
        parts = [part.strip() for part in self.widths.split(",")]
        if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ValueError(f"widths: expected three numbers of channels such as 16,32,64, got {self.widths!r}")
        return tuple(map(int, parts))

    @property
    def controls(self) -> tuple[str, ...]:
        """The controls asked for, in the order of CONTROLS where they are known ones."""
        names = [] if self.control == "none" else [name.strip() for name in self.control.split(",")]
        return tuple(sorted(names, key=lambda name: CONTROLS.index(name) if name in CONTROLS else len(CONTROLS)))

    def target_at(self, epoch: float) -> float | None:
        """The share of the cost asked for at an epoch: 1 while gates are held open, then falling linearly."""
        if self.target_macs is None:
            return None
        start, end = self.open_until * self.epochs, self.anneal_until * self.epochs
        share = 1.0 if end <= start else min(max((epoch - start) / (end - start), 0.0), 1.0)
        return 1 + (self.target_macs - 1) * (share if epoch >= start else 0.0)

    def learning_rate_at(self, epoch: float) -> float:
        """The learning rate at an epoch (fractions count): linear warm-up times the schedule."""
        if self.lr_schedule == "cosine":
            rest = max(self.epochs - self.warmup_epochs, 1e-9)
            progress = min(max((epoch - self.warmup_epochs) / rest, 0.0), 1.0)
            factor = 0.5 * (1 + math.cos(math.pi * progress))
        else:
            factor = schedules.parse(self.lr_schedule)(epoch)
        warmup = min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else 1.0
        return self.learning_rate * factor * warmup


def parse_field(name: str, text: str) -> Any:
    """The value of a recipe field from its text: "none" for None, "true" or "false", numbers."""
    hint = typing.get_type_hints(Recipe)[name]
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and text.lower() == "none":
        return None
    kind = next(option for option in options if option is not type(None))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name}: expected true or false, got {text!r}")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{name}: expected a value of type {kind.__name__}, got {text!r}") from error


# section 5.1 as printed; what it leaves open (lambda, gate position) follows the closest table, see each preset
_PAPER = Recipe(
    gate_input="flatten",
    window="clipped",
    init_logit=None,
    epochs=350,
    warmup_epochs=0,
    nesterov=False,
    gate_weight_decay=5e-4,
    lambda_polar="1",
    lambda_budget="0",
    lambda_capacity="0",
    target_macs=None,
    open_until=0.0,
    settle_at=None,
    anneal_until=0.0,
    commit_after=None,
    compact_training=False,
)
_PAPER_10 = replace(_PAPER, batch_size=256, lr_schedule="0:1, 60:0.1, 120:0.01, 160:0.001")
_PAPER_100 = replace(_PAPER, dataset="cifar100", batch_size=64, lr_schedule="0:1, 125:0.1, 190:0.01, 250:0.001")

PRESETS: dict[str, Recipe] = {
    "demo": Recipe(
        dataset="digits",
        network="resnet20",
        epochs=40,
        batch_size=64,
        warmup_epochs=2,
        control="unpruned",
    ),
    # the recipe behind the strongest plain baselines at this budget (AutoDL-Projects, CIFAR-E300-W5-L1-COS)
    "cifar10-layer": Recipe(),
    "cifar10-channel": Recipe(gating="channel"),
    "cifar100-layer": Recipe(dataset="cifar100"),
    "cifar100-channel": Recipe(dataset="cifar100", gating="channel"),
    "paper-cifar10-layer": replace(_PAPER_10, gate_input="pool"),
    # the FLOPs of Table 2 fit "after" on CIFAR-10 and "middle" on CIFAR-100
    "paper-cifar10-channel": replace(_PAPER_10, gating="channel", position="after"),
    "paper-cifar100-layer": replace(_PAPER_100, gate_input="pool"),
    "paper-cifar100-channel": replace(_PAPER_100, gating="channel", position="middle"),
}


def get_preset(name: str) -> Recipe:
    """The recipe called `name`; an unknown name is a `ValueError` that lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def recipe_from_dict(data: dict[str, Any]) -> Recipe:
    """The recipe that `dataclasses.asdict` gave, for example from a run's config.json."""
    known = {f.name for f in fields(Recipe)}
    data = {"sync_batch_norms": True, **data}  # as it was before there was a choice
    if odd := sorted(data.keys() ^ known):
        raise ValueError(f"recipe: expected exactly the fields of this version, got a difference at {', '.join(odd)}")
    return Recipe(**data)
