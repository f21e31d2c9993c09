"""A search in loops of several processes: `python -m tests.integrations.loops KIND-GATING OUT`, or by torchrun."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fastgate as fg
from fastgate import processes
from tests.votes import cast_votes

SIZE, EPOCHS = (3, 8, 8), 7
CONFIG = fg.SearchConfig(open_until=0.15, anneal_until=0.4, settle_at=0.8, commit_after=1)


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (64,), generator=generator)
    return TensorDataset(torch.randn(64, *SIZE, generator=generator) + labels[:, None, None, None] / 2, labels)


def make_model(gating: str) -> nn.Module:
    torch.manual_seed(0)
    return fg.models.resnet(8, 4, gating=gating)


def record(search: fg.GateSearch, small: nn.Module, stale: list[str]) -> dict[str, Any]:
    """What the processes ended with, and whether it is the same."""
    states = processes.gather(small.state_dict())
    finals = processes.gather({name: opened.tolist() for name, opened in search.final.items()})
    same = all(state.keys() == states[0].keys() for state in states)
    same = same and all(torch.equal(state[key], value) for state in states for key, value in states[0].items())
    return {
        "processes": len(states),
        "same": same and all(final == finals[0] for final in finals),
        "macs": fg.macs(small, SIZE) / search.macs,
        "stale": stale,
    }


def own_loop(gating: str) -> dict[str, Any]:
    """`DistributedDataParallel`, wrapped again after each commit; what the old wrapper says then is kept."""
    dist.init_process_group("gloo")
    data, model = make_data(), make_model(gating)
    optimizer = torch.optim.SGD(fg.parameter_groups(model), lr=0.05, momentum=0.9)
    sampler = DistributedSampler(data, shuffle=True)
    loader = DataLoader(data, 8, sampler=sampler)
    search = fg.GateSearch(model, SIZE, optimizer, epochs=EPOCHS, config=CONFIG)
    network, stale = DistributedDataParallel(model), []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        if search.begin_epoch(epoch, loader):
            try:
                network(data[:2][0])
            except RuntimeError as error:
                stale.append(str(error))
            network = DistributedDataParallel(model)
        network.train()
        for i, (x, y) in enumerate(loader):
            loss = F.cross_entropy(network(x), y) + search.loss(i / len(loader))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found = record(search, search.compact(), stale)
    dist.destroy_process_group()
    return found


def accelerated(gating: str) -> dict[str, Any]:
    """accelerate's loop, with its optimizer, loader and wrapper."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    data, model = make_data(), make_model(gating)
    optimizer = torch.optim.SGD(fg.parameter_groups(model), lr=0.05, momentum=0.9)
    network, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, 8, shuffle=True))
    search = fg.GateSearch(network, SIZE, optimizer, epochs=EPOCHS, config=CONFIG)
    for epoch in range(EPOCHS):
        if search.begin_epoch(epoch, loader):
            network = accelerator.prepare(search.model)
        network.train()
        for i, (x, y) in enumerate(loader):
            loss = F.cross_entropy(network(x), y) + search.loss(i / len(loader))
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    found = record(search, search.compact(), [])
    accelerator.end_training()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    cast_votes()
    kind, gating = sys.argv[1].split("-")
    found = {"own": own_loop, "accelerate": accelerated}[kind](gating)
    Path(sys.argv[2]).write_text(json.dumps(found))
