"""Results in the terminal: every table fits 80 columns as long as its numbers have their usual lengths.

A dash stands for what is not known or does not apply.
"""

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from rich.console import Console

from fastgate.reports.comparison import Comparison, Group, Measure
from fastgate.reports.console import print_lines, print_table
from fastgate.reports.quantities import UNKNOWN, format_joules, format_si, shorten
from fastgate.reports.recipes import read_recipe
from fastgate.reports.targets import describe_target, share_reached
from fastgate.reports.timing import doubt_times
from fastgate.training.records import Row, Summary
from fastgate.tuning import Tuned

# characters of the description of a call, in lines of its own cell
_CALL_WIDTH = 26
# fields of a recipe that every run is described by, also where they do not differ
_SAID = {"network", "gating", "epochs", "target", "target_macs"}


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """Print the rows of a run's summary and the conditions they were measured under."""
    console = console or Console()
    recipe, rows, environment = read_recipe(summary["recipe"]), summary["rows"], summary.get("environment", {})
    print_table(
        f"{recipe.network} on {recipe.dataset}, {recipe.epochs} epochs, seed {recipe.seed}",
        ("network", "acc. %", "open %", "MACs", "params", "ms/image", "quartiles ms", "images/s"),
        [
            (
                name,
                _write(row.get("accuracy"), lambda share: f"{100 * share:.2f}", absent="untrained"),
                _write(row.get("open_ratio"), lambda share: f"{100 * share:.1f}"),
                _write(row.get("macs"), format_si),
                _write(row.get("parameters"), format_si),
                _write(row.get("latency_ms"), _milliseconds),
                _write(row.get("latency_ms_quartiles"), _range),
                _write(row.get("images_per_second"), lambda rate: f"{rate:,.0f}"),
            )
            for name, row in rows.items()
        ],
        console,
    )
    on_gpu = summary.get("device", "").startswith("cuda")
    gpus = ", ".join(gpu["name"] for gpu in environment.get("gpus", ()))
    where = (
        gpus if on_gpu else f"{environment.get('cpu', UNKNOWN)}, {environment.get('torch_threads', UNKNOWN)} threads"
    )
    torch = environment.get("versions", {}).get("torch", UNKNOWN)
    lines = [f"acc.: test accuracy of the last epoch; {where}; torch {torch}; {summary.get('date', UNKNOWN)}"]
    if "latency" in summary:
        lines.append(f"time: {summary['latency']}")
    lines += filter(None, [doubt_times(rows, environment)])
    if target := describe_target(recipe, share_reached(recipe, rows)):
        lines.append(f"target: {target}")
    if summary.get("max_abs_difference") is not None:
        lines.append(
            f"compact against frozen network: largest difference {summary['max_abs_difference']:.3g}; "
            f"least unanimous gate: {summary['lowest_unanimity']:.1%} of the training images agree"
        )
    print_lines(lines, console)
    _print_training(summary, console)
    _print_energy(summary, console)


def _write(value: Any, form: Callable[[Any], str], absent: str = UNKNOWN) -> str:
    return absent if value is None else form(value)


def _milliseconds(value: float) -> str:
    """Four digits, as a table's column has them."""
    return f"{value:.3f}" if value < 10 else f"{value:.4g}"


def _range(quartiles: Sequence[float]) -> str:
    return "\N{EN DASH}".join(map(_milliseconds, quartiles))


def _print_training(summary: Summary, console: Console) -> None:
    """What training each network took in total, compared with the unpruned one."""
    rows = summary["rows"]
    trained = {name: row for name, row in rows.items() if "seconds_training" in row}
    if not trained:
        return
    unpruned, images = rows.get("unpruned", {}), summary.get("images_trained")
    macs = unpruned["macs"] * images if images and "macs" in unpruned else None
    seconds = unpruned.get("seconds_training")
    console.print()
    print_table(
        "training, all epochs (MACs: forward passes, without gate heads)",
        ("network", "MACs", "% of unpruned", "seconds", "% of unpruned", "energy"),
        [
            (
                name,
                _write(row.get("macs_training"), format_si),
                _percent(row.get("macs_training"), macs),
                f"{row['seconds_training']:,.0f}",
                _percent(row["seconds_training"], seconds),
                format_joules(row.get("joules_training")),
            )
            for name, row in trained.items()
        ],
        console,
    )


def _percent(value: float | None, of: float | None) -> str:
    return UNKNOWN if value is None or not of else f"{100 * value / of:.1f}"


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print what :func:`fastgate.reports.comparison.compare_runs` found, all runs in one table."""
    console = console or Console()
    groups = comparison["groups"]
    rows: list[tuple[str, ...]] = []
    ends = []
    for number, group in enumerate(groups, 1):
        for index, (name, measures) in enumerate(group["networks"].items()):
            mean = {key: None if measure is None else measure["mean"] for key, measure in measures.items()}
            rows.append(
                (
                    str(number) if index == 0 else "",
                    name,
                    _spread(measures["accuracy"]),
                    "" if name == "compact" else _spread(measures.get("to_compact"), sign="+"),
                    _write(mean["macs"], format_si),
                    _write(mean["images_per_second"], lambda rate: f"{rate:,.0f}"),
                    _write(mean["macs_training"], format_si),
                    _write(mean["seconds_training"], lambda seconds: f"{seconds:,.0f}"),
                )
            )
        ends.append(len(rows) - 1)
    headings = ("run", "network", "acc. %", "to compact", "MACs", "img/s", "tr. MACs", "tr. s")
    # one run needs no number
    first = 0 if len(groups) > 1 else 1
    print_table(
        f"test accuracy on {comparison['dataset']}, last epoch",
        headings[first:],
        [row[first:] for row in rows],
        console,
        keys=2 - first,
        ends=ends[:-1],
    )
    lines = [_describe_group(number if len(groups) > 1 else None, group) for number, group in enumerate(groups, 1)]
    several = any(len(group["seeds"]) > 1 for group in groups)
    lines.append(
        f"{'mean ± standard deviation over the seeds' if several else 'one seed, no spread'}; to compact: accuracy "
        "less that of the compact network of the same run; tr.: training, all epochs"
    )
    print_lines(lines, console)


def _describe_group(number: int | None, group: Group) -> str:
    recipe, reached = read_recipe(group["recipe"]), group["share_reached"]
    target = describe_target(recipe, None if reached is None else reached["mean"])
    parts = [
        f"{recipe.network or UNKNOWN}, {_gates(recipe.gating)}, {recipe.epochs or UNKNOWN} epochs",
        f"seed{'s' if len(group['seeds']) > 1 else ''} {', '.join(map(str, group['seeds']))}",
        target,
        ", ".join(f"{name} {value}" for name, value in group["differs"].items() if name.split(".")[-1] not in _SAID),
    ]
    folders = group["folders"][0] if len(group["folders"]) == 1 else f"{group['folders'][0]}, ..."
    return f"{'' if number is None else f'{number}: '}{folders}: {'; '.join(filter(None, parts))}"


def _gates(gating: str | None) -> str:
    return "no gates" if gating == "none" else f"{gating or UNKNOWN} gates"


def _spread(measure: Measure | None, sign: str = "") -> str:
    """Mean and spread of a share, in percent."""
    if measure is None:
        return UNKNOWN
    spread = "" if measure["spread"] is None else f"±{100 * measure['spread']:.2f}"
    return f"{100 * measure['mean']:{sign}.2f}{spread}"


def _print_energy(summary: Summary, console: Console) -> None:
    """Joules of training, evaluation and inference as a table, or in one line why there are none."""
    rows, epochs = summary["rows"], read_recipe(summary["recipe"]).epochs
    energy = summary.get("energy")
    if energy is None:
        return  # written before energy was metered
    kinds = ("joules_training", "joules_evaluation", "joules_per_image")
    if all(row.get(kind) is None for row in rows.values() for kind in kinds):
        print_lines([f"energy: not metered: {'; '.join(dict.fromkeys(energy['warnings']))}"], console)
        return
    lines = []
    for name, row in rows.items():
        cells = ["not trained"] * 3
        if "joules_training" in row:
            train, evaluation = row["joules_training"], row["joules_evaluation"]
            per_epoch = [None if joules is None or not epochs else joules / epochs for joules in (train, evaluation)]
            cells = [format_joules(joules) for joules in (*per_epoch, train)]
        lines.append((name, *cells, format_joules(row["joules_per_image"])))
    headings = ("network", "training/epoch", "evaluation/epoch", "training", "image")
    console.print()
    print_table("energy of training and evaluation, and of inference per image", headings, lines, console)
    warnings = [*energy["warnings"], *(text for row in rows.values() for text in row["energy"]["warnings"])]
    print_lines([f"energy: {energy['source']}", *shorten(dict.fromkeys(warnings))], console)


def print_evaluation(result: dict[str, Any], console: Console | None = None) -> None:
    """Print what `fastgate evaluate` measured of one network."""
    console = console or Console()
    joules = result["joules_per_image"]
    print_table(
        f"{result['path']} on {result['dataset']}",
        ("acc. %", "loss", "MACs", "params", "ms/image", "images/s", "J/image", "images/J"),
        [
            (
                f"{100 * result['accuracy']:.2f}",
                f"{result['loss']:.4f}",
                _write(result["macs"], format_si),
                _write(result["parameters"], format_si),
                _milliseconds(result["latency_ms"]),
                f"{result['images_per_second']:,.0f}",
                format_joules(joules),
                "unknown" if joules is None else f"{1 / joules:,.0f}",
            )
        ],
        console,
        keys=0,
    )
    energy = result["energy"]
    if quartiles := result.get("latency_ms_quartiles"):
        print_lines([f"latency: quartiles over the rounds {_range(quartiles)} ms"], console)
    doubt = doubt_times({"network": cast(Row, result)}, {"cpu_cores": os.cpu_count()})  # measured here and now
    print_lines([doubt] if doubt else [], console)
    print_lines([f"energy: {energy['source'] if joules is not None else 'not metered'}", *energy["warnings"]], console)


def print_exported(
    differences: Mapping[str, float],
    checked: Mapping[str, Mapping[str, float]],
    images: int,
    console: Console | None = None,
) -> None:
    """Print what `fastgate export` wrote, and how it computes.

    Args:
        differences: by file, the largest one from the network, on example inputs.
        checked: by runtime, `difference` and `latency_ms` on test images, `accuracy` on the test split where it was
            measured; empty where nothing of it was asked for.
        images: how many.
    """
    console = console or Console()
    if checked:
        measured = all("accuracy" in row for row in checked.values())
        print_table(
            f"on {images} test images" + ", accuracy on all" * measured,
            ("runtime", "largest difference", "ms/image", *["accuracy"] * measured),
            [
                (
                    name,
                    f"{row['difference']:.2g}",
                    _milliseconds(row["latency_ms"]),
                    *([f"{row['accuracy']:.2%}"] if measured else []),
                )
                for name, row in checked.items()
            ],
            console,
        )
    written = [f"wrote {file}: largest difference {found:.2g}" for file, found in differences.items()]
    print_lines([*written, *["time: median of interleaved passes over one image"] * bool(checked)], console)


def print_choices(tuned: Sequence[Tuned], console: Console | None = None) -> None:
    """Print what was measured of each kind of call: times by implementation, the choice, the largest difference."""
    console = console or Console()
    modes = {"captured": "in a graph", "eager": "eager"}
    rows = []
    for kind, choice in tuned:
        times = [[choice.microseconds.get(name, {}).get(mode) for mode in modes] for name in ("torch", "triton")]
        off = choice.differences.get("triton")
        rows.append(
            (
                "\n".join([kind.operation, *textwrap.wrap(kind.describe(), _CALL_WIDTH, break_long_words=False)]),
                "\n".join(modes.values()),
                *("\n".join(_write(us, lambda value: f"{value:.1f}") for us in column) for column in times),
                "\n".join(choice.chosen[mode] for mode in modes),
                _write(off, lambda value: f"{value:.1e}"),
            )
        )
    headings = ("call", "launched", "torch us", "triton us", "chosen", "difference")
    title = "microseconds per call, in a CUDA graph and launched one by one; largest difference from float64"
    print_table(title, headings, rows, console, keys=2, ends=range(len(rows) - 1))
    print_lines(
        [
            f"{kind.operation} {kind.describe()}: {name} refused: {why}"
            for kind, choice in tuned
            for name, why in choice.refused.items()
        ],
        console,
    )
