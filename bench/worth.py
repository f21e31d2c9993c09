"""The gain of pruning over training a smaller network: the runs behind bench/results/search.

    python -m bench.worth plan                                    # list the runs, and which are done
    python -m bench.worth run --data-root CIFAR --work RUNS       # train the remaining ones, one after the other
    python -m bench.worth report                                  # tables and figures of the finished ones

Every run is a separate `fastgate train` on one thread: several `run` commands divide the list among them, and a stopped
run continues with `--resume`. A finished run, except its weights, is kept in bench/results/search/STUDY/WAY/seedN, for
`fastgate compare`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fastgate.files import write_atomically
from fastgate.training.lock import locked
from fastgate.training.run_folder import CONFIG, DECISIONS, METRICS, NETWORK, SUMMARY

RESULTS = Path(__file__).parent / "results" / "search"
KEPT = (CONFIG, SUMMARY, METRICS, DECISIONS)
SEEDS = (1, 2, 3)

Options = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """Runs to compare with each other.

    Attributes:
        options: of all its runs, as `fastgate train` takes them; `weights` is a run of the study "pretrained".
        ways: further options of each run, by name.
        drawn: the networks of its figure, and their labels.
    """

    options: Options
    ways: dict[str, Options]
    drawn: dict[str, str]
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
        """Path of its folder, relative to the folders of results and of work."""
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
_RESNET18 = "torchvision:resnet18?stem=3x3"
# the equal-macs network for half the MACs of ResNet-20
_HALF: Options = {"network": "resnet14", "widths": "12,32,56"}

# MACs of ResNet-20 at 16x16 pixels, as a fraction of those of ResNet-56, and of ResNet-20 with 1.5 times the width
_SHARE_OF_56, _SHARE_OF_WIDE = 0.3246, 0.4461

# variants that may improve the search; none is chosen by the test images
_VARIANTS: dict[str, Options] = {
    "default": {},
    "early": {"open_until": 0.05, "anneal_until": 0.15, "settle_at": 0.25},
    "gumbel": {"estimator": "gumbel"},
    "gate-decay": {"gate_weight_decay": 5e-4},
    "slow-gates": {"gate_lr_factor": 0.1},
}

# decided after two of ten epochs, for a network that starts from weights
_EARLY: Options = {"open_until": 0.0, "anneal_until": 0.1, "settle_at": 0.2}
_BEFORE: Options = {"detach_gates": False}
_WHEN: dict[str, Options] = {
    "default-gradient": {**_BEFORE, "control": "random"},
    "early-gradient": {**_EARLY, **_BEFORE},
    "default": {},
    "early": _EARLY,
}

_PRUNED_OR_PLAIN = {
    "unpruned": "unpruned",
    "layer-50": "pruned, layer gates",
    "channel-50": "pruned, channel gates",
    "layer-50: equal-macs": "smaller network",
}

STUDIES = {
    # initial weights of the other studies: one training each, as for downloaded weights
    "pretrained": Study(
        {**_COMMON, **_PLAIN, "dataset": "cifar100", "epochs": 15},
        {
            "resnet20": {},
            "half": _HALF,
            "resnet18": {"network": _RESNET18, "epochs": 8},
        },
        drawn={"resnet20": "ResNet-20", "half": "half of its MACs"},
        seeds=(1,),
    ),
    # claim 1: from weights of other classes, on 10,000 images; at the best learning rate of the plain network from
    # scratch (0.05, 0.1, 0.2: 66, 70, 71 % on 2,500 validation images; fine-tuning is as good at 0.1, 84 %)
    "weights": Study(
        {
            **_COMMON,
            "dataset": "cifar10",
            "train_images": 10_000,
            "epochs": 10,
            "weights": "resnet20",
            "learning_rate": 0.2,
        },
        {
            "unpruned": _PLAIN,
            "layer-50": {**_LAYER, **_EARLY, "target": 0.5},
            "channel-50": {**_CHANNEL, **_EARLY, "target": 0.5},
            "both-50": {**_BOTH, **_EARLY, "target": 0.5},
            "layer-35": {**_LAYER, **_EARLY, "target": 0.35},
            "channel-35": {**_CHANNEL, **_EARLY, "target": 0.35},
            # decided at 40 % and with a gradient into the network, as before; the controls have the same MACs
            "layer-50-before": {**_LAYER, **_BEFORE, "target": 0.5, "control": _ALL},
            "channel-50-before": {**_CHANNEL, **_BEFORE, "target": 0.5, "control": "equal-macs,random"},
            "both-50-before": {**_BOTH, **_BEFORE, "target": 0.5},
            "layer-35-before": {**_LAYER, **_BEFORE, "target": 0.35, "control": "equal-macs"},
            "channel-35-before": {**_CHANNEL, **_BEFORE, "target": 0.35, "control": "equal-macs"},
            "plain-with-weights": {**_PLAIN, **_HALF, "weights": "half"},
        },
        drawn={
            "unpruned": "unpruned",
            "layer-50": "pruned, layer gates",
            "channel-50": "pruned, channel gates",
            "both-50": "pruned, both gates",
            "layer-50-before: random": "random half of the layers",
            "plain-with-weights": "smaller network with weights of its own",
            "layer-50-before: equal-training": "smaller network from scratch, trained longer",
            "layer-50-before: equal-macs": "smaller network from scratch",
        },
    ),
    # when to decide if the network starts from weights, and whether the gates' gradient may reach it
    "weights-tried": Study(
        {
            **{**_COMMON, "dataset": "cifar10", "validation": 10_000, "train_images": 10_000, "epochs": 10},
            **{"weights": "resnet20", "learning_rate": 0.2, "target": 0.5},
        },
        {
            f"{gates['gating']}-{name}": {**gates, **options}
            for name, options in _WHEN.items()
            for gates in (_LAYER, _CHANNEL, _BOTH)
            if gates != _BOTH or name.startswith("early")
        },
        drawn={f"layer-{name}": name for name in _WHEN},
        seeds=(1,),
    ),
    # the presets finetune-*, whose learning rate is low, on few images
    "few-images": Study(
        {
            "network": "resnet20",
            "precision": "bf16",
            "device": "cpu",
            "dataset": "cifar10",
            "weights": "resnet20",
            "validation": 2500,
            "train_images": 1000,
            "epochs": 10,
            "target": 0.5,
        },
        {
            f"{gating}-{name}": {"preset": f"finetune-{gating}", **options}
            for name, options in {"default": {}, "early": _EARLY, "early-30": {**_EARLY, "gate_lr_factor": 30}}.items()
            for gating in ("layer", "channel")
        },
        drawn={"channel-default": "decided at 40 %", "channel-early": "decided at 20 %"},
    ),
    "weights-resnet18": Study(
        {
            **_COMMON,
            "dataset": "cifar10",
            "train_images": 5_000,
            "epochs": 10,
            "weights": "resnet18",
            "network": _RESNET18,
        },
        {
            "unpruned": _PLAIN,
            "layer-50": {**_LAYER, "target": 0.5, "control": "equal-macs"},
            "channel-50": {**_CHANNEL, "target": 0.5, "control": "equal-macs"},
            "layer-35": {**_LAYER, "target": 0.35, "control": "equal-macs"},
            "channel-35": {**_CHANNEL, "target": 0.35, "control": "equal-macs"},
        },
        drawn=_PRUNED_OR_PLAIN,
    ),
    # claim 3: half the MACs, trained long enough
    "long": Study(
        {**_COMMON, "dataset": "cifar10", "image_size": 16, "train_images": 25_000, "epochs": 30},
        {
            "unpruned": _PLAIN,
            "layer-50": {**_LAYER, "target": 0.5, "control": _ALL},
            "channel-50": {**_CHANNEL, "target": 0.5, "control": "equal-macs"},
        },
        drawn={**_PRUNED_OR_PLAIN, "layer-50: equal-training": "smaller network, trained longer"},
    ),
    "tried": Study(
        {
            **{**_COMMON, "dataset": "cifar10", "image_size": 16, "validation": 10_000, "train_images": 10_000},
            **{"epochs": 20, "target": 0.5},
        },
        {
            f"{gates['gating']}-{name}": {**gates, **options}
            for gates in (_LAYER, _CHANNEL)
            for name, options in _VARIANTS.items()
        },
        drawn={f"layer-{name}": name for name in _VARIANTS},
        seeds=(1, 2),
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
        drawn={
            "resnet56-layer": "ResNet-56 pruned, layer gates",
            "resnet56-both": "ResNet-56 pruned, both gates",
            "wide-channel": "ResNet-20 of 1.5 times the width pruned, channel gates",
            "resnet20": "ResNet-20",
            "wide-channel: equal-training": "ResNet-20, trained longer",
        },
    ),
}


def list_jobs(names: list[str]) -> Iterator[Job]:
    """The runs of these studies, seed by seed."""
    for name in names:
        study = STUDIES[name]
        for seed in study.seeds:
            for way, options in study.ways.items():
                yield Job(name, way, seed, {**study.options, **options, "seed": seed})


def is_done(job: Job) -> bool:
    """Whether its results have been saved."""
    return (RESULTS / job.place / SUMMARY).exists()


def run(job: Job, work: Path, data_root: str) -> None:
    """Train or resume it, and save its results."""
    folder = work / job.place
    command = [sys.executable, "-m", "fastgate", "train", "--output", str(folder), "--data-root", data_root]
    if (folder / CONFIG).exists():
        command += ["--resume", "--device", "cpu"]
    else:
        for name, value in job.options.items():
            given = work / "pretrained" / value / "seed1" / NETWORK if name == "weights" else value
            command += [f"--{name.replace('_', '-')}", str(given)]
    with (work / f"{job.place.as_posix().replace('/', '-')}.log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for path in (folder, *folder.glob("control-*")):
        place = RESULTS / job.place / path.relative_to(folder)
        place.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (path / name).exists() and name != SUMMARY:
                shutil.copy(path / name, place / name)
    shutil.copy(folder / SUMMARY, RESULTS / job.place / SUMMARY)  # last: it marks the run as done


def run_all(names: list[str], work: Path, data_root: str) -> None:
    """Train the unfinished runs, except those that another process works on."""
    for job in list_jobs(names):
        claim = work / "claims" / job.place
        claim.mkdir(parents=True, exist_ok=True)
        try:
            with locked(claim):
                if not is_done(job):
                    print(job.place, flush=True)
                    run(job, work, data_root)
        except subprocess.CalledProcessError as error:
            if error.returncode == 130:  # Ctrl-C, which saves the run
                return
            print(job.place, "failed with", error.returncode, flush=True)
        except ValueError:  # locked
            print(job.place, "is another process's", flush=True)


@dataclass(frozen=True)
class Result:
    """One network of a study over the seeds: rows of the summaries, and epochs of the metrics."""

    name: str
    way: str
    rows: list[dict[str, Any]]
    epochs: list[list[dict[str, Any]]]

    @property
    def curves(self) -> list[list[tuple[float, float]]]:
        """(MACs of training, accuracy) after each epoch."""
        return [[(e["macs_training"]["total"], e["eval"]["accuracy"]) for e in epochs] for epochs in self.epochs]

    @property
    def seconds(self) -> float:
        """Seconds of training of the fastest seed, since the machine did other work and was paused."""
        return min(sum(e["seconds"]["train"] for e in epochs) for epochs in self.epochs)

    def mean(self, measure: str) -> float:
        """Mean over the seeds."""
        return statistics.fmean(row[measure] for row in self.rows)

    def accuracy(self, less: "Result | None" = None) -> str:
        """In percent, with the standard deviation over the seeds; or the lead over another result in points."""
        values = [100 * _accuracy(row) for row in self.rows]
        if less is not None:
            values = [value - 100 * _accuracy(row) for value, row in zip(values, less.rows, strict=True)]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):{'+' if less else ''}.2f}{spread}"


def _accuracy(row: dict[str, Any]) -> float:
    """On the validation images if there are any, for choosing; otherwise on the test images."""
    held_out = row.get("validation_accuracy")
    return float(row["accuracy"] if held_out is None else held_out)


def finished_seeds(name: str) -> list[int]:
    """The seeds with which all ways of a study are trained."""
    done = {(job.way, job.seed) for job in list_jobs([name]) if is_done(job)}
    return [seed for seed in STUDIES[name].seeds if all((way, seed) in done for way in STUDIES[name].ways)]


def read_results(name: str) -> list[Result]:
    """For every way of a study its own network, then its controls, over the seeds that all ways have."""
    study, results, seeds = STUDIES[name], [], finished_seeds(name)
    for way in study.ways if seeds else ():
        places = [RESULTS / name / way / f"seed{seed}" for seed in seeds]
        summaries = [json.loads((place / SUMMARY).read_text())["rows"] for place in places]
        for network in summaries[0]:
            rows = [summary[network] for summary in summaries]
            if rows[0]["accuracy"] is None:  # timed, not trained
                continue
            control = f"control-{network}"
            own = not (places[0] / control).exists()
            metrics = [(place if own else place / control) / METRICS for place in places]
            epochs = [[json.loads(line) for line in path.read_text().splitlines()] for path in metrics]
            results.append(Result(way if own else f"{way}: {network}", way, rows, epochs))
    return results


def write_table(results: list[Result], path: Path) -> None:
    """Write a Markdown table of every network, compared with the unpruned one and the pruned one of its way."""
    whole = next((result for result in results if result.way in ("unpruned", "resnet20")), results[0])
    lines = [
        "| network | accuracy, % | the pruned one is ahead by | MACs | MACs of training | ms/image | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        pruned = next(other for other in results if other.way == result.way)
        ahead = "" if pruned is result else pruned.accuracy(less=result)
        cells = [
            result.name,
            result.accuracy(),
            ahead,
            f"{result.mean('macs') / 1e6:.2f} M",
            f"{result.mean('macs_training') / whole.mean('macs_training'):.0%}",
            f"{result.mean('latency_ms'):.2f}",
            f"{result.seconds:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"\nSeeds: {len(results[0].rows)}; ± is their standard deviation.")
    write_atomically(path, "\n".join(lines) + "\n")


def draw(results: list[Result], drawn: dict[str, str], path: Path) -> None:
    """Plot accuracy over training MACs, one curve per network, as the mean over the seeds."""
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.add_subplot()
    found = {result.name: result for result in results}
    whole = max(curve[-1][0] for result in results for curve in result.curves)
    lowest = 100.0
    for name, label in drawn.items():
        points = [
            (statistics.fmean(x for x, _ in epoch) / whole, 100 * statistics.fmean(y for _, y in epoch))
            for epoch in zip(*found[name].curves, strict=False)  # a control of equal training may last longer
        ]
        lowest = min(lowest, points[-1][1])
        (line,) = axes.plot(*zip(*points, strict=True), "-" if label.startswith(("pruned", "ResNet-56")) else "--")
        axes.plot(*points[-1], "o", color=line.get_color(), label=f"{label}: {points[-1][1]:.1f} %")
    axes.set(xlabel="MACs of training, as a share of the most", ylabel="accuracy, %", ylim=(lowest - 15, None))
    axes.grid(alpha=0.3)
    figure.legend(fontsize=9, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


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
    elif options.what == "report":
        for name in options.studies:
            if results := read_results(name):
                write_table(results, RESULTS / name / "table.md")
                draw(results, STUDIES[name].drawn, RESULTS / name / "curves.png")
                print((RESULTS / name / "table.md").read_text())
    elif options.what == "plan":
        for job in list_jobs(options.studies):
            print("done" if is_done(job) else "    ", job.place, json.dumps(job.options))


if __name__ == "__main__":
    main()
