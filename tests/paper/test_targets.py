"""The paper's numbers as typed in, and the runs that each table asks for."""

import pytest

from fastgate.paper.printed import CIFAR10, CIFAR100, TABLE2, TABLE3, TABLE5, TABLE6
from fastgate.paper.recipes import SCALES
from fastgate.paper.targets import TARGETS, plan_target
from fastgate.training.recipe import Recipe


@pytest.mark.parametrize("table", [TABLE2, TABLE5, TABLE6])
def test_printed_drops_are_those_of_the_printed_accuracies(table) -> None:
    for (dataset, name), row in table.rows.items():
        baseline = table.rows[dataset, "baseline"]
        assert row.drop == pytest.approx(baseline.accuracy - row.accuracy, abs=0.005), name


def test_table_3_contradicts_itself_where_the_remark_says_so() -> None:
    odd = [
        name
        for (_, name), row in TABLE3.rows.items()
        if row.unpruned is not None and row.drop != pytest.approx(row.unpruned - row.accuracy, abs=0.005)
    ]
    assert odd == ["AMC", "Importance"]
    assert all(name in TABLE3.contradictions[0] for name in odd)


def test_printed_shares_are_those_of_the_printed_flops() -> None:
    for row in TABLE2.rows.values():
        assert row.flops is not None
        assert row.flops_share == pytest.approx(row.flops / 255.3, abs=0.011)  # 135.41 / 255.3 is printed as 0.52


def recipes_of(target: str, scale: str = "full") -> dict[str, Recipe]:
    """Recipe of each row's first run by the row's name, of the last data set that has it."""
    return {row.name: row.runs[0].recipe for row in plan_target(target, scale).rows if row.runs}


def test_full_is_section_5_as_printed() -> None:
    plan = plan_target("table2", "full")
    recipes = {(row.dataset, row.name): row.runs[0].recipe for row in plan.rows}
    for dataset, batch_size, schedule in (
        (CIFAR10, 256, "0:1, 60:0.1, 120:0.01, 160:0.001"),
        (CIFAR100, 64, "0:1, 125:0.1, 190:0.01, 250:0.001"),
    ):
        for name in ("baseline", "layer pruned", "channel pruned"):
            recipe = recipes[dataset, name]
            assert (recipe.model.network, recipe.run.epochs, recipe.run.seed) == ("resnet110", 350, 1)
            assert (recipe.run.batch_size, recipe.optimizer.lr_schedule, recipe.optimizer.warmup_epochs) == (
                batch_size,
                schedule,
                0,
            )
            assert (recipe.optimizer.learning_rate, recipe.optimizer.momentum, recipe.optimizer.nesterov) == (
                0.1,
                0.9,
                False,
            )
            assert (recipe.optimizer.weight_decay, recipe.optimizer.gate_weight_decay) == (5e-4, 5e-4)
            assert (recipe.gates.window, recipe.gates.init_logit, recipe.search.target) == ("clipped", None, None)
    assert recipes[CIFAR10, "channel pruned"].gates.position == "after"
    assert recipes[CIFAR100, "channel pruned"].gates.position == "middle"
    assert recipes[CIFAR10, "channel pruned"].gates.gate_input == "flatten"


def test_rows_ask_for_what_their_names_say() -> None:
    polar = {name: recipe.search.polarization for name, recipe in recipes_of("table5").items()}
    assert [polar[f"λ_polar = {i}"] for i in range(4)] == [0, 1, 2, 3]
    assert polar["λ_polar ↑"] == "0:0, 125:2, 190:3"
    gatings = {name: recipe.gates.estimator for name, recipe in recipes_of("table4").items()}
    assert gatings["STE"] == "straight_through" and gatings["Gumbel-softmax"] == "gumbel"
    assert gatings["Bernoulli"] == "mean_threshold"  # as section 5.4 describes it
    channels = recipes_of("table6")
    assert all(
        (channels[f"{depth}FC-{position}"].gates.gate_depth, channels[f"{depth}FC-{position}"].gates.position)
        == (depth, position)
        for depth in (1, 2)
        for position in ("before", "middle", "after")
    )
    ours = next(row for row in plan_target("table3", "full").rows if row.name == "Ours")
    assert [run.recipe.run.seed for run in ours.runs] == [1, 2, 3, 4, 5]
    assert {(run.recipe.model.network, run.recipe.gates.estimator) for run in ours.runs} == {("resnet56", "gumbel")}


def test_a_rising_lambda_keeps_its_place_in_shorter_training() -> None:
    plan = plan_target("table5", "full", {"epochs": 70})
    rising = next(row.runs[0].recipe for row in plan.rows if row.name == "λ_polar ↑")
    assert (rising.run.epochs, rising.search.polarization) == (70, "0:0, 25:2, 38:3")
    assert "epochs 70" in plan.notes[0]


@pytest.mark.parametrize("scale", SCALES)
def test_runs_of_one_name_are_one_run(scale: str) -> None:
    known: dict[str, object] = {}
    asked = 0
    for target in TARGETS:
        for run in plan_target(target, scale).runs:
            assert known.setdefault(run.name, run) == run, target
            asked += 1
    assert len(known) < asked  # tables share runs


@pytest.mark.parametrize("target", TARGETS)
def test_every_table_has_its_baseline_and_a_plain_network_of_equal_macs(target: str) -> None:
    rows = plan_target(target, "full").rows
    for dataset in {row.dataset for row in rows}:
        here = [row for row in rows if row.dataset == dataset and row.runs]
        assert here[0].name == "baseline" and here[0].runs[0].recipe.gates.gating == "none"
        controls = [run for row in here for run in row.runs if run.equal_to is not None]
        assert len(controls) == 1
        assert controls[0].equal_to in [run for row in here for run in row.runs]


@pytest.mark.parametrize(
    ("target", "scale", "overrides", "message"),
    [
        ("table7", "smoke", {}, "target: expected one of table2, table3, .*got 'table7'"),
        ("table2", "long", {}, "scale: expected one of smoke, short, full, got 'long'"),
        ("table2", "smoke", {"network": "vgg16"}, "network: expected resnetN"),
    ],
)
def test_bad_requests(target: str, scale: str, overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_target(target, scale, overrides)
