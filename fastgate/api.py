"""`fastgate.train`: what the command line does, from Python, with the user's own network and loaders."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastgate.gates import named_gates
from fastgate.modes import eval_mode

if TYPE_CHECKING:  # importing fastgate loads nothing of training
    from fastgate.training.records import Summary


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        network: the compact network, plain, on the device it was trained on.
        summary: accuracy, MACs, latency, seconds and joules of this network and of the controls, as in `summary.json`.
        folder: the run folder.
    """

    network: nn.Module
    summary: "Summary"
    folder: Path


def train(
    model: nn.Module | str,
    train: Any,
    test: Any = None,
    *,
    preset: str = "finetune-layer",
    folder: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    data_root: str | None = None,
    download: bool = False,
    logger: str = "none",
    **options: Any,
) -> Trained:
    """Train and prune a network: what `fastgate train` does, with the same options, presets and run folder.

        trained = fastgate.train(torchvision.models.resnet18(weights="DEFAULT"), train_loader, test_loader, target=0.5)
        trained.network, trained.summary["rows"]["compact"]

    Args:
        model: a plain network that gives scores `[N, classes]`, which stays as it is; or a name, as for `--network`.
            Every run, controls included, starts from a copy of it: `retrain` too starts from its weights then.
        train: batches `(images [N, C, H, W], labels [N])` with a length, such as a `DataLoader`; or the name of a data
            set, as for `--dataset`.
        test: batches to measure accuracy on, in the same form; None if `train` is the name of a data set, which has
            its own.
        preset: the recipe that the options change.
        folder: the run folder; default: `runs/train-<time>`.
        resume: continue the run in `folder`, with its network and loaders made as they were before.
        device: "auto", "cpu" or "cuda[:index]".
        data_root, download, logger: as on the command line.
        **options: of the recipe, such as `target=0.5`, `gating="channel"`, `epochs=90`; as on the command line.

    Raises:
        ValueError, TypeError: invalid or contradictory arguments.
    """
    # what training needs beyond the library is installed with fastgate[train]
    from fastgate.training.data.loaders import Loaders
    from fastgate.training.distributed import resolve_device
    from fastgate.training.pipeline import Run, finish
    from fastgate.training.presets import get_preset
    from fastgate.training.recipe import change

    where = resolve_device(device)
    named = isinstance(train, str)
    if named != (test is None):
        raise ValueError(
            "test: expected a loader if train is a loader, and none if train is the name of a data set, got "
            f"train of type {'str' if named else type(train).__name__} and test of type {type(test).__name__}"
        )
    if isinstance(model, str):
        options["network"] = model
    elif any(named_gates(model)):
        raise ValueError("model: expected a plain network, got one with gates; they are added here, see gating=")
    data = None
    if named:
        options["dataset"] = train
    else:
        classes = _count_classes(model, train, where)
        data = Loaders(train, test, classes, where)
        if options.setdefault("batch_size", data.batch_size) != data.batch_size:
            raise ValueError(
                f"batch_size: expected {data.batch_size}, that of the loader, got {options['batch_size']}; leave it "
                "out, or make the loader with it"
            )
    if not isinstance(model, str):
        # recorded in the run folder; nothing is imported from it
        options |= {"network": f"{type(model).__module__}:{type(model).__qualname__}", "weights": "none"}
    recipe = change(get_preset(preset), **options)
    place = Path(folder or Path("runs") / f"train-{datetime.now():%Y%m%d-%H%M%S}")
    run = Run(
        recipe,
        place,
        data_root,
        download,
        where,
        logger=logger,
        model=None if isinstance(model, str) else model,
    )
    outcome = finish(run, data, resume=resume)
    return Trained(outcome.network, outcome.summary, place)


def _count_classes(model: nn.Module | str, train: Any, device: str) -> int:
    """How many scores the network gives on a training image; for a name, how many classes the labels have."""
    with torch.random.fork_rng(devices=[]):
        batches: list[Any] = list(train) if isinstance(model, str) else [next(iter(train), None)]
    for batch in batches:
        if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)):
            raise ValueError(f"train: expected batches of two tensors, images and labels, got {type(batch).__name__}")
    if isinstance(model, str):
        return 1 + max(int(y.max()) for _, y in batches)
    x = batches[0][0]
    with torch.no_grad(), eval_mode(model):
        scores = model(x[:1].to(next(model.parameters()).device))
    return int(scores.shape[1])
