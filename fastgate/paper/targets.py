"""What each table and figure of the paper consists of: its rows, the runs behind them, remarks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastgate.paper.printed import CIFAR10, CIFAR100, TABLE2, TABLE3, TABLE4, TABLE5, TABLE6, Printed, PrintedTable
from fastgate.paper.recipes import GATINGS, RISING, SCALES, PlannedRun, Recipes, equal_macs

EQUAL_MACS = "plain ResNet, MACs of {}"


@dataclass(frozen=True)
class Row:
    """A row of a result.

    Attributes:
        dataset, name: as printed.
        printed: what the paper has there, if anything.
        runs: ours, several for a mean over seeds; none where a row is quoted from the literature.
    """

    dataset: str
    name: str
    printed: Printed | None = None
    runs: tuple[PlannedRun, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A table or figure at a scale.

    Attributes:
        rows: a data set's unpruned network, which drops are counted from, is called "baseline" in them.
        naive: the run whose network the naive baselines of section 5.3 are applied to.
        maps: rows whose gates are drawn over the epochs.
    """

    target: str
    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    naive: PlannedRun | None = None
    maps: bool = False

    @property
    def runs(self) -> list[PlannedRun]:
        """Every run once, in the order of the rows."""
        return list({run.name: run for row in self.rows for run in row.runs}.values())


def _control(dataset: str, name: str, run: PlannedRun) -> Row:
    return Row(dataset, EQUAL_MACS.format(name), None, (equal_macs(run),))


def _rows(table: PrintedTable, runs: Mapping[tuple[str, str], PlannedRun], control: str) -> tuple[Row, ...]:
    """The table's rows with our runs; behind the row `control` the plain network of equal MACs."""
    rows = []
    for (dataset, name), run in runs.items():
        rows.append(Row(dataset, name, table.rows.get((dataset, name)), (run,)))
        if name == control:
            rows.append(_control(dataset, name, run))
    return tuple(rows)


def _table2(recipes: Recipes) -> Plan:
    runs = {}
    for dataset, position in ((CIFAR10, "after"), (CIFAR100, "middle")):
        runs[dataset, "baseline"] = recipes.baseline(dataset)
        runs[dataset, "layer pruned"] = recipes.layers(dataset)
        runs[dataset, "channel pruned"] = recipes.channels(dataset, position=position)
    return Plan("table2", TABLE2.title, _rows(TABLE2, runs, "layer pruned"), TABLE2.contradictions)


def _table3(recipes: Recipes) -> Plan:
    trials = tuple(recipes.sparse(recipes.scale.activation, seed) for seed in range(1, recipes.scale.trials + 1))
    quoted = [Row(CIFAR10, name, row) for (_, name), row in TABLE3.rows.items() if name != "Ours"]
    rows = (
        Row(CIFAR10, "baseline", None, (recipes.baseline(network="resnet56"),)),
        Row(CIFAR10, "Ours", TABLE3.rows[CIFAR10, "Ours"], trials),
        _control(CIFAR10, "Ours, seed 1", trials[0]),
        *quoted,
    )
    weight = f"lambda_act is {recipes.scale.activation:g} in our runs, and their trials are seeds."
    return Plan("table3", TABLE3.title, rows, (*TABLE3.contradictions, weight))


def _table4(recipes: Recipes) -> Plan:
    runs = {(CIFAR10, "baseline"): recipes.baseline()}
    runs |= {(CIFAR10, name): recipes.layers(polar="3", gating=name) for name in GATINGS}
    return Plan("table4", TABLE4.title, _rows(TABLE4, runs, "STE"), TABLE4.contradictions)


def _table5(recipes: Recipes) -> Plan:
    rising = "λ_polar ↑"
    runs = {(CIFAR10, "baseline"): recipes.baseline()}
    runs |= {(CIFAR10, f"λ_polar = {polar}"): recipes.layers(polar=polar) for polar in "0123"}
    runs[CIFAR10, rising] = recipes.layers(polar=RISING)
    return Plan("table5", TABLE5.title, _rows(TABLE5, runs, rising), TABLE5.contradictions)


def _table6(recipes: Recipes) -> Plan:
    runs = {(CIFAR10, "baseline"): recipes.baseline()}
    for depth in (1, 2):
        for position in ("before", "middle", "after"):
            runs[CIFAR10, f"{depth}FC-{position}"] = recipes.channels(depth=depth, position=position)
    return Plan("table6", TABLE6.title, _rows(TABLE6, runs, "2FC-after"), TABLE6.contradictions)


def _sparse_rows(recipes: Recipes) -> tuple[Row, ...]:
    """ResNet-56 over the weights of the activation loss, with Table 3's control."""
    rows = [Row(CIFAR10, "baseline", None, (recipes.baseline(network="resnet56"),))]
    rows += [Row(CIFAR10, f"λ_act = {a:g}", None, (recipes.sparse(a),)) for a in recipes.scale.activations]
    weight = recipes.scale.activation
    return (*rows, _control(CIFAR10, f"λ_act = {weight:g}", recipes.sparse(weight)))


def _figure4(recipes: Recipes) -> Plan:
    return Plan(
        "figure4",
        "Figure 4: against naive baselines (CIFAR-10, ResNet-56)",
        _sparse_rows(recipes),
        (
            "Naive dropout sets a share of all parameters of the trained baseline to 0, naive layer pruning the "
            "branches of a share of its residual layers: at test, drawn at random, without training after it.",
            "The text does not say which of its runs the paper's curve consists of: ours are those of Table 3 and "
            "Figure 5. The figure's numbers are not in the text.",
        ),
        naive=recipes.baseline(network="resnet56"),
    )


def _figure5(recipes: Recipes) -> Plan:
    return Plan(
        "figure5",
        "Figure 5: against methods in literature (CIFAR-10, ResNet-56)",
        (*_sparse_rows(recipes), *(Row(CIFAR10, name, row) for (_, name), row in TABLE3.rows.items())),
        (
            *TABLE3.contradictions[:3],
            "Drawn from the numbers of Table 3; pruning rates of the other methods are not in the text, so the left "
            "panel has ours only.",
            "lambda_act runs over [0, 1] at lambda_polar = 1; its values are not printed.",
        ),
    )


def _figure6(recipes: Recipes) -> Plan:
    return replace(
        _table5(recipes),
        target="figure6",
        title="Figure 6: layers open during training under different lambda (CIFAR-10, ResNet-110)",
        notes=(
            "Open ratio of each layer over the training images of an epoch. At lambda = 0 to 3 the first 50 epochs; at "
            "the rising lambda 25 before and 25 after its first change (the paper does not say how many).",
            *TABLE5.contradictions[1:3],
        ),
        maps=True,
    )


TARGETS: dict[str, Callable[[Recipes], Plan]] = {
    "table2": _table2,
    "table3": _table3,
    "table4": _table4,
    "table5": _table5,
    "table6": _table6,
    "figure4": _figure4,
    "figure5": _figure5,
    "figure6": _figure6,
}


def plan_target(target: str, scale: str, overrides: Mapping[str, Any] | None = None) -> Plan:
    """What a table or figure needs at a scale; `overrides` replace fields of every recipe.

    Raises:
        ValueError: an unknown target, scale or field value.
    """
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    if scale not in SCALES:
        raise ValueError(f"scale: expected one of {', '.join(SCALES)}, got {scale!r}")
    recipes = Recipes(SCALES[scale], overrides or {})
    plan = TARGETS[target](recipes)
    changed = "".join(f" Set by hand in every run: {name} {value}." for name, value in recipes.overrides.items())
    return replace(plan, notes=(f"Scale {scale}: {recipes.scale.about}{changed}", *plan.notes))
