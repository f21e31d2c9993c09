"""`import fastgate` is light, and the public names of DESIGN.md exist with the documented parameters."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fastgate as fg

HEAVY = (
    "fvcore",
    "pynvml",
    "lightning",
    "transformers",
    "torchvision",
    "timm",
    "matplotlib",
    "rich",
    "typer",
    "sklearn",
    "triton",
)
OWN = ("fastgate.kernels", "fastgate.training", "fastgate.reports", "fastgate.cli")

LEAN_IMPORT = f"""
import sys
# as where Triton is not installed: importing it raises, find_spec finds nothing (torch itself asks)
sys.modules["triton"] = None
import torch

def refuse(*args, **kwargs):
    raise RuntimeError("import fastgate touched the GPU")

torch.cuda._lazy_init = refuse
torch._C._cuda_init = refuse
# torch itself may have loaded some of these; what counts is what fastgate adds
before = set(sys.modules)
import fastgate
lazy = set(sys.modules) - before
from fastgate import *
added = {{name for name in set(sys.modules) - before}}
heavy = sorted({{name.split(".")[0] for name in added}} & set({HEAVY!r}))
own = sorted(added & set({OWN!r}))
print(torch.cuda.is_initialized(), heavy, own, fastgate.LayerGate.__name__, sorted(lazy))
"""


def test_import_needs_no_gpu_and_no_triton_and_loads_nothing_heavy(tmp_path: Path) -> None:
    # another folder: only the installed package is found, not the checkout in the current directory
    done = subprocess.run(
        [sys.executable, "-c", LEAN_IMPORT], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "False [] [] LayerGate ['fastgate']"


def find(name: str) -> object:
    found: object = fg
    for part in name.split("."):
        found = getattr(found, part)
    return found


REQUIRED = inspect.Parameter.empty
GATE_OPTIONS = {"estimator": "straight_through", "window": "restoring", "init_logit": 0.5, "impl": "auto"}

# name -> (positional parameters, keyword-only parameters), each with its documented default
SIGNATURES = {
    "LayerGate": ({"in_channels": REQUIRED, "hidden_features": 16}, GATE_OPTIONS),
    "ChannelGate": (
        {"in_channels": REQUIRED, "out_channels": None, "hidden_features": 16},
        {"depth": 2, "spatial_size": None, **GATE_OPTIONS},
    ),
    "attach": ({"model": REQUIRED, "gating": "layer", "position": "middle"}, {}),
    "named_gates": ({"model": REQUIRED}, {}),
    "polarization": ({0: REQUIRED}, {"final": None}),
    "activation": ({0: REQUIRED}, {"final": None}),
    "budget": ({0: REQUIRED, "target": REQUIRED, "costs": None}, {"total": None, "final": None}),
    "macs": ({"model": REQUIRED, "inputs": REQUIRED}, {}),
    "flops": ({"model": REQUIRED, "inputs": REQUIRED}, {}),
    "gate_costs": ({"model": REQUIRED, "inputs": REQUIRED}, {}),
    "decide": (
        {"model": REQUIRED, "loader": REQUIRED, "threshold": 0.5},
        {"target": None, "cost": "macs", "costs": None, "total": None, "round_to": None, "forward": None},
    ),
    "freeze": ({"model": REQUIRED, "decisions": REQUIRED}, {}),
    "commit": ({"model": REQUIRED, "optimizer": REQUIRED}, {}),
    "compact": ({"model": REQUIRED}, {}),
    "parameter_groups": ({"model": REQUIRED, "gate_weight_decay": 0.0}, {}),
    "SearchConfig": (
        {},
        {
            "target": 0.5,
            "cost": "macs",
            "open_until": 0.1,
            "anneal_until": 0.25,
            "settle_at": 0.4,
            "commit_after": 5,
            "polarization": 1,
            "activation": 0,
            "budget": 16,
            "capacity": 0.1,
            "round_to": None,
            "detach_gates": True,
            "compact_training": True,
        },
    ),
    "GateSearch": (
        {"model": REQUIRED, "example_inputs": REQUIRED, "optimizer": REQUIRED},
        {"epochs": REQUIRED, "config": None, "forward": None},
    ),
    "GateSearch.begin_epoch": ({"self": REQUIRED, "epoch": REQUIRED, "calibration": None}, {"forward": None}),
    "GateSearch.loss": ({"self": REQUIRED, "progress": 0.0}, {}),
    "GateSearch.compact": ({"self": REQUIRED, "calibration": None}, {"forward": None}),
    "GateSearch.load_state_dict": ({"self": REQUIRED, "state": REQUIRED}, {}),
    "train": ({"model": REQUIRED, "train": REQUIRED, "test": None}, {"preset": "finetune-layer", "folder": None}),
    "compare": ({"masked": REQUIRED, "compacted": REQUIRED, "inputs": REQUIRED}, {}),
    "save": ({"model": REQUIRED, "path": REQUIRED}, {}),
    "load": ({"path": REQUIRED}, {}),
    "EnergyMeter": ({"devices": None, "cpu": "auto"}, {"require": False, "allow_shared": False}),
    "EnergyMeter.window": ({"self": REQUIRED, "name": REQUIRED, "items": None}, {}),
    "measure_energy": ({"fn": REQUIRED, "min_seconds": 5.0, "trials": 4, "warmup": 10}, {}),
    "functional.gate_head": (
        {
            "x": REQUIRED,
            "fc1_weight": REQUIRED,
            "fc1_bias": REQUIRED,
            "bn_weight": None,
            "bn_bias": None,
            "running_mean": None,
            "running_var": None,
            "fc2_weight": None,
            "fc2_bias": None,
        },
        {"training": REQUIRED, "momentum": 0.1, "eps": 1e-5, "window": "clipped", "impl": "auto"},
    ),
    "functional.gated_residual": (
        {"shortcut": REQUIRED, "branch": REQUIRED, "gate": REQUIRED},
        {"relu": True, "impl": "auto"},
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_name_has_the_documented_parameters(name: str) -> None:
    positional, keyword_only = SIGNATURES[name]
    parameters = inspect.signature(find(name)).parameters
    order = [p for p in parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    for i, (wanted, default) in enumerate(positional.items()):
        assert order[i].default == default
        # where DESIGN.md says "a model or an iterable of gates" the parameter's name is not part of the contract
        assert wanted in (i, order[i].name)
    for wanted, default in keyword_only.items():
        assert parameters[wanted].kind == inspect.Parameter.KEYWORD_ONLY
        assert parameters[wanted].default == default


@pytest.mark.parametrize("name", ["Decisions", "Decisions.to_json", "Decisions.from_json", "Decisions.open_ratio"])
def test_public_name_exists(name: str) -> None:
    assert find(name) is not None


def test_type_checkers_see_the_names_where_they_are() -> None:
    tree = ast.parse(Path(fg.__file__).read_text())
    (static,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: statement.module
        for statement in static.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert seen == fg._HOME


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'fastgate' has no attribute 'nonsense'"):
        fg.nonsense  # noqa: B018
    assert {*fg.__all__, "__version__"} <= set(dir(fg))


def test_all_lists_exactly_what_is_there() -> None:
    assert sorted(fg.__all__) == sorted(set(fg.__all__))
    assert [name for name in fg.__all__ if not hasattr(fg, name)] == []
    assert {name.partition(".")[0] for name in SIGNATURES} <= set(fg.__all__)


@pytest.mark.parametrize("name", ["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"])
def test_networks_take_the_documented_arguments(name: str) -> None:
    build = getattr(fg.models, name)
    model = build(7, gating="channel", position="after", shortcut="pad", depth=1, estimator="bernoulli")
    gate = next(iter(fg.named_gates(model)))[1]
    assert model.fc.out_features == 7
    assert (gate.depth, gate.estimator) == (1, "bernoulli")
    with pytest.raises(TypeError, match="positional"):
        build(7, "channel")
