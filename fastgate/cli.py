"""The command line: `fastgate train | evaluate | compact | export | compare | report | reproduce | tune | ...`."""

import json
import os
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

import fastgate
from fastgate import processes
from fastgate.env import describe_environment
from fastgate.files import NotWritten, write_atomically
from fastgate.gates import named_gates
from fastgate.ops import choices
from fastgate.pruning.compaction import compact as compact_network
from fastgate.pruning.decisions import Decisions
from fastgate.pruning.storage import load, read_metadata, save
from fastgate.recipe_options import describe_recipe, with_recipe_options
from fastgate.streams import outlive_readers
from fastgate.training import distributed
from fastgate.training.distributed import resolve_device
from fastgate.training.presets import PRESETS, get_preset
from fastgate.training.recipe import (
    PRECISIONS,
    change,
    find_option,
    list_values,
    make_recipe,
    recipe_from_dict,
    recipe_to_dict,
)

if TYPE_CHECKING:
    from fastgate.training.data import Data

# of training images that show the ranges of activations
_CALIBRATION_BATCH, _CALIBRATION_BATCHES = 32, 16

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="Networks that prune themselves while they train."
)
energy = typer.Typer(no_args_is_help=True, help="Energy metering on this machine.")
app.add_typer(energy, name="energy")

DataRoot = Annotated[str | None, typer.Option(help="folder with the CIFAR files; default: $FASTGATE_DATA")]
Download = Annotated[bool, typer.Option("--download", help="let torchvision download CIFAR into the data root")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...; auto uses the GPU if there is one")]


# raised for invalid requests and for missing extras
_ASKED_WRONG = (ValueError, TypeError, OSError, ModuleNotFoundError)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fastgate {fastgate.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="print the version and exit")
    ] = False,
) -> None:
    """Networks that prune themselves while they train."""


def train(
    preset: Annotated[str | None, typer.Option(help=f"one of {', '.join(PRESETS)}")] = None,
    output: Annotated[Path | None, typer.Option(help="run folder; default: runs/<preset>-<time>")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="resume the run in --output")] = False,
    show_recipe: Annotated[bool, typer.Option("--show-recipe", help="print all option values and exit")] = False,
    data_root: DataRoot = None,
    download: Download = False,
    device: Device = "auto",
    logger: Annotated[str, typer.Option(help="logger besides metrics.jsonl: none or tensorboard")] = "none",
    **overrides: str | None,
) -> None:
    """Train and prune a network: train with gates, compact, verify, save, and print a summary.

    The recipe options, in the six groups below, override the preset.
    """
    from fastgate.reports.figures import draw_energy
    from fastgate.reports.tables import print_summary
    from fastgate.training.pipeline import Run
    from fastgate.training.pipeline import train as train_run
    from fastgate.training.run_folder import CONTROL_PREFIX, SUMMARY, read_config
    from fastgate.training.trainer import Interrupted

    given = {name: find_option(name).parse(text) for name, text in overrides.items() if text is not None}
    if resume:
        if output is None:
            raise ValueError("--resume: expected the run folder in --output, got none")
        recipe = read_config(output)
        asked = change(get_preset(preset) if preset else recipe, **given)
        if asked != recipe:
            before, now = list_values(recipe), list_values(asked)
            raise ValueError(
                f"--resume: {output} was started with other values of "
                f"{', '.join(name for name in now if now[name] != before[name])}; resume without these options, or "
                "start a new run in another --output"
            )
    else:
        if preset is None:
            raise ValueError(f"--preset: expected one of {', '.join(PRESETS)}, got none")
        recipe = change(get_preset(preset), **given)
    if show_recipe:
        typer.echo(describe_recipe(recipe))
        return
    folder = processes.from_main(lambda: output or Path("runs") / f"{preset}-{datetime.now():%Y%m%d-%H%M%S}")
    if resume and (folder / SUMMARY).exists() and processes.is_main():
        typer.echo(f"{folder}: this run is already finished; nothing is trained again", err=True)
    command = shlex.join(["fastgate", *sys.argv[1:]])
    run = Run(recipe, folder, data_root, download, resolve_device(device), command=command, logger=logger)
    try:
        summary = train_run(run, resume=resume)
    except (Interrupted, KeyboardInterrupt):  # KeyboardInterrupt: while deciding or measuring, after a checkpoint
        program = "fastgate" if processes.count() == 1 else "torchrun ... -m fastgate"
        options = f" --data-root {data_root}" if data_root else ""
        options += f" --logger {logger}" if logger != "none" else ""
        if processes.is_main():
            again = f"{program} train --output {folder} --resume{options}"
            typer.echo(f"stopped; everything is saved. Resume with: {again}", err=True)
        raise typer.Exit(130) from None
    if not processes.is_main():
        return
    print_summary(summary)
    gated = recipe.gates.gating != "none"
    curves = {"gated" if gated else "unpruned": folder}
    if gated:
        curves |= {kind: folder / f"{CONTROL_PREFIX}{kind}" for kind in recipe.run.controls}
    if draw_energy(curves, folder / "energy.png"):
        typer.echo(f"energy per epoch: {folder / 'energy.png'}")
    typer.echo(f"run folder: {folder}")


app.command()(with_recipe_options(train))


@app.command()
def evaluate(
    network: Annotated[
        Path, typer.Argument(help="a .safetensors or .onnx file, or a run folder with model.safetensors")
    ],
    dataset: Annotated[str | None, typer.Option(help="default: the data set the network was trained on")] = None,
    data_root: DataRoot = None,
    download: Download = False,
    device: Device = "auto",
) -> None:
    """Measure a saved network: test accuracy, MACs, parameters, latency, images per second, joules per image."""
    from fastgate.pruning.export import OnnxNetwork
    from fastgate.reports.tables import print_evaluation
    from fastgate.training.networks import evaluate as evaluate_network
    from fastgate.training.pipeline import measure_networks

    path = _network_file(network)
    model: torch.nn.Module
    if path.suffix == ".onnx":
        if device not in ("auto", "cpu"):
            raise ValueError(f"--device: expected cpu, on which ONNX files are run, got {device}")
        model, where = OnnxNetwork(path), torch.device("cpu")
        metadata = model.metadata
    else:
        model, metadata, where = load(path), read_metadata(path), torch.device(resolve_device(device))
    dataset, data = _data_of(path, metadata, dataset, data_root, download, where)
    model.to(where).to(memory_format=torch.channels_last)
    batches = data.evaluation("test", 256, channels_last=True)
    result = {
        "path": path,
        "dataset": dataset,
        **measure_networks({"network": model}, data, batches)["network"],
        **evaluate_network(model, batches, num_classes=data.num_classes),
    }
    if isinstance(model, OnnxNetwork):
        result["macs"] = result["parameters"] = None
    print_evaluation(result)


def _network_file(source: Path) -> Path:
    from fastgate.training.run_folder import NETWORK

    return source / NETWORK if source.is_dir() else source


def _data_of(
    path: Path,
    metadata: Mapping[str, str],
    dataset: str | None,
    data_root: str | None,
    download: bool,
    device: torch.device,
) -> tuple[str, "Data"]:
    """Name and data of the data set that a network was trained on, or of another one preprocessed in the same way."""
    from fastgate.training.data import load_data

    known = json.loads(metadata.get("data", "{}"))
    if dataset is None and "recipe" in metadata:
        dataset = recipe_from_dict(json.loads(metadata["recipe"])).data.dataset
    if dataset is None:
        raise ValueError(f"{path}: the file does not name its training data; pass --dataset")
    wanted: dict[str, Any] = {}
    if dataset.startswith("folder:") and known:
        wanted = {"image_size": known["image_size"][1], "mean": known["mean"], "std": known["std"]}
    return dataset, load_data(dataset, data_root, download=download, device=device, **wanted)


@app.command()
def compact(
    source: Annotated[Path, typer.Argument(help="a run folder, or its checkpoint.pt")],
    output: Annotated[Path, typer.Option(help="the .safetensors file to write")] = Path("model.safetensors"),
    decisions: Annotated[Path | None, typer.Option(help="decisions.json with which to freeze live gates")] = None,
) -> None:
    """Turn a gated checkpoint into a compact network; live gates need --decisions."""
    from fastgate.training.networks import load_network

    checkpoint = source / "checkpoint.pt" if source.is_dir() else source
    model, recipe = load_network(checkpoint, None if decisions is None else Decisions.from_json(decisions))
    small = compact_network(model) if any(named_gates(model)) else model
    save(small, output, metadata={"recipe": json.dumps(recipe_to_dict(recipe))})
    typer.echo(f"wrote {output}")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="a .safetensors file, or a run folder with model.safetensors")],
    onnx: Annotated[Path | None, typer.Option(help="the .onnx file to write")] = None,
    pt2: Annotated[Path | None, typer.Option(help="the .pt2 file to write, for torch.export.load")] = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="any batch size; default: one image")] = False,
    opset: Annotated[int | None, typer.Option(help="ONNX opset; default: the exporter's own")] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="write the ONNX file in half precision")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="quantize the ONNX file to int8, and measure its accuracy")
    ] = False,
    fuse: Annotated[bool, typer.Option("--fuse", help="fold batch norms into the layers before them")] = False,
    check: Annotated[bool, typer.Option("--check", help="also compare on test images, and time one image")] = False,
    input_size: Annotated[
        str | None, typer.Option(help="C,H,W of an image such as 3,224,224, if the file does not contain it")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="for --check, --int8; default: the training data set")] = None,
    data_root: DataRoot = None,
    download: Download = False,
) -> None:
    """Export a saved network to ONNX or to a PyTorch exported program; the file is verified before it is written."""
    from fastgate.pruning.export import ExportedNetwork, OnnxNetwork, compare_runtimes, export_onnx, export_pt2
    from fastgate.pruning.export import fuse as fuse_network
    from fastgate.reports.tables import print_exported
    from fastgate.training.networks import evaluate as evaluate_network

    if onnx is None and pt2 is None:
        raise ValueError("--onnx, --pt2: expected a file to write, got neither")
    if onnx is None and (opset is not None or fp16 or int8):
        raise ValueError("--opset, --fp16, --int8: expected --onnx as well, as they apply to that file only")
    if fp16 and int8:
        raise ValueError("--fp16, --int8: expected at most one of them, got both")
    path = _network_file(source)
    model, metadata = load(path), read_metadata(path)
    size = json.loads(metadata.get("data", "{}")).get("image_size") if input_size is None else _parse_size(input_size)
    if check or int8:
        _, data = _data_of(path, metadata, dataset, data_root, download, torch.device("cpu"))
        images = next(iter(data.evaluation("test", 256)))[0]
    elif size is None:
        raise ValueError(f"{path}: the file does not contain the image size; pass --input-size C,H,W, or --check")
    else:
        images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    example = images[: 2 if dynamic_batch else 1]
    if fuse:
        model = fuse_network(model, example)
    differences: dict[str, float] = {}
    networks: dict[str, torch.nn.Module] = {"PyTorch": model}
    if onnx is not None:
        options: dict[str, Any] = {"dynamic_batch": dynamic_batch, "opset": opset, "metadata": metadata}
        if int8:
            with TemporaryDirectory() as folder:
                plain = Path(folder) / "fp32.onnx"
                export_onnx(model, example, plain, **options)
                networks["onnxruntime"] = OnnxNetwork(plain)
            batches = data.training(min(_CALIBRATION_BATCH, data.splits["train"]))
            options["int8"] = [x for x, _ in islice(batches, _CALIBRATION_BATCHES)]
        differences[str(onnx)] = export_onnx(model, example, onnx, half=fp16, **options)
        networks["onnxruntime, int8" if int8 else "onnxruntime"] = OnnxNetwork(onnx)
    if pt2 is not None:
        differences[str(pt2)] = export_pt2(model, example, pt2, dynamic_batch=dynamic_batch)
        networks["torch.export"] = ExportedNetwork(pt2)
    # files of a fixed batch size take one image at a time: 64 are enough
    checked = compare_runtimes(networks, images[:64], one_by_one=not dynamic_batch) if check or int8 else {}
    if int8:
        for name, network in networks.items():
            checked[name] |= evaluate_network(network, data.evaluation("test", 256), num_classes=data.num_classes)
    print_exported(differences, checked, len(images[:64]))


def _parse_size(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--input-size: expected C,H,W such as 3,224,224, got {text!r}")
    return [int(part) for part in parts]


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="run folders; runs that differ only by seed are grouped")],
    output: Annotated[Path | None, typer.Option(help="also write the numbers to this .json file")] = None,
) -> None:
    """Print finished runs and their controls side by side: mean and spread over seeds, at the last epoch."""
    from fastgate.reports.comparison import compare_runs
    from fastgate.reports.tables import print_comparison

    comparison = compare_runs(runs)
    print_comparison(comparison)
    if output is not None:
        write_atomically(output, json.dumps(comparison, indent=2) + "\n")
        typer.echo(f"wrote {output}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders, all on the same data set", metavar="RUN...")],
    output: Annotated[Path | None, typer.Option(help="the page; default: report.html in the first run")] = None,
) -> None:
    """Write one HTML page about one or more runs: tables, curves, gates, conditions. It works offline."""
    from fastgate.reports.html import write_report

    typer.echo(f"wrote {write_report(runs, output)}")


@app.command()
def reproduce(
    target: Annotated[str, typer.Argument(help="table2, ... table6, figure4, figure5 or figure6")],
    scale: Annotated[
        str, typer.Option(help="smoke (digits, minutes), short (CIFAR, few epochs) or full (as in the paper)")
    ] = "smoke",
    output: Annotated[Path | None, typer.Option(help="default: runs/paper-<scale>; tables share runs")] = None,
    data_root: DataRoot = None,
    download: Download = False,
    device: Device = "auto",
    epochs: Annotated[str | None, typer.Option(help="epochs of every run; default: the scale's")] = None,
    network: Annotated[str | None, typer.Option(help="network of every run; default: the scale's")] = None,
    precision: Annotated[str | None, typer.Option(help="precision of every run: fp32, fp16, bf16 or auto")] = None,
) -> None:
    """Run or resume the training runs behind a table or figure of the paper; print the paper's rows next to ours."""
    from fastgate.paper.runs import Place
    from fastgate.paper.runs import reproduce as reproduce_target
    from fastgate.paper.targets import plan_target
    from fastgate.reports.paper_tables import print_result, write_result
    from fastgate.training.trainer import Interrupted

    given = {"epochs": epochs, "network": network, "precision": precision}
    plan = plan_target(target, scale, {k: find_option(k).parse(text) for k, text in given.items() if text is not None})
    folder = output or Path("runs") / f"paper-{scale}"
    command = shlex.join(["fastgate", *sys.argv[1:]])
    try:
        for result in reproduce_target(plan, Place(folder, data_root, download, resolve_device(device), command)):
            file = write_result(result, folder)
            done = len(plan.runs) - result["unfinished"]
            typer.echo(f"{target}: {done} of {len(plan.runs)} runs done; so far: {file}", err=True)
    except (Interrupted, KeyboardInterrupt):
        typer.echo("stopped; everything is saved. Resume with the same command", err=True)
        raise typer.Exit(130) from None
    print_result(result)
    typer.echo(f"wrote {folder / target}.json, .md and .png")


@energy.command()
def probe(
    seconds: Annotated[float, typer.Option(help="how long to observe the devices; leave the machine idle")] = 5,
) -> None:
    """Print as JSON what can be metered: devices, counters and update intervals, idle power, a consistency check."""
    from fastgate.energy.probe import probe as probe_energy

    typer.echo(json.dumps(probe_energy(seconds), indent=2))


@app.command()
def tune(
    network: Annotated[str, typer.Option(help="resnet20, resnet32, ...")] = "resnet110",
    gating: Annotated[str, typer.Option(help="layer or channel")] = "layer",
    batch_size: Annotated[int, typer.Option(help="images per step")] = 256,
    image_size: Annotated[int, typer.Option(help="height and width of the images")] = 32,
    precision: Annotated[str, typer.Option(help=f"one of {', '.join(PRECISIONS)}")] = "auto",
    device: Device = "auto",
) -> None:
    """Measure which kernels are fastest for a network on this GPU, in training and inference, and print a table.

    Stored measurements are reused. Without this command, each kind of call is measured when it first runs.
    """
    from rich.progress import track

    from fastgate.reports.tables import print_choices
    from fastgate.training.networks import build_network, resolve_precision
    from fastgate.tuning import tune as tune_model

    if batch_size < 2 or image_size < 1:
        raise ValueError(f"expected a batch size of 2 and an image size of 1 or more, got {batch_size}, {image_size}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    where = torch.device(resolve_device(device))
    if where.type != "cuda":
        typer.echo("nothing to measure on a CPU: a fixed rule decides there when closed channels are skipped")
        return
    shape = (3, image_size, image_size)
    recipe = make_recipe(network=network, gating=gating, batch_size=batch_size, precision=precision)
    model = build_network(recipe, shape, 10).to(where)
    for _, gate in named_gates(model):
        gate.detach_input = recipe.search.detach_gates  # as in the search, which calls other kinds of backward
    model.to(memory_format=torch.channels_last)
    images = torch.rand(batch_size, *shape, device=where).contiguous(memory_format=torch.channels_last)
    dtype = resolve_precision(precision, where)
    with torch.autocast(where.type, dtype, enabled=dtype is not torch.float32):
        tuned = tune_model(model, images, progress=lambda kinds: track(kinds, "measuring", transient=True))
    print_choices(tuned)
    typer.echo(f"stored in {choices.folder()}")


@app.command()
def env() -> None:
    """Print versions, processor, GPUs and the location of stored kernel choices as JSON."""
    kept = {"folder": str(choices.folder()), "count": choices.kept()}
    typer.echo(json.dumps({**describe_environment(), "choices": kept}, indent=2))


def main() -> Any:
    """Run the command line; an invalid request prints one line to standard error and exits with code 2.

    FASTGATE_TRACEBACK=1 shows the full traceback instead.
    """
    from fastgate.pruning.equality import NotEqual
    from fastgate.training.trainer import NonFiniteLoss

    outlive_readers()
    try:
        with distributed.joined():
            return app()
    except (NonFiniteLoss, NotEqual, distributed.ProcessLost, *_ASKED_WRONG) as error:
        if os.environ.get("FASTGATE_TRACEBACK") == "1":
            raise
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        asked_wrong = isinstance(error, _ASKED_WRONG) and not isinstance(error, NotWritten)
        sys.exit(2 if asked_wrong else 1)
