"""The processes of a run under torchrun: how they join and end, and which device each of them uses.

How they communicate is in :mod:`fastgate.processes`.
"""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastgate.gates import named_gates
from fastgate.processes import count, wait

_HOW_TO_RESUME = "its last checkpoint is intact: resume with --output RUN --resume, on any number of processes"


class ProcessLost(RuntimeError):
    """Another process of the run has ended: this one cannot continue."""


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes that torchrun started; a single process has none to join.

    When processes fail, only the first one raises its exception from here: the others fail because it did, and end
    silently.

    Raises:
        ProcessLost: another process has ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield
        return
    store, own_rank, size = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("run", store), rank=own_rank, world_size=size)
    atexit.register(
        dist.destroy_process_group
    )  # after the report of an error, as it may wait for processes that are gone

    def reports_first() -> bool:
        return bool(store.add("first report", 1) == 1)

    _obey_sigterm(reports_first)
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        lost = isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))
        if not reports_first():
            os._exit(1)
        if lost:
            raise ProcessLost(f"another process of this run has ended; {_HOW_TO_RESUME}") from error
        raise


def _obey_sigterm(reports_first: Callable[[], bool]) -> None:
    """End at once when torchrun asks for it, as it does when another process has ended.

    A signal handler would wait for the main thread, and that may wait for the process that is gone: hence a thread.
    """
    end, begin = os.pipe()
    os.set_blocking(begin, False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.set_wakeup_fd(begin)

    def watch() -> None:
        while os.read(end, 1)[0] != signal.SIGTERM:
            pass
        if reports_first():
            why = "told to end (SIGTERM), as torchrun does when another process has ended"
            print(f"error: {why}; {_HOW_TO_RESUME}", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="fastgate-sigterm", daemon=True).start()


def own_device(device: str) -> str:
    """The device of this process in a run on `device`: each of several processes has its own GPU of its node.

    Raises:
        ValueError: several processes are given one GPU by number, or outnumber the GPUs.
    """
    if count() == 1 or device == "cpu":
        return device
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device != "cuda":
        raise ValueError(f"device: expected auto, cpu or cuda with {count()} processes, got {device!r}")
    if local >= gpus:
        raise ValueError(f"--nproc-per-node: expected at most {gpus} (the GPUs here), got more; or use --device cpu")
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def resolve_device(device: str) -> str:
    """The device to use: "auto" is CUDA where there is one; an explicit one that is missing is an error."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu or cuda[:index], got {device!r}") from error
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda[:index], got {device!r}")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: {device!r} does not exist ({torch.cuda.device_count()} CUDA devices found); use --device cpu"
        )
    return own_device(device)


@contextmanager
def first_of_node() -> Iterator[None]:
    """Let one process of each node through the block first, then the others, which find what it downloaded."""
    first = count() == 1 or os.environ["LOCAL_RANK"] == "0"
    if not first:
        wait()
    yield
    if first:
        wait()


def parallel(model: nn.Module) -> nn.Module:
    """The network to call in training: its backward pass averages gradients over the processes.

    Call this again after parameters have left the network, or gates have been frozen or released: heads of frozen
    gates get no gradient, which the processes have to know beforehand.
    """
    if count() == 1:
        return model
    for _, gate in named_gates(model):
        gate.requires_grad_(not gate.frozen)
    network = DistributedDataParallel(model)
    # running statistics are equal everywhere, or made so at the end of an epoch; the option is being renamed
    network.broadcast_buffers = False
    return network
