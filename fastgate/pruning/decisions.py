"""Static decisions from per-sample gates: one evaluation pass decides every gate (channel) for all samples."""

import json
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgate import processes
from fastgate.digests import KEY, digest
from fastgate.files import write_atomically
from fastgate.gates import Gate, named_gates
from fastgate.modes import eval_mode
from fastgate.pruning.costs import gate_costs
from fastgate.values import Forward, call, inputs_of, to_device_of

FORMAT = "fastgate-decisions"
VERSION = 2
_WITHOUT_DIGEST = 1  # the version of files that cannot be checked for damage


@dataclass(frozen=True, eq=False)
class GateDecision:
    """The decision of one gate; tensors are `[gates]` on the CPU: one entry for a layer gate, else one per channel.

    Attributes:
        mean: fraction of rows for which the gate was open, float64.
        open: the decision, bool.
        rows: number of rows the gate decided: the number of samples, or more if the network calls the gate several
            times or folds other dimensions into the batch; 0 if the gate was not evaluated.
    """

    mean: Tensor
    open: Tensor
    rows: int = 0

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, GateDecision)
            and torch.equal(self.mean, other.mean)
            and torch.equal(self.open, other.open)
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def unanimity(self) -> Tensor:
        """Fraction of samples that agree with the decision, float64: 1 if all do."""
        return torch.where(self.open, self.mean, 1 - self.mean)


class Decisions(Mapping[str, GateDecision]):
    """Mapping of gate names to :class:`GateDecision`, in forward order.

    Attributes:
        threshold: gates whose mean exceeds it are open, unless a target required otherwise.
        samples: number of samples evaluated; 0 if there was no evaluation pass.
    """

    def __init__(self, gates: Mapping[str, GateDecision], threshold: float = 0.5, samples: int = 0) -> None:
        self._gates = dict(gates)
        self.threshold = threshold
        self.samples = samples

    def __getitem__(self, name: str) -> GateDecision:
        return self._gates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._gates)

    def __len__(self) -> int:
        return len(self._gates)

    def __repr__(self) -> str:
        return (
            f"Decisions({len(self)} gates, open ratio {self.open_ratio:.4f}, polarization {self.polarization:.4f}, "
            f"{self.samples} samples)"
        )

    @property
    def open_ratio(self) -> float:
        """Fraction of open gates (channels), the paper's "gate open ratio"."""
        return float(torch.cat([gate.open for gate in self.values()]).double().mean())

    @property
    def polarization(self) -> float:
        """Eq. 8 (Eq. 9 for channels) over all samples: 0 where every gate is unanimous."""
        return float(torch.stack([(g.mean * (1 - g.mean)).mean() for g in self.values()]).mean())

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the decisions as JSON text; also write it to `path` if given."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            "threshold": self.threshold,
            "samples": self.samples,
            "gates": {
                name: {"mean": g.mean.tolist(), "open": g.open.tolist(), "rows": g.rows} for name, g in self.items()
            },
        }
        text = json.dumps({**data, KEY: digest(data)})
        if path is not None:
            write_atomically(path, text)
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> "Decisions":
        """Read decisions written by :meth:`to_json`, from a JSON text or a file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not such a document, or one that was damaged or changed after it was written.
        """
        is_text = isinstance(source, str) and source.lstrip()[:1] in ("", "{", "[")
        where = "a text" if is_text else str(source)
        if not is_text and not Path(source).is_file():
            raise FileNotFoundError(f"{where}: expected a file written by Decisions.to_json, found none")
        try:
            data: Any = json.loads(str(source) if is_text else Path(source).read_text())
            _check_version(data, where)
            gates = {}
            for name, gate in data["gates"].items():
                _check_ranges(name, gate)
                gates[name] = GateDecision(
                    torch.tensor(gate["mean"], dtype=torch.float64),
                    torch.tensor(gate["open"], dtype=torch.bool),
                    _count("rows", gate.get("rows", data["samples"])),  # earlier versions counted samples alone
                )
            [threshold] = _shares("threshold", [data["threshold"]])
            return cls(gates, threshold, _count("samples", data["samples"]))
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(
                f"decisions: expected JSON of format {FORMAT!r} version {VERSION}, got {where} with {error}; "
                "write it with Decisions.to_json"
            ) from error


def _check_version(data: Any, where: str) -> None:
    """Reject data of another format, and data changed after they were written."""
    version = data.get("version") if data.get("format") == FORMAT else None
    if version == _WITHOUT_DIGEST and KEY not in data:
        warnings.warn(f"{where}: decisions of an earlier version, which cannot be checked for damage", stacklevel=3)
        return
    if version != VERSION:
        raise ValueError(f"format {data.get('format')!r} version {data.get('version')!r}")
    wanted = data.pop(KEY, None)
    if digest(data) != wanted:
        raise ValueError("contents that are not what was written (their checksum differs)")


def _check_ranges(name: str, gate: Mapping[str, Any]) -> None:
    means, opened = _shares(f"the mean of {name!r}", gate["mean"]), gate["open"]
    for value in opened:
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} for a decision of {name!r}, which is true or false")
    if len(means) != len(opened):
        raise ValueError(f"means and decisions of different lengths at {name!r}")


def _shares(name: str, values: Any) -> list[float]:
    """Check that the values are numbers from 0 to 1 and return them as a list."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"{value!r} for {name}, which is a number from 0 to 1")
    return list(values)


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} for the number of {name}, which is 0 or more")
    return value


def decide(
    model: nn.Module,
    loader: Iterable[Any],
    threshold: float = 0.5,
    *,
    target: float | None = None,
    cost: str = "macs",
    costs: Mapping[str, Tensor] | None = None,
    total: int | None = None,
    round_to: int | None = None,
    forward: Forward | None = None,
) -> Decisions:
    """Evaluate every gate on every sample in one pass, and open those whose mean decision exceeds `threshold`.

    With a target, the decisions meet it instead; among those that do, the choice that most samples support is taken,
    see :func:`fastgate.pruning.targets.meet_target`. Frozen gates keep their decision.

    The mean covers every row of every call of a gate. A compiled network is run in eager mode for this.

    Args:
        model: a network with gates; its training mode is restored afterwards.
        loader: batches, moved to the model's device: the inputs, or a tuple or list whose first item is the inputs. A
            mapping is passed as keyword arguments, labels included; a plain tuple as positional ones; anything else,
            such as a list of images, as the only argument.
        threshold: between 0 and 1.
        target: desired fraction of the whole network's cost, 0 to 1.
        cost: the cost that the target refers to, see :func:`fastgate.gate_costs`; it is counted (`"latency"`: measured)
            on the whole first batch.
        costs: cost of each gate (channel), if known; nothing is counted then.
        total: cost of the whole network with every gate open; None: `costs.total`.
        round_to: for channel gates, open channel counts are multiples of this, or all channels.
        forward: `(model, batch) -> anything`, for networks with another calling convention; it gets the whole batch.

    Raises:
        ValueError: no gates, no samples, a gate that did not run or has NaN logits, a threshold outside 0 to 1; a
            target that no decisions can reach (the message names the range) or that comes with a threshold; costs
            without a total; `costs`, `total` or `round_to` without a target.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number between 0 and 1, got {threshold}")
    gates = dict(named_gates(model))
    if not gates:
        raise ValueError("model: expected gates, got none; add them with fastgate.attach(model, 'layer')")
    if target is None:
        for name, value in {"costs": costs, "total": total, "round_to": round_to}.items():
            if value is not None:
                raise ValueError(f"{name}: expected it together with a target, got no target; pass target=")
    elif threshold != 0.5:
        raise ValueError(f"threshold: expected none with a target, which decides instead, got {threshold}")
    batches = iter(loader)
    first = list(islice(batches, 1))
    if target is None or not first:
        return _ask(model, gates, chain(first, batches), threshold, forward)
    # circular: they use this module's decisions
    from fastgate.pruning.importance import layer_importance
    from fastgate.pruning.targets import check_costs, check_target, meet_target

    if costs is None:
        costs = gate_costs(model, inputs_of(first[0], forward), cost, forward=forward)
    total = getattr(costs, "total", None) if total is None else total
    if total is None:
        raise ValueError(
            "total: expected the cost of the whole network, to which the target is relative, got costs without a "
            "total; pass the result of fastgate.gate_costs(model, inputs), or total=fastgate.macs(model, inputs)"
        )
    check_costs(costs, {name: gate.gates for name, gate in gates.items()})
    check_target(costs, target, total, round_to)
    decisions = _ask(model, gates, chain(first, batches), threshold, forward)
    held = {name for name, gate in gates.items() if gate.frozen}
    importance = layer_importance(model, decisions, first[0], costs, target, total, held=held, forward=forward)
    return meet_target(decisions, costs, target, total, held=held, round_to=round_to, importance=importance)


def _ask(
    model: nn.Module, gates: Mapping[str, Gate], batches: Iterable[Any], threshold: float, forward: Forward | None
) -> Decisions:
    device = next(model.parameters()).device
    opened = {name: torch.zeros(gate.gates, dtype=torch.float64, device=device) for name, gate in gates.items()}
    rows = dict.fromkeys(gates, 0)
    samples = 0
    with torch.no_grad(), eval_mode(model), torch.compiler.set_stance("force_eager"), _collected(gates) as calls:
        for batch in batches:
            inputs = inputs_of(batch, forward)
            call(model, to_device_of(model, inputs), forward)
            if any(module.training for module in model.modules()):
                raise RuntimeError(
                    "model: expected eval mode while its gates are evaluated, got training mode, set by its code or "
                    "another thread in the meantime; use a copy of the model"
                )
            for name, outputs in calls.items():
                if not outputs:
                    raise ValueError(f"gate {name!r} did not run in the model's forward; remove or connect it")
                for output in outputs:
                    opened[name] += output.flatten(1).sum(0, dtype=torch.float64).to(device)
            counts = {name: sum(len(output) for output in outputs) for name, outputs in calls.items()}
            samples += len(inputs) if isinstance(inputs, Tensor) else max(counts.values())
            for name, count in counts.items():
                rows[name] += count
                calls[name].clear()
    if samples == 0:
        raise ValueError("loader: expected at least one batch, got none")
    decided = {}
    for name, total in opened.items():
        mean = total.cpu() / rows[name]
        if mean.isnan().any():
            raise ValueError(
                f"gate {name!r}: expected logits without nan, got nan for some samples; look for nan and infinities in "
                "the images, in the weights, and in half-precision features"
            )
        decided[name] = GateDecision(mean, mean > threshold, rows[name])
    return Decisions(decided, threshold, samples)


@contextmanager
def _collected(gates: Mapping[str, Gate]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the outputs of all calls of these gates made by this thread, by name."""
    calls: dict[str, list[Tensor]] = {name: [] for name in gates}
    asker = threading.get_ident()

    def collect(name: str, called: nn.Module, output: Tensor) -> None:
        # nn.DataParallel calls replicas from other threads; calls of the gate itself from another thread are not ours
        if threading.get_ident() == asker or called is not gates[name]:
            calls[name].append(output)

    handles = [
        gate.register_forward_hook(lambda called, inputs, output, name=name: collect(name, called, output))
        for name, gate in gates.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def merge_decisions(decisions: Decisions) -> Decisions:
    """Merge the decisions of all processes, each made on its own samples."""
    if processes.count() == 1:
        return decisions
    samples = int(processes.all_sum(torch.tensor(decisions.samples)))
    gates = {}
    for name, gate in decisions.items():
        rows = int(processes.all_sum(torch.tensor(gate.rows)))
        mean = processes.all_sum((gate.mean * gate.rows).round()) / rows
        gates[name] = GateDecision(mean, mean > decisions.threshold, rows)
    return Decisions(gates, decisions.threshold, samples)


def freeze(model: nn.Module, decisions: Mapping[str, GateDecision]) -> nn.Module:
    """Freeze the model's gates to these decisions, in place, and return the model; gate heads no longer run.

    Raises:
        ValueError: decisions of another network (other gate names or sizes); the model is then unchanged.
    """
    gates = dict(named_gates(model))
    if gates.keys() != decisions.keys():
        odd = sorted(gates.keys() ^ decisions.keys())
        raise ValueError(
            f"decisions: expected the {len(gates)} gates of this model, got {len(decisions)} that differ at "
            f"{', '.join(odd[:4])}; these are decisions of another network"
        )
    for name, gate in gates.items():
        if decisions[name].open.shape != (gate.gates,):
            raise ValueError(
                f"decisions: gate {name!r} expects {gate.gates} entries, got {decisions[name].open.numel()}; these are "
                "decisions of another network"
            )
    for name, gate in gates.items():
        gate.freeze(decisions[name].open)
    return model
