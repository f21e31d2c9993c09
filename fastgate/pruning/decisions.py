"""Static decisions from per-sample gates: one evaluation pass, one open or closed per gate (channel)."""

import json
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
from fastgate.values import Forward, call, to_device_of

FORMAT = "fastgate-decisions"
VERSION = 2
_WITHOUT_DIGEST = 1  # the version of files that cannot be checked for damage


@dataclass(frozen=True, eq=False)
class GateDecision:
    """The decision of one gate; every tensor is `[gates]` on the CPU: one entry for a layer gate, else one per channel.

    Attributes:
        mean: share of rows for which the gate was open, float64.
        open: the decision, bool.
        rows: how many rows the gate decided on: samples, and more where the network calls it several times for one or
            folds other dimensions into the batch; 0 where none was asked.
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
        """Share of samples that agree with the decision, float64: 1 where all do."""
        return torch.where(self.open, self.mean, 1 - self.mean)


class Decisions(Mapping[str, GateDecision]):
    """Gate name -> :class:`GateDecision`, in forward order.

    Attributes:
        threshold: a gate is open where its mean exceeds this, unless a target asked otherwise.
        samples: number of samples that were asked; 0 where no pass was made.
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
        """Share of open gates (channels) among all, the paper's "gate open ratio" as a fraction."""
        return float(torch.cat([gate.open for gate in self.values()]).double().mean())

    @property
    def polarization(self) -> float:
        """Eq. 8 (Eq. 9 for channels) over all samples: 0 where every gate is unanimous."""
        return float(torch.stack([(g.mean * (1 - g.mean)).mean() for g in self.values()]).mean())

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The decisions as JSON text, also written to `path` if one is given."""
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
        """Read what :meth:`to_json` wrote, from its text or from a file.

        Raises:
            FileNotFoundError: a path where no file is.
            ValueError: the text is not such a document, or was damaged or changed since it was written.
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
    """Refuse what is not of this library, and what is not as it was written."""
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
    """A list of numbers from 0 to 1."""
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
    """Ask every gate about every sample, in one evaluation pass, and open those whose mean exceeds `threshold`.

    With a target the decisions are instead those that meet it and of these the ones that samples are most for, see
    :func:`fastgate.pruning.targets.meet_target`. Gates that are frozen keep their decision.

    The mean is over what the gate decided on: every call in a forward and every row of each. A compiled network runs
    eagerly for that.

    Args:
        model: a network with gates; its training mode is restored afterwards.
        loader: batches, moved to the model's device: the inputs, or a tuple or list whose first item is the inputs. A
            mapping is passed as keyword arguments, labels and all; a plain tuple as positional ones; anything else,
            such as a list of images, as the only argument.
        threshold: between 0 and 1.
        target: wanted share of what the whole network costs, 0 to 1.
        cost: what the target is a share of, see :func:`fastgate.gate_costs`: it is counted (`"latency"`: measured) on
            the first batch, as a whole.
        costs: what each gate (channel) switches, where that is known: nothing is then counted.
        total: what the whole network costs with every gate open; None: `costs.total`.
        round_to: channel gates: the numbers of open channels are multiples of it, or all.
        forward: `(model, batch) -> anything`, for networks that are called otherwise; it gets the whole batch.

    Raises:
        ValueError: no gates, no samples, a gate that did not run or whose logits are nan, a threshold outside 0 to
            1; a target that no decisions reach (the message names the range) or beside a threshold; costs that do not
            say what the whole network costs; `costs`, `total` or `round_to` without a target.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number between 0 and 1, got {threshold}")
    gates = dict(named_gates(model))
    if not gates:
        raise ValueError("model: expected gates, got none; add them with fastgate.attach(model, 'layer')")
    if target is None:
        for name, value in {"costs": costs, "total": total, "round_to": round_to}.items():
            if value is not None:
                raise ValueError(f"{name}: expected it beside a target, got no target; pass target=")
    elif threshold != 0.5:
        raise ValueError(f"threshold: expected none beside a target, which decides instead, got {threshold}")
    batches = iter(loader)
    first = list(islice(batches, 1))
    meet = None
    if target is not None and first:
        if costs is None:
            costs = gate_costs(model, _inputs_of(first[0], forward), cost, forward=forward)
        meet = _meeting(target, costs, total, round_to)
    decisions = _ask(model, gates, chain(first, batches), threshold, forward)
    return decisions if meet is None else meet(decisions, held={name for name, gate in gates.items() if gate.frozen})


def _meeting(
    target: float, costs: Mapping[str, Tensor], total: int | None, round_to: int | None
) -> Callable[..., Decisions]:
    """What makes decisions meet a target; one that is out of reach is found out before any gate is asked."""
    from fastgate.pruning.targets import check_target, meet_target  # they work on the decisions of this module

    total = getattr(costs, "total", None) if total is None else total
    if total is None:
        raise ValueError(
            "total: expected what the whole network costs, of which the target is a share, got costs that do not say "
            "it; use fastgate.gate_costs(model, inputs) as it is, or pass total=fastgate.macs(model, inputs)"
        )
    check_target(costs, target, total, round_to)
    return partial(meet_target, costs=costs, target=target, total=total, round_to=round_to)


def _inputs_of(batch: Any, forward: Forward | None) -> Any:
    return batch[0] if forward is None and isinstance(batch, tuple | list) else batch


def _ask(
    model: nn.Module, gates: Mapping[str, Gate], batches: Iterable[Any], threshold: float, forward: Forward | None
) -> Decisions:
    device = next(model.parameters()).device
    opened = {name: torch.zeros(gate.gates, dtype=torch.float64, device=device) for name, gate in gates.items()}
    rows = dict.fromkeys(gates, 0)
    samples = 0
    with torch.no_grad(), eval_mode(model), torch.compiler.set_stance("force_eager"), _collected(gates) as calls:
        for batch in batches:
            inputs = _inputs_of(batch, forward)
            call(model, to_device_of(model, inputs), forward)
            if any(module.training for module in model.modules()):
                raise RuntimeError(
                    "model: expected its eval mode while its gates are asked, got training mode, which its code or "
                    "another thread has set meanwhile; ask a copy of it"
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
                f"gate {name!r}: expected logits that are numbers, got nan for some samples; look for nan and "
                "infinities in the images, in the weights, and in features of half precision"
            )
        decided[name] = GateDecision(mean, mean > threshold, rows[name])
    return Decisions(decided, threshold, samples)


@contextmanager
def _collected(gates: Mapping[str, Gate]) -> Iterator[dict[str, list[Tensor]]]:
    """The results of all calls of these gates that this thread makes, by name, as they come."""
    calls: dict[str, list[Tensor]] = {name: [] for name in gates}
    asker = threading.get_ident()

    def collect(name: str, called: nn.Module, output: Tensor) -> None:
        # replicas of nn.DataParallel are called from threads of their own; the gate itself by whoever else uses it
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
    """The decisions over the samples of all processes, from those over each one's own."""
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
    """Store the decisions in the model's gates, in place, and return the model: no gate runs its head any more.

    Raises:
        ValueError: decisions of another network (other gate names or sizes); the model is then left as it was.
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
