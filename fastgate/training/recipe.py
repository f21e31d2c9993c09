"""Recipes: the configuration of a training run in six sections, whose fields are the options of `fastgate train`."""

import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

from fastgate import schedules
from fastgate.estimators import check_estimator
from fastgate.models.attachment import GATINGS
from fastgate.models.block import POSITIONS
from fastgate.models.resnet import SHORTCUTS
from fastgate.ops.gate_head import check_window
from fastgate.pruning.config import WEIGHTS, SearchConfig

VERSION = 2
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
GATE_INPUTS = ("pool", "flatten")
OPTIMIZERS = ("sgd", "adamw")
CONTROLS = ("unpruned", "equal-macs", "equal-training", "equal-latency", "random", "retrain")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _check_choice(section: Any, **choices: tuple[str, ...]) -> None:
    for name, allowed in choices.items():
        if getattr(section, name) not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(section, name)!r}")


def _check_bounds(section: Any, **bounds: tuple[float, float]) -> None:
    for name, (low, high) in bounds.items():
        value = getattr(section, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name}: expected a number from {low} to {high}, got {value}")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The training data."""

    dataset: str = _option("cifar10", "digits, cifar10, cifar100, or folder:PATH for your own images")
    validation: float = _option(0, "number of training images held out for validation, or a fraction below 1")
    train_images: float | None = _option(
        None, "number of the remaining training images to use, or a fraction below 1; none: all"
    )
    image_size: int | None = _option(
        None,
        "side of the images in pixels; CIFAR is averaged down to it; none: CIFAR unchanged, else that of the weights",
    )
    workers: int | None = _option(None, "processes that read the images of a folder; none: one per CPU, up to 8")

    def __post_init__(self) -> None:
        bounds = {"validation": (0, math.inf), "train_images": (0, math.inf)}
        _check_bounds(self, **bounds, image_size=(1, math.inf), workers=(0, math.inf))


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The network without its gates."""

    network: str = _option(
        "resnet110",
        "resnet20, resnet32, ... (CIFAR, any depth 6n + 2), torchvision:NAME, timm:NAME, or package.module:function",
    )
    weights: str = _option(
        "none", "initial weights: none, default (those of torchvision or timm), or a .pth or .safetensors file"
    )
    widths: str = _option("16,32,64", "channels of the three stages of a CIFAR network")
    shortcut: str = _option("conv", "downsampling shortcut of a CIFAR network: conv or pad")

    def __post_init__(self) -> None:
        _check_choice(self, shortcut=SHORTCUTS)
        parts = [part.strip() for part in self.widths.split(",")]
        if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ValueError(f"widths: expected three channel counts such as 16,32,64, got {self.widths!r}")
        if ":" not in self.network and self.cifar_depth is None:
            raise ValueError(
                "network: expected resnetN with N = 6n + 2 (resnet20, resnet56, ...), torchvision:NAME, timm:NAME or "
                f"package.module:function, got {self.network!r}"
            )

    @property
    def cifar_depth(self) -> int | None:
        """Depth of a CIFAR ResNet, from its name; None for any other network."""
        number = self.network.removeprefix("cifar:").removeprefix("resnet")
        known = self.network.removeprefix("cifar:").startswith("resnet") and number.isdigit()
        return int(number) if known and int(number) >= 8 and int(number) % 6 == 2 else None

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Channels of the stages."""
        return tuple(int(part) for part in self.widths.split(","))


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """The gates and their heads."""

    gating: str = _option("layer", "layer, channel, both, or none for the plain network")
    position: str = _option("middle", "channel gates: position in the block, before, middle or after")
    gate_depth: int = _option(2, "channel gates: number of dense layers in the head, 1 or 2")
    gate_input: str = _option("pool", "channel gates: input of the head, pool or flatten (as in the paper)")
    hidden_features: int = _option(16, "hidden width of the gate heads")
    estimator: str = _option("straight_through", "estimator: straight_through, gumbel, bernoulli or mean_threshold")
    window: str = _option("restoring", "straight-through gradient: clipped (as in the paper), restoring or identity")
    init_logit: float | None = _option(0.5, "initial gate logits; none: PyTorch's default initialisation")
    temperature: float = _option(1.0, "temperature of the Gumbel estimator")

    def __post_init__(self) -> None:
        _check_choice(self, gating=("none", *GATINGS), position=POSITIONS, gate_input=GATE_INPUTS)
        check_estimator(self.estimator)
        check_window(self.window)
        _check_bounds(self, gate_depth=(1, 2), hidden_features=(1, math.inf), temperature=(1e-6, math.inf))


@dataclass(frozen=True, kw_only=True)
class SearchOptions(SearchConfig):
    """The search of a recipe; `round_to` "auto" is resolved by the device and precision of the run."""

    round_to: Any = "auto"

    def __post_init__(self) -> None:
        if self.round_to == "auto":
            checked = replace(self, round_to=None)
            for name in WEIGHTS:
                object.__setattr__(self, name, getattr(checked, name))
        else:
            super().__post_init__()

    def on(self, device_type: str, half: bool) -> SearchConfig:
        """The configuration on a device; "auto" rounds channel counts to multiples of 8 on CUDA in half precision.

        Tensor cores work on multiples of 8; on a CPU other counts had no measurable cost (bench/results/search).
        """
        values = {f.name: getattr(self, f.name) for f in fields(SearchConfig)}
        if values["round_to"] == "auto":
            values["round_to"] = 8 if device_type == "cuda" and half else None
        return SearchConfig(**values)


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """The optimizer of the weights and of the gate heads."""

    optimizer: str = _option("sgd", "sgd or adamw")
    learning_rate: float = _option(0.1, "peak learning rate")
    lr_schedule: str = _option("cosine", 'cosine, or factors from given epochs on, such as "0:1, 60:0.1, 120:0.01"')
    warmup_epochs: float = _option(5.0, "epochs of linear warm-up of the learning rate from 0")
    momentum: float = _option(0.9, "momentum of SGD")
    nesterov: bool = _option(True, "use Nesterov momentum with SGD")
    weight_decay: float = _option(5e-4, "weight decay of the network's parameters")
    gate_lr_factor: float = _option(1.0, "learning rate of the gate heads, as a multiple of the network's")
    gate_weight_decay: float = _option(0.0, "weight decay of the gate heads' parameters")
    label_smoothing: float = _option(0.0, "label smoothing of the cross-entropy")

    def __post_init__(self) -> None:
        _check_choice(self, optimizer=OPTIMIZERS)
        if self.lr_schedule != "cosine":
            schedules.parse(self.lr_schedule)
        positive = (0, math.inf)
        _check_bounds(
            self, learning_rate=positive, warmup_epochs=positive, momentum=(0, 1), weight_decay=positive,
            gate_lr_factor=positive, gate_weight_decay=positive, label_smoothing=(0, 1),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Length, batch size and numerics of training, and the controls trained along with it."""

    epochs: int = _option(300, "number of epochs")
    batch_size: int = _option(256, "samples per step, over all processes")
    precision: str = _option("auto", "auto, fp32, fp16 or bf16; auto is fp32 on a CPU, fp16 on sm_75, else bf16")
    sync_batch_norms: bool = _option(True, "with several processes, batch norms use the statistics of the whole batch")
    compile: bool = _option(False, "compile the network with torch.compile")
    seed: int = _option(1, "seed of initialisation, data order and augmentation")
    control: str = _option(
        "none",
        "baselines to train with the same recipe, comma-separated: unpruned (no gates), equal-macs (a plain network "
        "with the compact network's MACs), equal-training (that network, trained for the MACs of the gated run), "
        "equal-latency (a plain network as fast on one image), random (a random sub-network with the same MACs), "
        "retrain (the compact network from scratch)",
    )

    def __post_init__(self) -> None:
        _check_choice(self, precision=PRECISIONS)
        _check_bounds(self, epochs=(1, math.inf), batch_size=(2, math.inf), seed=(0, 2**31))
        names = self.controls
        if len(set(names)) < len(names) or not set(names) <= set(CONTROLS):
            raise ValueError(
                f"control: expected none, or a comma-separated list of {', '.join(CONTROLS)}, got {self.control!r}"
            )

    @property
    def controls(self) -> tuple[str, ...]:
        """The requested controls in the order of CONTROLS, unknown ones last."""
        names = [] if self.control == "none" else [name.strip() for name in self.control.split(",")]
        return tuple(sorted(names, key=lambda name: CONTROLS.index(name) if name in CONTROLS else len(CONTROLS)))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines a training run, except where its data and files are.

    Raises `ValueError` for values that no run can honour.
    """

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    gates: GateOptions = field(default_factory=GateOptions)
    search: SearchOptions = field(default_factory=SearchOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        if self.gates.gating == "none" and set(self.run.controls) - {"unpruned"}:
            raise ValueError(
                f"control: expected none for a network without gates, got {self.run.control!r}; set gating to layer "
                "or channel"
            )

    def learning_rate_at(self, epoch: float) -> float:
        """The learning rate at an epoch, which may be fractional: linear warm-up times the schedule."""
        optimizer = self.optimizer
        if optimizer.lr_schedule == "cosine":
            rest = max(self.run.epochs - optimizer.warmup_epochs, 1e-9)
            progress = min(max((epoch - optimizer.warmup_epochs) / rest, 0.0), 1.0)
            factor = 0.5 * (1 + math.cos(math.pi * progress))
        else:
            factor = schedules.parse(optimizer.lr_schedule)(epoch)
        warmup = min(1.0, epoch / optimizer.warmup_epochs) if optimizer.warmup_epochs else 1.0
        return optimizer.learning_rate * factor * warmup


class Option(NamedTuple):
    """A field of a section as an option.

    Attributes:
        section: name of its section in the recipe.
        kinds: types of its values, except None.
        optional: whether it may be None.
    """

    name: str
    section: str
    default: Any
    help: str
    kinds: tuple[type, ...]
    optional: bool

    def parse(self, text: str) -> Any:
        """Parse a value from text: "none" is None, "true" and "false" are booleans.

        Raises:
            ValueError: the text has none of the option's types.
        """
        if self.optional and text.lower() == "none":
            return None
        for kind in self.kinds:
            if kind is bool:
                if text.lower() in ("true", "false"):
                    return text.lower() == "true"
                raise ValueError(f"{self.name}: expected true or false, got {text!r}")
            try:
                number = kind(text)
            except ValueError:
                continue
            whole = kind is float and self.name in ("validation", "train_images") and number == int(number)
            return int(number) if whole else number
        raise ValueError(f"{self.name}: expected a value of type {self.kinds[0].__name__}, got {text!r}")


def _list_options() -> Iterator[Option]:
    for part in fields(Recipe):
        section = typing.get_type_hints(Recipe)[part.name]
        hints = typing.get_type_hints(section)
        documented = _documented(SearchConfig) if issubclass(section, SearchConfig) else {}
        for each in fields(section):
            hint = (int | str | None) if each.name == "round_to" else hints[each.name]
            types_of = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            kinds = tuple(kind for kind in types_of if kind is not type(None))
            text = each.metadata.get("help") or documented[each.name]
            yield Option(each.name, part.name, each.default, text, kinds, type(None) in types_of)


def _documented(cls: type) -> dict[str, str]:
    """The descriptions of attributes in a class's docstring, by name; None as the command line writes it."""
    text = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    ([\w, ]+): (.*(?:\n        .*)*)", text, re.MULTILINE)
    written = {names: re.sub(r"\bNone\b", "none", " ".join(about.split()).rstrip(".")) for names, about in entries}
    return {name: about for names, about in written.items() for name in names.split(", ")}


OPTIONS: dict[str, Option] = {option.name: option for option in _list_options()}
# names of options in the first version, and their names now
OLD_NAMES = {
    "target_macs": "target",
    "lambda_polar": "polarization",
    "lambda_activation": "activation",
    "lambda_budget": "budget",
    "lambda_capacity": "capacity",
}


def find_option(name: str) -> Option:
    """An option by its name or its former name.

    Raises:
        ValueError: an unknown name; the message suggests the closest one.
    """
    name = OLD_NAMES.get(name, name)
    if name not in OPTIONS:
        near = difflib.get_close_matches(name, OPTIONS, n=1)
        raise ValueError(
            f"{name}: expected an option of a recipe ({', '.join(OPTIONS)}), got an unknown name"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    return OPTIONS[name]


def change(recipe: Recipe, **options: Any) -> Recipe:
    """The recipe with new values of these options, whichever sections they are in.

    Raises:
        ValueError: an unknown option, or values that no run can honour.
    """
    sections: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        option = find_option(name)
        sections.setdefault(option.section, {})[option.name] = value
    return replace(
        recipe, **{section: replace(getattr(recipe, section), **values) for section, values in sections.items()}
    )


def make_recipe(**options: Any) -> Recipe:
    """A recipe with these options, and defaults for all others; see :func:`change`."""
    return change(Recipe(), **options)


def list_values(recipe: Recipe) -> dict[str, Any]:
    """The value of every option of a recipe, by name."""
    return {name: getattr(getattr(recipe, option.section), name) for name, option in OPTIONS.items()}


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data for JSON and checkpoints; :func:`recipe_from_dict` reads it."""
    return {"version": VERSION, **asdict(recipe)}


# options added during the first version, with the values that its earlier runs used
_BEFORE: dict[str, Any] = {
    "widths": "16,32,64",
    "cost": "macs",
    "commit_after": None,
    "compact_training": False,
    "capacity": "0",
    "control": "none",
    "sync_batch_norms": True,
}
# options added with the second version, whose defaults match earlier runs
_ADDED = ("image_size", "workers", "weights", "optimizer", "label_smoothing", "compile")
# and after its first runs, with the values that these used
ADDED_LATER: dict[str, Any] = {"train_images": None, "gate_lr_factor": 1.0, "detach_gates": False}


def recipe_from_dict(data: Mapping[str, Any]) -> Recipe:
    """The recipe of a run's config.json or checkpoint, of this version or of the first, which had no sections.

    Raises:
        ValueError: another version, or missing or unknown options.
    """
    version = data.get("version", 1)
    if version not in (1, VERSION):
        raise ValueError(f"recipe: expected version 1 or {VERSION}, got {version!r}; use a later version of fastgate")
    if version == 1:
        flat = {OLD_NAMES.get(name, name): value for name, value in data.items()}
        flat = {
            **_BEFORE,
            "round_to": None,
            **{name: OPTIONS[name].default for name in _ADDED},
            **ADDED_LATER,
            **flat,
        }
    else:
        flat = dict(ADDED_LATER)
        for name, value in data.items():
            flat |= value if isinstance(value, Mapping) else {name: value}
        del flat["version"]
    if missing := OPTIONS.keys() - flat.keys():
        raise ValueError(f"recipe: expected every option of version {version}, got one without {sorted(missing)[0]}")
    if odd := flat.keys() - OPTIONS.keys():
        raise ValueError(f"recipe: expected only options of fastgate train, got {sorted(odd)[0]} as well")
    return make_recipe(**flat)
