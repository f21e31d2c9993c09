"""Other places that a run's metrics go to, besides its `metrics.jsonl`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastgate.training.records import EpochRecord

LOGGERS = ("none", "tensorboard")


class TensorBoardLogger:
    """Writes the numbers of every epoch to the folder `tensorboard` inside a run's, for TensorBoard.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                f"logger: tensorboard expects the package tensorboard, got {error}; install it with "
                "pip install 'fastgate[tensorboard]', or use --logger none"
            ) from error
        self._folder = folder / "tensorboard"
        self._open = SummaryWriter
        self._writer: SummaryWriter | None = None

    def log(self, record: EpochRecord) -> None:
        """Write an epoch's line of metrics; what an earlier process wrote from this epoch on is discarded."""
        epoch = record["epoch"]
        if self._writer is None:
            self._writer = self._open(str(self._folder), purge_step=epoch)
        for name, value in list_scalars(record):
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()  # a kill loses nothing of a finished epoch


def open_logger(name: str, folder: Path) -> TensorBoardLogger | None:
    """The logger called `name` for a run in a folder; None for "none". It writes nothing before its first record.

    Raises:
        ValueError: another name, or a logger whose package is not installed.
    """
    if name not in LOGGERS:
        raise ValueError(f"logger: expected one of {', '.join(LOGGERS)}, got {name!r}")
    return TensorBoardLogger(folder) if name == "tensorboard" else None


def list_scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record by path, such as "train/loss"; for a list (a gate's channels) their mean."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from list_scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list) and value and not isinstance(value[0], str):
            yield prefix + name, sum(value) / len(value)
        elif isinstance(value, int | float) and name != "epoch":
            yield prefix + name, float(value)
