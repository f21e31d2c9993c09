"""A search in loops of several processes: `python -m tests.integrations.loops KIND-GATING OUT`, or by torchrun."""

import json
import os
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
    return fg.models.resnet(8, 4, gating=None if gating == "none" else gating)


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


def with_lightning(gating: str) -> dict[str, Any]:
    """Lightning's own wrapper, which the callback makes anew in its place."""
    import lightning.pytorch as pl

    from fastgate.integrations.lightning import GateSearchCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model("none")

        def training_step(self, batch: Any, index: int) -> Any:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    callback = GateSearchCallback(CONFIG, gating, folder=Path(sys.argv[2]).parent)
    trainer = pl.Trainer(
        max_epochs=EPOCHS, callbacks=[callback], accelerator="cpu", devices=processes_wanted(), strategy="ddp",
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(make_data(), 8, shuffle=True))
    assert callback.search is not None and callback.small is not None
    return record(callback.search, callback.small.net, [])


def with_transformers(gating: str) -> dict[str, Any]:
    """Hugging Face's own wrapper, likewise."""
    from transformers import Trainer, TrainingArguments

    from fastgate.integrations.transformers import GateSearchCallback

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model("none")

        def forward(self, pixel_values: Any, labels: Any) -> dict[str, Any]:
            logits = self.net(pixel_values)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    images, labels = make_data().tensors
    data = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, labels, strict=True)]
    arguments = TrainingArguments(
        str(Path(sys.argv[2]).parent), num_train_epochs=EPOCHS, per_device_train_batch_size=8, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", learning_rate=1e-3,
    )  # fmt: skip
    callback = GateSearchCallback(CONFIG, gating)
    Trainer(Net(), arguments, train_dataset=data, callbacks=[callback]).train()
    assert callback.search is not None and callback.small is not None
    return record(callback.search, callback.small.net, [])


def processes_wanted() -> int:
    """What torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


KINDS = {"own": own_loop, "accelerate": accelerated, "lightning": with_lightning, "transformers": with_transformers}

if __name__ == "__main__":
    torch.set_num_threads(1)
    cast_votes()
    kind, gating = sys.argv[1].split("-")
    found = KINDS[kind](gating)
    if os.environ.get("RANK", "0") == "0":
        Path(sys.argv[2]).write_text(json.dumps(found))
