"""The search inside Hugging Face's real Trainer: nothing of the user's code changes."""

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import fastgate as fg
from fastgate.integrations.transformers import GateSearchCallback
from tests.integrations.loops import make_data
from tests.votes import cast_votes

SIZE, EPOCHS = (3, 8, 8), 6
CONFIG = fg.SearchConfig(target=0.6, open_until=1 / 6, anneal_until=0.3, settle_at=0.8, commit_after=2)


class Net(nn.Module):
    """A network of torchvision that is called as the Trainer calls models."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(pixel_values)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def train(
    folder: Path, gating: str, resume: Path | None = None, model: nn.Module | None = None, **options: Any
) -> tuple[nn.Module, GateSearchCallback, Trainer]:
    torch.manual_seed(0)
    images, labels = make_data().tensors
    data = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, labels, strict=True)]
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=16,
        save_strategy="epoch",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-3,
        seed=1,
        **options,
    )
    model, callback = model or Net(), GateSearchCallback(CONFIG, gating)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model, callback, trainer


@pytest.fixture(scope="module", params=["channel", pytest.param("layer", marks=pytest.mark.slow)])
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, Any, Any, Any]]:
    folder = tmp_path_factory.mktemp("transformers")
    with pytest.MonkeyPatch.context() as patch:
        cast_votes(patch.setattr)
        yield folder, request.param, *train(folder, request.param)


def test_train_prunes_to_the_target(run: tuple[Path, str, Net, GateSearchCallback, Trainer]) -> None:
    folder, gating, model, callback, trainer = run
    search = callback.search
    assert search is not None and search.phase == "settled" and list(fg.named_gates(model)) == []
    share = fg.macs(model.net, SIZE) / search.macs
    assert share == pytest.approx(0.6, abs=0.15 if gating == "layer" else 0.006)
    assert fg.compare(model.net, fg.load(folder / "small.safetensors"), torch.randn(2, *SIZE)) == 0.0
    assert all("gate" not in name for name in model.state_dict())  # nothing of the callback is left
    logged = [line["gates_open_ratio"] for line in trainer.state.log_history if "gates_open_ratio" in line]
    assert len(logged) == EPOCHS and logged[0] == 1.0 > logged[-1]


def test_runs_that_go_on_end_with_the_same_bits(run: tuple[Path, str, Net, GateSearchCallback, Trainer]) -> None:
    """From the end of the second epoch, before the first commit, and of the fifth, after it; the Trainer restores
    random numbers itself."""
    folder, gating, model, _, _ = run
    wanted = model.state_dict()
    for epoch in (2, 5):
        again, _, _ = train(folder / "again", gating, folder / f"checkpoint-{4 * epoch}")
        ours = again.state_dict()
        assert ours.keys() == wanted.keys() and all(torch.equal(ours[name], wanted[name]) for name in wanted)


@pytest.mark.filterwarnings("ignore:.*expected a network that a file can fully describe")
def test_a_model_of_transformers(tmp_path: Path) -> None:
    """Its blocks nest their branch; its loss comes in a ModelOutput."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "num_labels": 4}
    model = ResNetForImageClassification(ResNetConfig(layer_type="basic", **sizes))
    _, callback, _ = train(tmp_path, "channel", model=model)
    search, small = callback.search, callback.small
    assert search is not None and small is not None and search.phase == "settled"
    assert search.macs_training == pytest.approx(0.6 * search.macs, rel=0.01)
    x = torch.randn(2, 3, 16, 16)
    assert fg.compare(model, small, x, forward=lambda network, images: network(images).logits) == 0.0
    assert list(fg.named_gates(small)) == []


def test_a_copy_of_the_model_leaves_the_run_behind(tmp_path: Path) -> None:
    """Commits copy the network: not the callback, which knows optimizer, loader and data."""
    model, callback = Net(), GateSearchCallback(CONFIG)
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    Trainer(model, arguments, train_dataset=[], callbacks=[callback])
    (hook,) = copy.deepcopy(model)._forward_hooks.values()
    assert hook.__self__ is callback


class NoLoss(Net):
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.net(pixel_values)}


class OwnLoss(Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, *arguments: Any, **options: Any) -> Tensor:
        labels = inputs.pop("labels")
        return nn.functional.cross_entropy(model(**inputs)["logits"], labels)


def test_gates_that_would_not_learn_are_refused(tmp_path: Path) -> None:
    model = Net()
    model.config = SimpleNamespace(problem_type=None)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"label_smoothing_factor: expected 0, got 0\.1"):
        train(tmp_path, "layer", model=model, label_smoothing_factor=0.1)
    images, labels = make_data().tensors
    data = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, labels, strict=True)]
    arguments = TrainingArguments(str(tmp_path), num_train_epochs=1, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = OwnLoss(NoLoss(), arguments, train_dataset=data, callbacks=[GateSearchCallback()])
    with pytest.raises(ValueError, match="expected a model that returns its loss in"):
        trainer.train()


class Accepts(Net):
    """Its loss counts the items of all accumulated steps, as those of language models do."""

    def forward(  # type: ignore[override]
        self, pixel_values: Tensor, labels: Tensor | None = None, num_items_in_batch: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        logits = self.net(pixel_values)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum") / (num_items_in_batch or len(logits))
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("kind", [Net, Accepts])
def test_the_gate_losses_are_accumulated_once(kind: type[nn.Module], tmp_path: Path) -> None:
    """At the start all gates are open in every batch: four accumulated batches pull as one does."""
    config = fg.SearchConfig(
        target=0.6, open_until=0, anneal_until=0, settle_at=None, commit_after=None, budget=1e4, capacity=0
    )
    images, labels = make_data().tensors
    data = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, labels, strict=True)]
    pulls = []
    for accumulated in (1, 4):
        torch.manual_seed(0)
        grads: list[Tensor] = []

        class Watched(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                gates = [gate for _, gate in fg.named_gates(model)]  # noqa: B023
                grads.append(torch.stack([gate.fc2.bias.grad.flatten()[0].clone() for gate in gates]))  # noqa: B023

        model, callback = kind(), GateSearchCallback(config)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=16, gradient_accumulation_steps=accumulated,
            report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", max_grad_norm=0.0,
        )  # fmt: skip
        fg.attach(model, "layer")
        optimizer = Watched(model.parameters(), 1e-9)
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback], optimizers=(optimizer, None))
        trainer.train()
        pulls.append(grads[0])
    assert bool((pulls[0] > 1).all())
    torch.testing.assert_close(pulls[1], pulls[0], rtol=0.05, atol=0.0)
