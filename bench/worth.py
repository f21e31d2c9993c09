"""What pruning buys over training a smaller network: the runs behind bench/results/search.

    python -m bench.worth plan                                    # the runs, and which are done
    python -m bench.worth run --data-root CIFAR --work RUNS       # train those that are left, one after the other
    python -m bench.worth report                                  # tables and figures of what is done

Every run is a `fastgate train` of its own, on one thread: several `run`s share out the list, and one that was stopped
goes on with `--resume`. Of a finished run everything but its weights is kept in bench/results/search/STUDY/WAY/seedN,
which `fastgate compare` reads.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgate.training.lock import locked
from fastgate.training.run_folder import CONFIG, DECISIONS, METRICS, SUMMARY

RESULTS = Path(__file__).parent / "results" / "search"
KEPT = (CONFIG, SUMMARY, METRICS, DECISIONS)
SEEDS = (1, 2, 3)

Options = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """Runs that are compared with each other.

    Attributes:
        options: of all its runs, as `fastgate train` has them.
        ways: what else each run asks for, by name.
        weights: the run of the study "pretrained" whose weights are started from.
    """

    options: Options
    ways: dict[str, Options]
    weights: str | None = None
    seeds: tuple[int, ...] = SEEDS


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    study: str
    way: str
    seed: int
    options: Options = field(compare=False)

    @property
    def place(self) -> Path:
        """Of its folder, below those of the results and of the work."""
        return Path(self.study, self.way, f"seed{self.seed}")


_COMMON: Options = {
    "preset": "cifar10-layer",
    "network": "resnet20",
    "batch_size": 128,
    "warmup_epochs": 1,
    "precision": "bf16",
    "device": "cpu",
}
_ALL = "equal-macs,equal-training,equal-latency,random,retrain"
_LAYER, _CHANNEL, _BOTH = ({"gating": gating} for gating in ("layer", "channel", "both"))
_PLAIN: Options = {"gating": "none"}

# the MACs of ResNet-20 at 16x16 pixels as a share of those of ResNet-56, and of ResNet-20 of 1.5 times the width
_SHARE_OF_56, _SHARE_OF_WIDE = 0.3246, 0.4461

STUDIES = {
    # what the others start from: one training each, as of weights that are downloaded
    "pretrained": Study(
        {**_COMMON, **_PLAIN, "dataset": "cifar100"},
        {
            "resnet20": {"epochs": 15},
            "resnet18": {"network": "torchvision:resnet18?stem=3x3", "epochs": 6},
        },
        seeds=(1,),
    ),
    # claim 1: from weights of other classes, on 10,000 images
    "weights": Study(
        {**_COMMON, "dataset": "cifar10", "train_images": 10_000, "epochs": 10},
        {
            "unpruned": _PLAIN,
            "layer-50": {**_LAYER, "target": 0.5, "control": _ALL},
            "channel-50": {**_CHANNEL, "target": 0.5, "control": "equal-macs,random"},
            "both-50": {**_BOTH, "target": 0.5},
            "layer-35": {**_LAYER, "target": 0.35, "control": "equal-macs"},
            "channel-35": {**_CHANNEL, "target": 0.35, "control": "equal-macs"},
        },
        weights="resnet20",
    ),
    # claim 3: long enough, half the MACs
    "long": Study(
        {**_COMMON, "dataset": "cifar10", "image_size": 16, "train_images": 25_000, "epochs": 30},
        {
            "unpruned": _PLAIN,
            "layer-50": {**_LAYER, "target": 0.5, "control": _ALL},
            "channel-50": {**_CHANNEL, "target": 0.5, "control": "equal-macs"},
        },
    ),
    # claim 2: from a larger network to ResNet-20's MACs
    "larger": Study(
        {**_COMMON, "dataset": "cifar10", "image_size": 16, "train_images": 25_000, "epochs": 30},
        {
            "resnet20": _PLAIN,
            "resnet56-layer": {**_LAYER, "network": "resnet56", "target": _SHARE_OF_56},
            "resnet56-both": {**_BOTH, "network": "resnet56", "target": _SHARE_OF_56},
            "wide-channel": {
                **_CHANNEL,
                "widths": "24,48,96",
                "target": _SHARE_OF_WIDE,
                "control": "equal-macs,equal-training",
            },
        },
    ),
}


def list_jobs(names: list[str]) -> Iterator[Job]:
    """The runs of these studies, all ways of a seed before the next seed."""
    for name in names:
        study = STUDIES[name]
        for seed in study.seeds:
            for way, options in study.ways.items():
                yield Job(name, way, seed, {**study.options, **options, "seed": seed})


def is_done(job: Job) -> bool:
    """Whether its results are kept."""
    return (RESULTS / job.place / SUMMARY).exists()


def run(job: Job, work: Path, data_root: str) -> None:
    """Train it, or what is left of it, and keep its results."""
    folder = work / job.place
    command = [sys.executable, "-m", "fastgate", "train", "--output", str(folder), "--data-root", data_root]
    if (folder / CONFIG).exists():
        command += ["--resume", "--device", "cpu"]
    else:
        weights = STUDIES[job.study].weights
        source = {} if weights is None else {"weights": work / "pretrained" / weights / "seed1" / "model.safetensors"}
        for name, value in {**job.options, **source}.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
    with (work / f"{job.place.as_posix().replace('/', '-')}.log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for path in (folder, *folder.glob("control-*")):
        place = RESULTS / job.place / path.relative_to(folder)
        place.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (path / name).exists() and name != SUMMARY:
                shutil.copy(path / name, place / name)
    shutil.copy(folder / SUMMARY, RESULTS / job.place / SUMMARY)  # last: it says that the run is done


def run_all(names: list[str], work: Path, data_root: str) -> None:
    """Train what is not done, leaving out what another process works on."""
    for job in list_jobs(names):
        claim = work / "claims" / job.place
        claim.mkdir(parents=True, exist_ok=True)
        try:
            with locked(claim):
                if not is_done(job):
                    print(job.place, flush=True)
                    run(job, work, data_root)
        except subprocess.CalledProcessError as error:
            print(job.place, "failed with", error.returncode, flush=True)
        except ValueError:  # locked
            print(job.place, "is another process's", flush=True)


def main() -> None:
    """Plan, run or report."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("what", choices=("plan", "run", "report"))
    parser.add_argument("--studies", nargs="+", choices=tuple(STUDIES), default=list(STUDIES))
    parser.add_argument("--data-root", default=os.environ.get("FASTGATE_DATA", ""))
    parser.add_argument("--work", type=Path, default=Path("runs/worth"))
    options = parser.parse_args()
    if options.what == "run":
        run_all(options.studies, options.work, options.data_root)
    elif options.what == "plan":
        for job in list_jobs(options.studies):
            print("done" if is_done(job) else "    ", job.place, json.dumps(job.options))


if __name__ == "__main__":
    main()
