"""Does accuracy drop when gates are released? `python -m bench.release --dataset digits --seeds 1 2 3 --output FILE`.

Each run is made without and with `GateSearch.refresh`: accuracy on the test images after every epoch, and the worst
ratio of an epoch's accuracy to the one before, from the epoch of release to that of the last decisions. The run without
it also shows the cause of a drop: accuracy at the end of the epoch of release with the running statistics of the
network's batch norms, of the gate heads', or of both re-estimated. Runs are added to the file.

Digits: the demo. CIFAR-10: the demo's recipe for 20 epochs on a part of the images, averaged down to 16x16, up to the
epoch of the last decisions.
"""

import argparse
import copy
import json
import tempfile
from contextlib import suppress
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgate.env import describe_environment
from fastgate.files import write_atomically
from fastgate.gates import named_gates
from fastgate.pruning.statistics import refresh_statistics
from fastgate.training.callbacks import Callback
from fastgate.training.data import Dataset, load_dataset
from fastgate.training.networks import evaluate
from fastgate.training.pipeline import Run, make_trainer
from fastgate.training.presets import get_preset
from fastgate.training.recipe import Recipe, change
from fastgate.training.trainer import Trainer

TEST_IMAGES = 2000  # of CIFAR-10
REFRESH_BATCHES = 10


class SearchIsOver(Exception):
    """Every decision is final; the rest of the run is not measured."""


def load(dataset: str, data_root: str | None, images: int) -> tuple[Dataset, Recipe]:
    """The data and the recipe; for CIFAR-10 always the same training images."""
    recipe = change(get_preset("demo"), control="none", precision="fp32")
    if dataset == "digits":
        return load_dataset(dataset), recipe
    data = load_dataset(dataset, data_root, image_size=16, train_images=images)
    data = replace(data, test=data.test.take(torch.arange(TEST_IMAGES)))
    return data, change(recipe, dataset=dataset, epochs=20)


class StopAfterTheSearch(Callback):
    """Ends a run once every decision is final."""

    def on_train_begin(self, trainer: Trainer) -> None:
        """End the run here, as the rest is not measured."""
        if trainer.search is not None and trainer.search.phase == "settled":
            raise SearchIsOver


class Explanation:
    """Replaces `GateSearch.refresh`: keeps the statistics, and evaluates the release with re-estimated ones."""

    def __init__(self, trainer: Trainer, data: Dataset) -> None:
        self.trainer, self.data = trainer, data
        self.release: dict[str, float] | None = None

    def __call__(self, *arguments: Any, **options: Any) -> None:
        """Called at the end of an epoch."""
        search = self.trainer.search
        if self.release is not None or search is None or all(gate.frozen for gate in search.live.values()):
            return
        test = self.data.evaluation("test", 500, channels_last=True)
        self.release = {
            name: evaluate(self._refreshed(network, heads), test)["accuracy"]
            for name, network, heads in (
                ("as trained", False, False),
                ("network anew", True, False),
                ("heads anew", False, True),
                ("both anew", True, True),
            )
        }

    def _refreshed(self, network: bool, heads: bool) -> nn.Module:
        trainer = self.trainer
        model = copy.deepcopy(trainer.model)
        refresh_statistics(model, islice(trainer.train_loader.start_at(trainer.epoch), REFRESH_BATCHES))
        in_heads = tuple(f"{name}." for name, _ in named_gates(model))
        with torch.no_grad():
            for (name, buffer), old in zip(model.named_buffers(), trainer.model.buffers(), strict=True):
                if not (heads if name.startswith(in_heads) else network):
                    buffer.copy_(old)
        return model


def measure(data: Dataset, recipe: Recipe) -> dict[str, Any]:
    """One recipe without ("before") and with ("after") `GateSearch.refresh`."""
    released, settled = (
        round(share * recipe.run.epochs) for share in (recipe.search.open_until, recipe.search.settle_at or 1)
    )
    run: dict[str, Any] = {
        "dataset": recipe.data.dataset,
        "gating": recipe.gates.gating,
        "seed": recipe.run.seed,
        "epochs": recipe.run.epochs,
        "images": len(data.train),
        "released_in_epoch": released + 1,
        "settled_in_epoch": settled + 1,
    }
    for variant in ("before", "after"):
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(Run(recipe, Path(folder)), data)
            explanation = Explanation(trainer, data)
            if trainer.search is not None and variant == "before":
                trainer.search.refresh = explanation  # type: ignore[method-assign]
            if recipe.data.dataset != "digits":
                trainer.callbacks.append(StopAfterTheSearch())
            with suppress(SearchIsOver):
                trainer.fit()
        accuracy = [line["eval"]["accuracy"] for line in trainer.records]
        run[variant] = {
            "worst_ratio": min(b / a for a, b in islice(pairwise(accuracy), released - 1, settled)),
            "final": accuracy[-1] if trainer.epoch == recipe.run.epochs else None,
            "macs": trainer.records[-1]["macs"] / trainer.search.macs,
            "accuracy": accuracy,
        }
        if explanation.release is not None:
            run["at_release"] = explanation.release
    return run


def main() -> None:
    """Measure and add to the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-root")
    parser.add_argument("--images", type=int, default=5000, help="number of CIFAR-10 images to train on")
    parser.add_argument("--gatings", nargs="+", default=["layer", "channel"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, recipe = load(options.dataset, options.data_root, options.images)
    for gating in options.gatings:
        for seed in options.seeds:
            run = measure(data, change(recipe, gating=gating, seed=seed))
            print(json.dumps(run))
            found = json.loads(options.output.read_text()) if options.output.exists() else {"runs": []}
            found = {"environment": describe_environment(), "runs": [*found["runs"], run]}
            write_atomically(options.output, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
