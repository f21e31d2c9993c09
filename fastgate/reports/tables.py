"""Results of a run as a table in the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fastgate.reports.quantities import format_joules, format_si
from fastgate.tuning import Tuned

# short enough for all of them to fit 80 columns
_COLUMNS = ("network", "test acc.", "open", "MACs", "params", "latency", "images/s")


def print_summary(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print the rows of a run's summary and the conditions they were measured under."""
    console = console or Console()
    recipe, environment = summary["recipe"], summary["environment"]
    table = Table(title=f"{recipe['network']} on {recipe['dataset']}, {recipe['epochs']} epochs, seed {recipe['seed']}")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, row in summary["rows"].items():
        table.add_row(
            name,
            "untrained" if row["accuracy"] is None else f"{row['accuracy']:.2%}",
            f"{row['open_ratio']:.1%}",
            format_si(row["macs"]),
            format_si(row["parameters"]),
            f"{row['latency_ms']:.3f} ms",
            f"{row['images_per_second']:,.0f}",
        )
    console.print(table)
    gpus = ", ".join(gpu["name"] for gpu in environment["gpus"])
    where = (
        gpus
        if summary["device"].startswith("cuda")
        else f"{environment['cpu']}, {environment['torch_threads']} threads"
    )
    lines = [f"latency: {summary['latency']}; {where}; torch {environment['versions']['torch']}; {summary['date']}"]
    if "max_abs_difference" in summary:
        lines.append(
            f"compact against frozen network: largest difference {summary['max_abs_difference']:.3g}; "
            f"least unanimous gate: {summary['lowest_unanimity']:.1%} of the training images agree"
        )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    _print_training(summary, console)
    _print_energy(summary, console)


def _print_training(summary: dict[str, Any], console: Console) -> None:
    """What training each network took in all, next to the unpruned one."""
    rows = summary["rows"]
    trained = {name: row for name, row in rows.items() if "macs_training" in row}
    table = Table(title="training, all epochs (MACs: forward passes, without gate heads)")
    for column in ("network", "MACs", "of unpruned", "seconds", "of unpruned", "energy"):
        table.add_column(column, justify="left" if column == "network" else "right")
    unpruned = rows["unpruned"]
    macs = unpruned["macs"] * summary["images_trained"]
    for name, row in trained.items():
        seconds = unpruned.get("seconds_training")
        table.add_row(
            name,
            format_si(row["macs_training"]),
            f"{row['macs_training'] / macs:.1%}",
            f"{row['seconds_training']:,.0f}",
            "unknown" if not seconds else f"{row['seconds_training'] / seconds:.1%}",
            format_joules(row["joules_training"]),
        )
    console.print(table)


def print_comparison(comparison: dict[str, Any], console: Console | None = None) -> None:
    """Print what :func:`fastgate.reports.comparison.compare_runs` found, a table per recipe."""
    console = console or Console()
    for group in comparison["groups"]:
        recipe, seeds = group["recipe"], group["seeds"]
        title = f"{recipe['network']} on {comparison['dataset']}, {recipe['gating']} gates, {recipe['epochs']} epochs"
        table = Table(title=title)
        # short enough for all of them to fit 80 columns
        for column in ("network", "test acc.", "to compact", "MACs", "img/s", "tr. MACs", "time"):
            table.add_column(column, justify="left" if column == "network" else "right")
        for name, measures in group["networks"].items():
            macs, images, training = (measures[key] for key in ("macs", "images_per_second", "macs_training"))
            seconds = measures["seconds_training"]
            table.add_row(
                name,
                _spread(measures["accuracy"]),
                _spread(measures.get("to_compact"), sign="+") if name != "compact" else "",
                format_si(macs["mean"]),
                f"{images['mean']:,.0f}",
                "unknown" if training is None else format_si(training["mean"]),
                "unknown" if seconds is None else f"{seconds['mean']:,.0f} s",
            )
        console.print(table)
        spread = "mean ± standard deviation" if len(seeds) > 1 else "one seed, no spread"
        lines = [
            f"seeds {', '.join(map(str, seeds))}: {spread}; accuracy of the last epoch in percent; MACs and time of "
            "training (tr.) are those of all epochs"
        ]
        if group["differs"]:
            lines.append(", ".join(f"{name} {value}" for name, value in group["differs"].items()))
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _spread(measure: dict[str, Any] | None, sign: str = "") -> str:
    """Mean and spread of a share, in percent."""
    if measure is None:
        return "unknown"
    spread = "" if measure["spread"] is None else f"±{100 * measure['spread']:.2f}"
    return f"{100 * measure['mean']:{sign}.2f}{spread}"


def _print_energy(summary: dict[str, Any], console: Console) -> None:
    """Joules of training, evaluation and inference as a table, or in one line why there are none."""
    rows, epochs = summary["rows"], summary["recipe"]["epochs"]
    kinds = ("joules_training", "joules_evaluation", "joules_per_image")
    if all(row.get(kind) is None for row in rows.values() for kind in kinds):
        reasons = dict.fromkeys(summary["energy"]["warnings"])
        console.print(f"energy: not metered: {'; '.join(reasons)}", highlight=False, markup=False, soft_wrap=True)
        return
    table = Table(title="energy")
    for column in ("network", "training/epoch", "evaluation/epoch", "training, whole run", "inference/image"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, row in rows.items():
        cells = ["not trained"] * 3
        if "joules_training" in row:
            train, evaluation = row["joules_training"], row["joules_evaluation"]
            per_epoch = [None if joules is None else joules / epochs for joules in (train, evaluation)]
            cells = [format_joules(joules) for joules in (*per_epoch, train)]
        table.add_row(name, *cells, format_joules(row["joules_per_image"]))
    console.print(table)
    warnings = [*summary["energy"]["warnings"], *(text for row in rows.values() for text in row["energy"]["warnings"])]
    for line in (f"energy: {summary['energy']['source']}", *dict.fromkeys(warnings)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_evaluation(result: dict[str, Any], console: Console | None = None) -> None:
    """Print what `fastgate evaluate` measured of one network."""
    console = console or Console()
    joules = result["joules_per_image"]
    table = Table(title=f"{result['path']} on {result['dataset']}")
    # short enough for all of them to fit 80 columns
    for column in ("acc.", "loss", "MACs", "params", "latency", "img/s", "J/img", "img/J"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{result['accuracy']:.2%}",
        f"{result['loss']:.4f}",
        format_si(result["macs"]),
        format_si(result["parameters"]),
        f"{result['latency_ms']:.3f} ms",
        f"{result['images_per_second']:,.0f}",
        format_joules(joules),
        "unknown" if joules is None else f"{1 / joules:,.0f}",
    )
    console.print(table)
    energy = result["energy"]
    for line in (f"energy: {energy['source'] if joules is not None else 'not metered'}", *energy["warnings"]):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_choices(tuned: Sequence[Tuned], console: Console | None = None) -> None:
    """Print what was measured of each kind of call: times by implementation, the choice, the largest difference."""
    console = console or Console()
    table = Table(
        title="microseconds per call, in a CUDA graph and launched one by one; largest difference from float64"
    )
    for column in ("operation", "call"):
        table.add_column(column)
    for mode in ("in a graph", "eager"):
        for column in (f"{mode}: torch", "triton"):
            table.add_column(column, justify="right")
        table.add_column("takes")
    table.add_column("difference", justify="right")
    for kind, choice in tuned:
        cells = []
        for mode in ("captured", "eager"):
            times = (choice.microseconds.get(name, {}).get(mode) for name in ("torch", "triton"))
            cells += [*("" if us is None else f"{us:.1f}" for us in times), choice.chosen[mode]]
        off = choice.differences.get("triton")
        table.add_row(kind.operation, kind.describe(), *cells, "" if off is None else f"{off:.1e}")
    console.print(table)
    for kind, choice in tuned:
        for name, why in choice.refused.items():
            console.print(f"{kind.operation} {kind.describe()}: {name} refused: {why}", highlight=False, markup=False)
