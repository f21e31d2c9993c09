"""The callbacks inside the real Lightning and Hugging Face trainers, on the stand-in for NVML."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastgate.energy.timeline import Timeline
from tests.energy.fake import T4, T4_TOO, Fake

STEPS, BATCHES = 4, 2  # training steps of an epoch, batches of an evaluation
TRAIN, EVALUATE = 3.0, 5.0  # seconds each, at 50 W


class Data(torch.utils.data.Dataset):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((3,), float(index)), "labels": torch.tensor(1.0)}


class Net(nn.Module):
    """A network whose forward pass takes virtual time."""

    def __init__(self, fake: Fake) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 1)
        self.fake = fake

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.fake.run(TRAIN if self.training else EVALUATE)
        scores = self.fc(x)
        return {"loss": (scores[:, 0] - labels).square().mean(), "logits": scores}


@pytest.fixture
def board(fake: Fake) -> Fake:
    fake.board(watts=50)
    return fake


TRAINED, EVALUATED = 50 * TRAIN * STEPS, 50 * EVALUATE * BATCHES


def run_lightning(fake: Fake, folder: Path, callback: Any, *, fail: bool = False, **options: Any) -> Any:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(fake)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            if fail and index == 1:
                raise RuntimeError("mine")
            return self.net(**batch)["loss"]

        def validation_step(self, batch: Any, index: int) -> None:
            self.net(**batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 1e-3)

    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[callback],
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    loaders = [torch.utils.data.DataLoader(Data(size), batch_size=2) for size in (2 * STEPS, 2 * BATCHES)]
    trainer.fit(Module(), *loaders)
    return trainer


@pytest.mark.parametrize("validations", [1, 2])
def test_lightning(board: Fake, tmp_path: Path, validations: int) -> None:
    from fastgate.integrations.lightning import EnergyCallback

    callback = EnergyCallback(board.meter())
    # the sanity check before training belongs to no epoch
    trainer = run_lightning(board, tmp_path, callback, val_check_interval=1 / validations, num_sanity_val_steps=1)
    assert [entry["epoch"] for entry in callback.history] == [0, 1]
    for entry in callback.history:
        assert (entry["train"]["joules"], entry["train"]["seconds"]) == (TRAINED, TRAIN * STEPS)
        assert entry["validation"]["joules"] == EVALUATED * validations
        assert entry["train"]["source"] == "nvml-counter"
    trainer.logger.save()
    logged = (Path(trainer.logger.log_dir) / "metrics.csv").read_text()
    assert "energy/train_joules" in logged and str(TRAINED) in logged and str(EVALUATED * validations) in logged


def test_lightning_makes_and_closes_a_meter_of_its_own(board: Fake, tmp_path: Path) -> None:
    from fastgate.integrations.lightning import EnergyCallback

    callback = EnergyCallback()
    trainer = run_lightning(board, tmp_path, callback)
    assert [entry["train"]["joules"] for entry in callback.history] == [None, None]  # a CPU without RAPL
    assert "no RAPL packages" in callback.history[0]["train"]["warnings"][0]
    trainer.logger.save()
    assert not [path for path in tmp_path.rglob("metrics.csv") if "energy" in path.read_text()]
    assert board.references() == 0


def test_lightning_with_one_of_two_boards_standing_still(fake: Fake, tmp_path: Path) -> None:
    from fastgate.integrations.lightning import EnergyCallback

    fake.board(T4, 30)
    fake.board(T4_TOO, 70)
    callback = EnergyCallback(fake.meter())
    fake.set_stalled(1, 1)
    run_lightning(fake, tmp_path, callback)
    assert [entry[phase]["joules"] for entry in callback.history for phase in ("train", "validation")] == [None] * 4
    assert any("it has stalled" in warning for warning in callback.history[0]["train"]["warnings"])


def test_lightning_after_an_exception(board: Fake, tmp_path: Path) -> None:
    from fastgate.integrations.lightning import EnergyCallback

    callback = EnergyCallback(board.meter())
    with pytest.raises(RuntimeError, match="mine"):
        run_lightning(board, tmp_path, callback, fail=True)
    assert callback.history == []
    run_lightning(board, tmp_path, callback)
    assert [entry["train"]["joules"] for entry in callback.history] == [TRAINED] * 2


def run_transformers(fake: Fake, folder: Path, callback: Any, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **options,
    )
    data = {"train_dataset": Data(2 * STEPS), "eval_dataset": Data(2 * BATCHES)}
    trainer = Trainer(model=Net(fake), args=arguments, callbacks=[callback], **data)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        ({"eval_strategy": "epoch"}, ["train", "eval"]),
        ({"eval_strategy": "steps", "eval_steps": 2}, ["eval", "train", "eval"]),
        ({"eval_strategy": "no"}, ["train"]),
    ],
)
def test_transformers(board: Fake, tmp_path: Path, options: dict[str, Any], phases: list[str]) -> None:
    from fastgate.integrations.transformers import EnergyCallback

    callback = EnergyCallback(board.meter())
    trainer = run_transformers(board, tmp_path, callback, **options)
    history = [(entry["phase"], entry["joules"]) for entry in callback.history]
    assert sorted(history) == sorted((phase, {"train": TRAINED, "eval": EVALUATED}[phase]) for phase in phases * 2)
    logged = [entry["energy_train_joules"] for entry in trainer.state.log_history if "energy_train_joules" in entry]
    assert logged == [TRAINED] * 2


def test_transformers_with_one_of_two_boards_standing_still(fake: Fake, tmp_path: Path) -> None:
    from fastgate.integrations.transformers import EnergyCallback

    fake.board(T4, 30)
    fake.board(T4_TOO, 70)
    callback = EnergyCallback(fake.meter())
    fake.set_stalled(1, 1)
    run_transformers(fake, tmp_path, callback, eval_strategy="epoch")
    assert [entry["joules"] for entry in callback.history] == [None] * 4


def test_one_process_of_several_says_so(board: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = Timeline(board.meter())
    board.run(10)
    timeline.end_phase("train")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    found = timeline.collect("train")
    assert found["joules"] == 500.0
    assert found["warnings"] == ["metered by one process of 4: energy of its own devices only"]


def test_transformers_makes_and_closes_a_meter_of_its_own(board: Fake, tmp_path: Path) -> None:
    from fastgate.integrations.transformers import EnergyCallback

    callback = EnergyCallback()
    run_transformers(board, tmp_path, callback)
    assert [entry["joules"] for entry in callback.history] == [None, None]
    assert "no RAPL packages" in callback.history[0]["warnings"][0]
    assert board.references() == 0
