"""What decides a training run, as data: a recipe of six sections, whose fields are the options of `fastgate train`."""

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
    """What is trained on."""

    dataset: str = _option("cifar10", "digits, cifar10, cifar100, or folder:PATH with own images")
    validation: float = _option(0, "training images held out for validation, a number or a share below 1")
    train_images: float | None = _option(
        None, "training images to take, a number or a share below 1, after those held out; none: all"
    )
    image_size: int | None = _option(
        None,
        "pixels of an image's sides, to which CIFAR is averaged down; none: of folders what the weights were made for",
    )
    workers: int | None = _option(None, "processes that read images of folders; none: one per processor, up to 8")

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
        "none", "none, default (of torchvision or timm), or a .pth or .safetensors file to start from"
    )
    widths: str = _option("16,32,64", "channels of the three stages of a CIFAR network")
    shortcut: str = _option("conv", "shortcut of downsampling blocks of a CIFAR network: conv or pad")

    def __post_init__(self) -> None:
        _check_choice(self, shortcut=SHORTCUTS)
        parts = [part.strip() for part in self.widths.split(",")]
        if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ValueError(f"widths: expected three numbers of channels such as 16,32,64, got {self.widths!r}")
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
    """What gates there are."""

    gating: str = _option("layer", "layer, channel, both, or none for the plain network")
    position: str = _option("middle", "channel gates: before, middle or after")
    gate_depth: int = _option(2, "channel gates: dense layers, 1 or 2")
    gate_input: str = _option("pool", "channel gates: pool or flatten (the paper's)")
    hidden_features: int = _option(16, "width of the gate heads")
    estimator: str = _option("straight_through", "straight_through, gumbel, bernoulli or mean_threshold")
    window: str = _option("restoring", "straight-through gradient: clipped (the paper's), restoring or identity")
    init_logit: float | None = _option(0.5, "where gate logits start; none keeps PyTorch's default initialisation")
    temperature: float = _option(1.0, "of the Gumbel estimator")

    def __post_init__(self) -> None:
        _check_choice(self, gating=("none", *GATINGS), position=POSITIONS, gate_input=GATE_INPUTS)
        check_estimator(self.estimator)
        check_window(self.window)
        _check_bounds(self, gate_depth=(1, 2), hidden_features=(1, math.inf), temperature=(1e-6, math.inf))


@dataclass(frozen=True, kw_only=True)
class SearchOptions(SearchConfig):
    """A search as a recipe asks for it: "auto" is what depends on where it runs."""

    round_to: Any = "auto"

    def __post_init__(self) -> None:
        if self.round_to == "auto":
            checked = replace(self, round_to=None)
            for name in WEIGHTS:
                object.__setattr__(self, name, getattr(checked, name))
        else:
            super().__post_init__()

    def on(self, device_type: str, half: bool) -> SearchConfig:
        """The configuration on a device; in half precision on CUDA channel counts are multiples of 8.

        Tensor cores multiply by eights; on a CPU odd counts cost nothing that was measured (bench/results/search).
        """
        values = {f.name: getattr(self, f.name) for f in fields(SearchConfig)}
        if values["round_to"] == "auto":
            values["round_to"] = 8 if device_type == "cuda" and half else None
        return SearchConfig(**values)


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """How weights are learned."""

    optimizer: str = _option("sgd", "sgd or adamw")
    learning_rate: float = _option(0.1, "peak learning rate")
    lr_schedule: str = _option("cosine", 'cosine, or factors over epochs such as "0:1, 60:0.1, 120:0.01"')
    warmup_epochs: float = _option(5.0, "epochs over which the learning rate rises from 0")
    momentum: float = _option(0.9, "of SGD")
    nesterov: bool = _option(True, "Nesterov momentum, of SGD")
    weight_decay: float = _option(5e-4, "of the network's parameters")
    gate_lr_factor: float = _option(1.0, "learning rate of the gate heads, as a multiple of the network's")
    gate_weight_decay: float = _option(0.0, "of the gate heads' parameters")
    label_smoothing: float = _option(0.0, "of the cross-entropy")

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
    """How long, how, and what else is trained with it."""

    epochs: int = _option(300, "epochs of training")
    batch_size: int = _option(256, "samples per step, of all processes together")
    precision: str = _option("auto", "auto, fp32, fp16 or bf16; auto is fp32 on a CPU, fp16 on sm_75, else bf16")
    sync_batch_norms: bool = _option(True, "batch norms take the statistics of all processes, where there are several")
    compile: bool = _option(False, "let torch.compile compile the network")
    seed: int = _option(1, "of initialisation, data order and augmentation")
    control: str = _option(
        "none",
        "also train, the same way: unpruned (no gates), equal-macs (a plain network of the compact network's MACs), "
        "equal-training (that one, for as many epochs as cost the MACs of the gated run), equal-latency (a plain "
        "network that is as fast for one image), random (a random sub-network of its MACs), retrain (the compact "
        "network from scratch); several with commas",
    )

    def __post_init__(self) -> None:
        _check_choice(self, precision=PRECISIONS)
        _check_bounds(self, epochs=(1, math.inf), batch_size=(2, math.inf), seed=(0, 2**31))
        names = self.controls
        if len(set(names)) < len(names) or not set(names) <= set(CONTROLS):
            raise ValueError(
                f"control: expected none, or some of {', '.join(CONTROLS)} with commas between, got {self.control!r}"
            )

    @property
    def controls(self) -> tuple[str, ...]:
        """The controls asked for, in the order of CONTROLS where they are known ones."""
        names = [] if self.control == "none" else [name.strip() for name in self.control.split(",")]
        return tuple(sorted(names, key=lambda name: CONTROLS.index(name) if name in CONTROLS else len(CONTROLS)))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a training run, apart from where its data and files lie.

    Raises `ValueError` for what no run could honour.
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
        """The learning rate at an epoch (fractions count): linear warm-up times the schedule."""
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
    """A field of a section, as an option.

    Attributes:
        section: of the recipe.
        kinds: types of its values, None's left out.
        optional: whether it may be none.
    """

    name: str
    section: str
    default: Any
    help: str
    kinds: tuple[type, ...]
    optional: bool

    def parse(self, text: str) -> Any:
        """The value from its text: "none" for None, "true" or "false", numbers.

        Raises:
            ValueError: the text is of none of its types.
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
    """What a class says of its attributes in its docstring, by name."""
    text = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    ([\w, ]+): (.*(?:\n        .*)*)", text, re.MULTILINE)
    return {name: " ".join(about.split()).rstrip(".") for names, about in entries for name in names.split(", ")}


OPTIONS: dict[str, Option] = {option.name: option for option in _list_options()}
# what options were called in the first version
OLD_NAMES = {
    "target_macs": "target",
    "lambda_polar": "polarization",
    "lambda_activation": "activation",
    "lambda_budget": "budget",
    "lambda_capacity": "capacity",
}


def find_option(name: str) -> Option:
    """An option by its name, also the one it had.

    Raises:
        ValueError: there is none; the message says which is near.
    """
    name = OLD_NAMES.get(name, name)
    if name not in OPTIONS:
        near = difflib.get_close_matches(name, OPTIONS, n=1)
        raise ValueError(
            f"{name}: expected an option of a recipe ({', '.join(OPTIONS)}), got another"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    return OPTIONS[name]


def change(recipe: Recipe, **options: Any) -> Recipe:
    """The recipe with other values of these options, whatever their sections.

    Raises:
        ValueError: an unknown option, or values that no run could honour.
    """
    sections: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        option = find_option(name)
        sections.setdefault(option.section, {})[option.name] = value
    return replace(
        recipe, **{section: replace(getattr(recipe, section), **values) for section, values in sections.items()}
    )


def make_recipe(**options: Any) -> Recipe:
    """A recipe with the defaults but for these options; see :func:`change`."""
    return change(Recipe(), **options)


def list_values(recipe: Recipe) -> dict[str, Any]:
    """The value of every option of a recipe, by name."""
    return {name: getattr(getattr(recipe, option.section), name) for name, option in OPTIONS.items()}


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain data, for JSON and checkpoints; :func:`recipe_from_dict` reads it."""
    return {"version": VERSION, **asdict(recipe)}


# what runs of the first version did where their recipes do not say it: these options came with later ones of it
_BEFORE: dict[str, Any] = {
    "widths": "16,32,64",
    "cost": "macs",
    "commit_after": None,
    "compact_training": False,
    "capacity": "0",
    "control": "none",
    "sync_batch_norms": True,
}
# and these with the second version, whose defaults do what was done
_ADDED = ("image_size", "workers", "weights", "optimizer", "label_smoothing", "compile")
# and these after its first runs
_ADDED_LATER = ("train_images", "gate_lr_factor")


def recipe_from_dict(data: Mapping[str, Any]) -> Recipe:
    """The recipe of a run's config.json or checkpoint, of this version or of the first, which had no sections.

    Raises:
        ValueError: it is neither.
    """
    version = data.get("version", 1)
    if version not in (1, VERSION):
        raise ValueError(f"recipe: expected version 1 or {VERSION}, got {version!r}; use a later version of fastgate")
    if version == 1:
        flat = {OLD_NAMES.get(name, name): value for name, value in data.items()}
        flat = {
            **_BEFORE,
            "round_to": None,
            **{name: OPTIONS[name].default for name in (*_ADDED, *_ADDED_LATER)},
            **flat,
        }
    else:
        flat = {name: OPTIONS[name].default for name in _ADDED_LATER}
        for name, value in data.items():
            flat |= value if isinstance(value, Mapping) else {name: value}
        del flat["version"]
    if missing := OPTIONS.keys() - flat.keys():
        raise ValueError(f"recipe: expected every option of version {version}, got none of {sorted(missing)[0]}")
    if odd := flat.keys() - OPTIONS.keys():
        raise ValueError(f"recipe: expected the options of fastgate train, got {sorted(odd)[0]} too")
    return make_recipe(**flat)
