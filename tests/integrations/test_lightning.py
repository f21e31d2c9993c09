"""The search inside Lightning's real trainer: nothing of the user's module changes."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchvision
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastgate as fg
from fastgate.integrations.lightning import GateSearchCallback
from tests.integrations.loops import make_data
from tests.votes import cast_votes

SIZE, EPOCHS = (3, 8, 8), 6
CONFIG = fg.SearchConfig(target=0.6, open_until=1 / 6, anneal_until=0.3, settle_at=0.8, commit_after=2)
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


class Module(pl.LightningModule):
    """As a user writes it: a network of torchvision, without a forward of its own."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.hparams["lr"], momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


class SeedEpochs(pl.Callback):
    """The order of an epoch's samples hangs on the epoch alone: Lightning restores no random numbers."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.manual_seed(trainer.current_epoch)


def loader() -> DataLoader[Any]:
    return DataLoader(make_data(), 16)


def fit(
    folder: Path, gating: str = "channel", checkpoint: Path | None = None, module: Module | None = None, **options: Any
) -> tuple[Module, GateSearchCallback]:
    torch.manual_seed(0)
    module = module or Module()
    callback = GateSearchCallback(CONFIG, gating)
    saver = pl.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        callbacks=[callback, saver, SeedEpochs()],
        default_root_dir=folder,
        **{**QUIET, **options},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers
        trainer.fit(module, loader(), ckpt_path=checkpoint)
    return module, callback


@pytest.fixture(scope="module", params=["channel", pytest.param("layer", marks=pytest.mark.slow)])
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, Module, Any]]:
    folder = tmp_path_factory.mktemp("lightning")
    with pytest.MonkeyPatch.context() as patch:
        cast_votes(patch.setattr)
        yield folder, request.param, *fit(folder, request.param)


def test_fit_prunes_to_the_target(run: tuple[Path, str, Module, GateSearchCallback]) -> None:
    folder, gating, module, callback = run
    search = callback.search
    assert search is not None and search.phase == "settled" and list(fg.named_gates(module)) == []
    share = fg.macs(module.net, SIZE) / search.macs
    assert share == pytest.approx(0.6, abs=0.15 if gating == "layer" else 0.006)
    small = fg.load(folder / "small.safetensors")
    assert isinstance(small, torchvision.models.ResNet)
    assert fg.compare(module.net, small, torch.randn(2, *SIZE)) == 0.0
    assert not {"training_step", "configure_optimizers", "on_load_checkpoint"} & vars(module).keys()
    assert callback.small is not None and callback.small is not module


def test_runs_that_go_on_end_with_the_same_bits(run: tuple[Path, str, Module, GateSearchCallback]) -> None:
    """From before the first commit, after it, and after all."""
    folder, gating, module, _ = run
    wanted = module.state_dict()
    gates = {epoch: torch.load(folder / f"epoch={epoch}.ckpt", weights_only=False) for epoch in (1, 4, 5)}
    shapes = [len([name for name in state["state_dict"] if "gate.fc1.weight" in name]) for state in gates.values()]
    assert shapes[0] == 4 and shapes[-1] == 0
    for epoch in (1, 4):
        again, _ = fit(folder / "again", gating, folder / f"epoch={epoch}.ckpt")
        ours = again.state_dict()
        assert ours.keys() == wanted.keys() and all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_load_from_checkpoint(run: tuple[Path, str, Module, GateSearchCallback]) -> None:
    folder, _, module, _ = run
    last = Module.load_from_checkpoint(folder / "epoch=5.ckpt")
    assert fg.compare(last.net, module.net, torch.randn(2, *SIZE)) == 0.0
    early = Module.load_from_checkpoint(folder / "epoch=1.ckpt", lr=0.1)
    assert len(list(fg.named_gates(early))) == 4 and early.hparams["lr"] == 0.1
    assert "on_load_checkpoint" not in vars(Module)


def test_the_gate_losses_reach_the_backward_pass(tmp_path: Path) -> None:
    """Scaled, accumulated and in bf16: what the heads get is what they get of a loop of one's own."""
    pulls = {}
    for name, options in {
        "plain": {},
        "accumulated": {"accumulate_grad_batches": 4},
        "bf16": {"precision": "bf16-mixed"},
        # a loss scaler's usual 65536 times this budget overflows in half precision: it would skip the step
        "fp16": {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16))},
    }.items():
        torch.manual_seed(0)
        module = Module(lr=1e-9)
        config = fg.SearchConfig(
            target=0.6, open_until=0, anneal_until=0, settle_at=None, commit_after=None, budget=1e4, capacity=0
        )
        callback = GateSearchCallback(config)
        grads: list[Tensor] = []

        class Watch(pl.Callback):
            def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
                gates = [gate for _, gate in fg.named_gates(pl_module)]
                grads.append(torch.stack([gate.fc2.bias.grad.flatten()[0].clone() for gate in gates]))  # noqa: B023

        trainer = pl.Trainer(
            max_steps=1, max_epochs=1, callbacks=[callback, Watch()], default_root_dir=tmp_path, **QUIET, **options
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, loader())
        pulls[name] = grads[0]
    # the budget is all that pulls, and at the start all gates are open in every batch: 4 batches pull as one does
    assert all(bool((pull > 1).all()) for pull in pulls.values())
    for name in ("accumulated", "bf16", "fp16"):
        torch.testing.assert_close(pulls[name], pulls["plain"], rtol=0.05, atol=0.0)


def test_what_is_refused(tmp_path: Path) -> None:
    class Two(Module):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([p], 0.1) for p in (self.net.fc.weight, self.net.fc.bias)]

        def training_step(self, batch: Any, index: int) -> Any:
            raise NotImplementedError

        @property
        def automatic_optimization(self) -> bool:
            return False

    with pytest.raises(ValueError, match="optimizers: expected one that the search can prune, got 2"):
        fit(tmp_path, module=Two())
    with pytest.raises(ValueError, match="max_epochs: expected a number of epochs"):
        pl.Trainer(max_epochs=-1, callbacks=[GateSearchCallback()], default_root_dir=tmp_path, **QUIET).fit(
            Module(), loader()
        )


@pytest.mark.parametrize("epochs", [1, 3])
def test_training_that_ends_early(epochs: int, tmp_path: Path) -> None:
    """In the first epoch gates are held open; in the third they are live: then they are decided."""

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch + 1 == epochs

    callback = GateSearchCallback(CONFIG, "channel")
    trainer = pl.Trainer(
        max_epochs=EPOCHS, min_epochs=1, callbacks=[callback, Stop()], default_root_dir=tmp_path, **QUIET
    )
    why = "held open: there is no compact network" if epochs == 1 else "the remaining gates are decided now"
    with pytest.warns(UserWarning, match=rf"training ended in epoch {epochs} of {EPOCHS}, .*{why}"):
        trainer.fit(Module(), loader())
    assert (tmp_path / "small.safetensors").exists() == (callback.small is not None) == (epochs == 3)
    if epochs == 3:
        assert callback.search is not None
        assert fg.macs(fg.load(tmp_path / "small.safetensors"), SIZE) == pytest.approx(
            0.6 * callback.search.macs, rel=0.01
        )


def test_metrics_are_logged(tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(tmp_path)
    fit(tmp_path, "layer", logger=logger)
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "gates/open_ratio" in text and "gates/macs" in text and json.dumps(1.0) in text
