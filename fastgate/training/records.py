"""What a run writes down, as types: its `config.json`, a record per epoch in `metrics.jsonl`, and its `summary.json`.

They are plain dictionaries. Any key may be missing from a file of an earlier version: what is not in every file is
read with `get`.
"""

from collections.abc import Mapping
from typing import Any, TypedDict


class Config(TypedDict, total=False):
    """What was started; `environment` as of :func:`fastgate.env.describe_environment`."""

    recipe: dict[str, Any]
    control: str | None
    command: str | None
    environment: dict[str, Any]


class Seconds(TypedDict, total=False):
    """Of an epoch, and of the run so far (`total`)."""

    train: float
    eval: float
    total: float


class Joules(TypedDict, total=False):
    """Likewise; None where they are unknown."""

    train: float | None
    eval: float | None
    total: float | None


class EnergySource(TypedDict, total=False):
    """Where joules come from, see :class:`fastgate.energy.Energy`; `error_bound_joules` by "train" and "eval"."""

    source: str | None
    error_bound_joules: dict[str, float | None]
    warnings: list[str]


class TrainingMacs(TypedDict):
    """MACs of forward passes in training: of an image this epoch, of the run so far, and had all gates been open."""

    per_image: int
    total: int
    all_open_total: int


class EpochRecord(TypedDict, total=False):
    """An epoch of a run; what is said of gates is explained at :meth:`fastgate.pruning.search.GateSearch.metrics`.

    `train` has means over the steps, `eval` what the trainer's `evaluate` returned.
    """

    epoch: int
    eval: dict[str, Any]
    train: dict[str, float]
    phase: str
    target: float | None
    open_ratio: float
    polarization: float
    macs: int | None
    macs_training: TrainingMacs | None
    frozen: bool
    max_abs_difference: float
    gates: dict[str, list[float]]
    learning_rate: float
    seconds: Seconds
    joules: Joules
    energy: EnergySource


class Row(TypedDict, total=False):
    """A network in a summary. Networks that were not trained have no accuracy (None), and nothing about training.

    `latency_ms` is that of one image; quartiles are the lower and the upper one; `flops` are there where the run was
    asked for them.
    """

    accuracy: float | None
    open_ratio: float
    macs: int
    parameters: int
    flops: int
    latency_ms: float
    latency_ms_quartiles: list[float]
    images_per_second: float
    images_per_second_quartiles: list[float]
    load_average: float | None
    joules_per_image: float | None
    energy: EnergySource
    validation_accuracy: float | None
    macs_training: int
    seconds_training: float
    joules_training: float | None
    joules_evaluation: float | None


Rows = Mapping[str, Row]


class Preprocessing(TypedDict, total=False):
    """What users of a network have to know about its images: `mean` and `std` per channel, of images scaled to 0..1.

    `class_names` are by label, None where the data set has none.
    """

    dataset: str
    image_size: list[int]
    mean: list[float]
    std: list[float]
    class_names: list[str] | None


class Summary(TypedDict, total=False):
    """What a run came to; the last four say it of gates: `gate_macs` is what each gate switches, per image."""

    rows: dict[str, Row]
    recipe: dict[str, Any]
    image_size: list[int]
    preprocessing: Preprocessing
    images_trained: int
    device: str
    processes: int
    precision: str
    latency: str
    energy: EnergySource | None
    date: str
    environment: dict[str, Any]
    max_abs_difference: float | None
    polarization: float
    lowest_unanimity: float
    gate_macs: dict[str, int]
