"""Work to compare in one or several processes: `python -m tests.training.parallel_work OUT [RUNS]`, or by torchrun.

In fp64: training multiplies a rounding error every few steps by ten, and in fp32 it meets the kink of some ReLU within
the first epoch. With RUNS, resumes copies of the stopped runs in that folder, begun by any number of processes.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastgate as fg
from fastgate import processes
from fastgate.energy import Energy
from fastgate.ops.synchronization import synchronized
from fastgate.training import distributed
from fastgate.training.data import load_dataset
from fastgate.training.recipe import change
from fastgate.training.spending import Spending
from fastgate.training.trainer import Interrupted
from tests.training.runs import TINY, trainer_of

# five steps per epoch, small ones: the larger they are, the faster rounding errors grow
_SMALL = change(TINY, widths="4,8,16", validation=797, learning_rate=0.02)
_LIVE = change(_SMALL, epochs=1, open_until=0, anneal_until=0, settle_at=None)
# the last two decide with numbers that have to be those of all samples: their noise, and their mean
RECIPES = {
    "layer": _SMALL,
    "channel": change(_SMALL, gating="channel"),
    "gumbel": change(_LIVE, estimator="gumbel"),
    "mean_threshold": change(_LIVE, estimator="mean_threshold"),
}
# batch norms of every process' own samples
UNSYNCHRONISED = "unsynchronised"
_ALL = {**RECIPES, UNSYNCHRONISED: change(_LIVE, sync_batch_norms=False)}
# epoch and step (from 0) at which the last process alone is interrupted: some steps after the settle epoch's commit
STOP = (3, 2)


def train(name: str, folder: Path, *, stop: bool = False, resume: bool = False) -> None:
    """Train; keep the gradients of every epoch's first step and the final state."""
    recipe = _ALL[name]
    trainer = trainer_of(recipe, load_dataset("digits", validation=recipe.data.validation), folder, resume=resume)
    folder.mkdir(parents=True, exist_ok=True)
    gradients: dict[str, Tensor] = {}

    def watch(*arguments: Any) -> None:
        if trainer.step == 0:
            for key, parameter in trainer.model.named_parameters():
                if parameter.grad is not None:
                    gradients[f"epoch {trainer.epoch} {key}"] = parameter.grad.clone()
        if stop and (trainer.epoch, trainer.step) == STOP and processes.rank() == processes.count() - 1:
            os.kill(os.getpid(), signal.SIGINT)

    trainer.optimizer.register_step_pre_hook(watch)
    try:
        trainer.fit()
    except Interrupted:
        return
    states = processes.gather(trainer.model.state_dict())
    agree = all(torch.equal(state[key], value) for state in states for key, value in states[0].items())
    if processes.is_main():
        torch.save({"gradients": gradients, "state": states[0], "agree": agree}, folder / "record.pt")


def batch_norms(path: Path) -> None:
    """Outputs and gradients of batch norms over 8 samples, shared among the processes."""
    found: dict[str, list[Tensor]] = {}
    part = slice(processes.rank() * 8 // processes.count(), (processes.rank() + 1) * 8 // processes.count())
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for shape in ((8, 5), (8, 5, 3, 4)):
            for affine in (True, False):
                generator = torch.Generator().manual_seed(0)
                x, grad = (torch.randn(shape, generator=generator).to(dtype) + i for i in (3, 0))
                x = x[part].clone().requires_grad_()
                wide = torch.promote_types(dtype, torch.float32)
                running = [torch.zeros(5, dtype=wide), torch.ones(5, dtype=wide)]
                weights = [torch.linspace(-1, 2, 5).to(wide).requires_grad_() for _ in range(2 * affine)]
                with synchronized():
                    y = F.batch_norm(x, *running, *weights, training=True)
                    y.backward(grad[part])
                rows = [torch.cat(processes.gather(rows)) for rows in (y.detach(), x.grad)]
                sums = [processes.all_sum(weight.grad) for weight in weights]
                found[f"{dtype} {len(shape)} {affine}"] = [*rows, *sums, *running]
    if processes.is_main():
        torch.save(found, path)


def converted_head() -> list[Tensor]:
    """Logits, gradients and statistics of a converted gate head; one process has one of three samples."""
    gate = fg.LayerGate(4, init_logit=None)
    if processes.count() > 1:
        gate = nn.SyncBatchNorm.convert_sync_batchnorm(gate)
    x = torch.linspace(-2, 3, 3 * 4 * 4).sin().reshape(3, 4, 2, 2)
    own = [slice(0, 3)] if processes.count() == 1 else [slice(0, 1), slice(1, 3)]
    x = x[own[processes.rank()]].clone().requires_grad_()
    gate(x)
    gate.logits.square().sum().backward()
    rows = [torch.cat(processes.gather(rows)) for rows in (gate.logits.detach(), x.grad)]
    gradients = [processes.all_sum(parameter.grad) for parameter in gate.parameters()]
    return [*rows, *gradients, gate.bn.running_mean, gate.bn.running_var]


def frozen_by_the_main_process() -> bool:
    """Whether DistributedDataParallel's broadcast of buffers makes all processes compute the same network."""
    gate = fg.ChannelGate(4, init_logit=1.0)
    network = DistributedDataParallel(gate) if processes.count() > 1 else gate
    if processes.is_main():
        gate.freeze(torch.tensor([True, False, True, False]))
    network(torch.ones(2, 4, 2, 2))
    return processes.gather(gate.decisions.tolist()) == [[[1, 0, 1, 0]] * 2] * processes.count()


def refusal() -> str:
    """The error of a head whose kernel is requested."""
    gate = fg.LayerGate(4, impl="triton")
    try:
        with synchronized():
            gate(torch.randn(4, 4, 2, 2))
    except ValueError as error:
        return str(error)
    return "nothing"


def joules() -> float | None:
    """What a run has used in a window in which each process meters a GPU of its own, and in one with the processor."""
    spending = Spending()
    for device, used in ((f"GPU-{processes.rank()}", 3), ("cpu:package-0", 4)):
        spending.add(Energy("train", 1.0, None, {device: used}, {device: "rapl"}, used * 1_000_000, 0.1, ()))
    return spending.joules


def main() -> None:
    out = Path(sys.argv[1])
    with distributed.joined():
        batch_norms(out / "batch_norms.pt")
        facts = {
            "processes": processes.count(),
            "refusal": refusal(),
            "joules": joules(),
            "frozen": frozen_by_the_main_process(),
        }
        if processes.is_main():
            (out / "facts.json").write_text(json.dumps(facts))
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
        torch.manual_seed(0)
        torch.save(converted_head(), out / f"head-{processes.rank()}.pt")
        if len(sys.argv) > 2:
            for name in ("layer", "channel"):
                if processes.is_main():
                    shutil.copytree(Path(sys.argv[2]) / f"{name}-stopped", out / f"{name}-resumed")
                processes.wait()
                train(name, out / f"{name}-resumed", resume=True)
            return
        for name in _ALL:
            train(name, out / name)
        for name in ("layer", "channel"):
            train(name, out / f"{name}-stopped", stop=True)


if __name__ == "__main__":
    main()
