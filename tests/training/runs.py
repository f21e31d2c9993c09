"""Short real runs on digits, in process or through the command line, for the tests of this folder and of the CLI."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastgate.training.data import Data
from fastgate.training.pipeline import Run, make_trainer
from fastgate.training.presets import get_preset
from fastgate.training.recipe import Recipe, change
from fastgate.training.trainer import Trainer

# ResNet-8 on digits, every phase of a run within 4 epochs: open, search, settled
TINY = change(
    get_preset("demo"),
    network="resnet8",
    epochs=4,
    batch_size=128,
    warmup_epochs=1.0,
    open_until=0.25,
    anneal_until=0.5,
    settle_at=0.75,
    control="none",
)

# the same recipe as options of the command line
TINY_OPTIONS = [
    *("--preset", "demo", "--network", "resnet8", "--epochs", "4", "--batch-size", "128", "--warmup-epochs", "1"),
    *("--open-until", "0.25", "--anneal-until", "0.5", "--settle-at", "0.75", "--control", "none", "--device", "cpu"),
]


def trainer_of(recipe: Recipe, data: Data, folder: Path, *, resume: bool = False) -> Trainer:
    """The trainer of a run in a folder, which is made."""
    folder.mkdir(exist_ok=True)
    trainer = make_trainer(Run(recipe, folder), data)
    if resume:
        trainer.restore()
    return trainer


# wide enough for every table
ENVIRONMENT = {**os.environ, "COLUMNS": "200"}

# what a run imports takes four times as long as the run: one process does it, and every command is a fork of that one
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["pytest", "sklearn.datasets", "torchvision", "fvcore.nn", "matplotlib.pyplot", "rich.table", "fastgate.cli",
     "fastgate.training.controls", "fastgate.training.pipeline", "tests.training.runs"]
)  # fmt: skip


class Command:
    """`fastgate ARGUMENTS` in a process of its own, with the methods of :class:`subprocess.Popen` that tests use."""

    def __init__(self, arguments: Sequence[str], code: str) -> None:
        self.args = ["fastgate", *arguments]
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [str(Path(self._folder.name) / name) for name in ("out", "err")]
        environment = {**os.environ, "COLUMNS": ENVIRONMENT["COLUMNS"]}
        where = (self._streams, os.getcwd(), environment)
        self._process = _FORKS.Process(target=_run_command, args=(self.args, code, *where), daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for its end; what it wrote to its standard output and error streams."""
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        out, err = (Path(stream).read_text() for stream in self._streams)
        return out, err


def _run_command(arguments: list[str], code: str, streams: list[str], folder: str, environment: dict[str, str]) -> None:
    os.setsid()
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may have workers
    for number, stream in enumerate(streams, 1):
        file = os.open(stream, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    exec(code, {})
    sys.argv = arguments
    from fastgate.cli import main

    main()


def start_cli(*arguments: str | Path, code: str = "") -> Command:
    """Start `fastgate ARGUMENTS` in a new process, after running `code` in it."""
    return Command([str(argument) for argument in arguments], code)


def run_cli(*arguments: str | Path, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run `fastgate ARGUMENTS` to its end."""
    process = start_cli(*arguments, code=code)
    out, err = process.communicate()
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_parallel(processes: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a module, or a file of code, with its arguments in processes of torchrun, until all have ended."""
    process = start_parallel(processes, *arguments)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_parallel(processes: int, *arguments: str | Path) -> subprocess.Popen[str]:
    """Start torchrun with `arguments` (`-m MODULE ...` or `FILE ...`)."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*torchrun, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip


def send_when_written(process: subprocess.Popen[str] | Command, file: Path, number: signal.Signals) -> None:
    """Send a signal as soon as the process has written the file."""
    deadline = time.monotonic() + 120
    while not file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{file} was not written: {process.communicate()}")
        time.sleep(0.01)
    process.send_signal(number)


def checkpoint_state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's checkpoint that decides how it goes on: weights, buffers, momentum, random state."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    tensors = {f"model.{name}": tensor for name, tensor in state["model"].items()}
    for index, entry in state["optimizer"]["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in entry.items() if value is not None}
    return tensors | {
        "rng": state["random"]["cpu"],
        "epoch": torch.tensor(state["epoch"]),
        "step": torch.tensor(state["step"]),
    }


def differences(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names that are not in both, or whose tensors are not bit-equal."""
    common = first.keys() & second.keys()
    return sorted(first.keys() ^ second.keys()) + sorted(n for n in common if not torch.equal(first[n], second[n]))
