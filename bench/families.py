"""Which networks can be gated and compacted, and how exactly, compared with Torch-Pruning: `python -m bench.families`.

For each network of `bench/zoo.py` and each gating: attach, one training step, random decisions, compact. A row has the
difference of the network with every gate open from the plain one and of the compact from the frozen one (relative to
the largest value), the MACs that are left and were predicted, and whether a saved file restores the network.
"""

import argparse
import copy
import json
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastgate as fg
from bench.zoo import ZOO, build, tensors_of
from fastgate.env import package_version
from fastgate.files import write_atomically
from fastgate.values import call, to_device_of

RESULTS = Path(__file__).parent / "results" / "families"
LIMIT = 120  # seconds for each network and gating
OPEN, EXACT = 0.0, {"layer": 0.0, "channel": 1e-5, "both": 1e-5}


def relative_difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """Largest difference relative to the largest value; infinite if shapes differ."""
    if [t.shape for t in expected] != [t.shape for t in got]:
        return float("inf")
    shares = [
        float((a - b).abs().max()) / max(float(a.abs().max()), 1e-12)
        for a, b in zip(expected, got, strict=True)
        if a.is_floating_point() and a.numel()
    ]
    return max(shares, default=0.0)


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The network's outputs, computed without gradients."""
    with torch.no_grad():
        return tensors_of(call(model, to_device_of(model, inputs, copied=True)))


def decide_at_random(model: nn.Module) -> None:
    """Freeze every gate: a third of the layers closed, and half of the channels, with at least one open per gate."""
    generator = torch.Generator().manual_seed(1)
    for i, (_, gate) in enumerate(fg.named_gates(model)):
        opened = torch.rand(gate.gates, generator=generator) < 0.5
        opened[0] = True
        gate.freeze(opened if gate.gates > 1 else torch.tensor([i % 3 != 1]))


def without_gradient(model: nn.Module, inputs: Any) -> list[str]:
    """Names of the gates that training steps give no gradient; several steps, as stochastic depth drops branches."""
    model.train()
    torch.manual_seed(0)
    without = dict(fg.named_gates(model))
    for _ in range(5):
        result = call(model, inputs)
        first = tensors_of(result)[-1 if isinstance(result, list) else 0]  # features of all stages: the last
        logits = first.flatten(2).mean(2) if first.dim() > 2 else first
        loss = nn.functional.cross_entropy(logits, torch.arange(len(logits)))
        (loss + fg.polarization(model) + fg.budget(model, 0.5)).backward()
        without = {
            name: gate
            for name, gate in without.items()
            if not any(p.grad is not None and bool(p.grad.any()) for p in gate.parameters())
        }
        if not without:
            break
    model.eval()
    return list(without)


def try_network(name: str, gating: str) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"network": name, "gating": gating}
    start = time.perf_counter()
    inputs = ZOO[name].inputs()
    plain = build(name)
    wanted = outputs(plain, inputs)
    model = copy.deepcopy(plain)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fg.attach(model, gating)
        row["left_out"] = [str(w.message) for w in caught if "get no gate" in str(w.message)]
    except ValueError as error:
        return {**row, "result": f"refused: {error}"}
    row["attach_seconds"] = round(time.perf_counter() - start, 1)
    gates = dict(fg.named_gates(model))
    row["gates"], row["decisions"] = len(gates), sum(gate.gates for gate in gates.values())
    for gate in gates.values():
        gate.freeze(torch.ones(gate.gates, dtype=torch.bool))
    row["open"] = relative_difference(wanted, outputs(model, inputs))
    for gate in gates.values():
        gate.unfreeze()
    row["without_gradient"] = without_gradient(model, inputs) if ZOO[name].kind != "detection" else []
    decide_at_random(model)
    frozen = outputs(model, inputs)
    # a detection network processes as many regions as it finds: only its backbone's MACs can be predicted
    part = "backbone" if ZOO[name].kind == "detection" else ""
    of_part = torch.stack(inputs[0]) if part else inputs
    costs = fg.gate_costs(model.get_submodule(part), of_part)
    opened = {gate: gates[f"{part}.{gate}".lstrip(".")].open for gate in costs}
    total = fg.macs(model.get_submodule(part), of_part)
    predicted = total - sum(int(cost[~opened[gate]].sum()) for gate, cost in costs.items())
    small = fg.compact(model)
    compacted = outputs(small, inputs)
    row["compact"] = relative_difference(frozen, compacted)
    row["effect"] = relative_difference(wanted, frozen)
    row["macs"] = {"plain": total, "predicted": predicted, "compact": fg.macs(small.get_submodule(part), of_part)}
    try:
        with tempfile.TemporaryDirectory() as folder:
            fg.save(small, Path(folder) / "small.safetensors")
            loaded = fg.load(Path(folder) / "small.safetensors")
        row["file"] = relative_difference(compacted, outputs(loaded, inputs))
    except ValueError as error:
        row["file"] = f"refused: {error}"
    exact = row["open"] == OPEN and row["compact"] <= EXACT[gating]
    same = isinstance(row["file"], str) or row["file"] == 0.0  # refused with a reason, or identical
    as_said = gating == "both" or predicted == row["macs"]["compact"]
    row["result"] = (
        "ok" if exact and same and as_said and not row["without_gradient"] and row["effect"] > 0 else "WRONG"
    )
    return row


def try_torch_pruning(name: str) -> dict[str, Any]:
    """Whether Torch-Pruning, by its default call, halves the channels of a network so that it still runs."""
    import torch_pruning as tp

    row: dict[str, Any] = {"network": name, "gating": "torch-pruning"}
    model, inputs = build(name), ZOO[name].inputs()
    before = sum(parameter.numel() for parameter in model.parameters())
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 10]
    example = inputs[0] if ZOO[name].kind == "detection" else inputs
    try:
        pruner = tp.pruner.MagnitudePruner(
            model, example, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.5,
            ignored_layers=heads, output_transform=lambda out: sum(t.float().sum() for t in tensors_of(out)),
        )  # fmt: skip
        pruner.step()
        outputs(model, inputs)
    except _TimeoutError:
        raise
    except Exception as error:
        return {**row, "result": f"{type(error).__name__}: {str(error)[:150]}"}
    after = sum(parameter.numel() for parameter in model.parameters())
    return {**row, "parameters": [before, after], "result": "ok" if after < before else "nothing pruned"}


class _TimeoutError(Exception):
    pass


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise an error after `seconds`."""

    def stop(*_: Any) -> None:
        raise _TimeoutError(f"not finished in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(names: list[str], gatings: list[str], path: Path) -> None:
    """Try the networks and append a row for each; networks already in the file are skipped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["network"], row["gating"]) for row in read(path)}
    for name in names:
        for gating in gatings:
            if (name, gating) in done:
                continue
            start = time.perf_counter()
            try:
                with limited(LIMIT):
                    row = try_torch_pruning(name) if gating == "torch-pruning" else try_network(name, gating)
            except Exception as error:
                row = {"network": name, "gating": gating, "result": f"{type(error).__name__}: {str(error)[:200]}"}
            row["seconds"] = round(time.perf_counter() - start, 1)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name:40} {gating:14} {row['result'][:100]}", flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, one line per network."""
    gatings = list(dict.fromkeys(row["gating"] for row in rows))
    results = {(row["network"], row["gating"]): row["result"] for row in rows}
    lines = [f"| network | {' | '.join(gatings)} |", "|" + "---|" * (len(gatings) + 1)]
    for name in dict.fromkeys(row["network"] for row in rows):
        cells = [results.get((name, gating), "").replace("|", "/")[:120] for gating in gatings]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    counts = [sum(r["result"] == "ok" for r in rows if r["gating"] == gating) for gating in gatings]
    return "\n".join([*lines, f"| ok | {' | '.join(map(str, counts))} |"])


def overview(rows: list[dict[str, Any]]) -> str:
    """Which networks take which gates, as a Markdown table: the one in docs/networks.md."""
    taken = {
        gating: {row["network"] for row in rows if row["gating"] == gating and row["result"] == "ok"}
        for gating in ("layer", "channel")
    }
    groups: dict[tuple[bool, bool, str], list[str]] = {}
    for network in dict.fromkeys(row["network"] for row in rows):
        library, name = network.split("/", 1)
        groups.setdefault((network not in taken["layer"], network not in taken["channel"], library), []).append(name)
    lines = ["| layer gates | channel gates | networks |", "|---|---|---|"]
    for (no_layer, no_channel, library), names in sorted(groups.items()):
        cells = ["no" if no_layer else "yes", "no" if no_channel else "yes", f"**{library}**: {', '.join(names)}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the requested networks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="networks of bench/zoo.py, default all")
    parser.add_argument("--gating", nargs="*", default=["layer", "channel", "torch-pruning"])
    parser.add_argument("--output", type=Path, default=RESULTS / "families.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run(options.names or list(ZOO), options.gating, options.output)
    text = table(read(options.output))
    print(text)
    write_atomically(options.output.with_name("README.md"), f"{_ABOUT}{_versions()}\n\n{text}\n")


_ABOUT = f"""# Networks that can be gated, and how exactly

By `python -m bench.families`, rows in `families.jsonl`: for each network and gating attach, a training step in which
every gate gets a gradient, random decisions, compact. "ok": with all gates open the outputs are those of the plain
network to the bit; the compact network's are those of the frozen one, to the bit for layer gates, within
{EXACT["channel"]} of the largest value for channels; MACs are as predicted (in detection those of the backbone);
a file, where the network's classes can be described in one, gives it back. Small images, random weights.
torch-pruning: its default call halves the channels and the network runs, whatever it computes; {LIMIT} s each.

"""


def _versions() -> str:
    packages = ("torch", "torchvision", "timm", "transformers", "torch-pruning")
    return ", ".join(f"{package} {package_version(package)}" for package in packages) + "; two CPU cores."


if __name__ == "__main__":
    main()
