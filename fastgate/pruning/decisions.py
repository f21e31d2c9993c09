"""Static decisions from per-sample gates: one evaluation pass, one open or closed per gate (channel)."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgate import processes
from fastgate.files import write_atomically
from fastgate.gates import Gate, named_gates
from fastgate.modes import eval_mode
from fastgate.values import Forward, call, to_device_of

FORMAT = "fastgate-decisions"
VERSION = 1


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
        text = json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "threshold": self.threshold,
                "samples": self.samples,
                "gates": {
                    name: {"mean": g.mean.tolist(), "open": g.open.tolist(), "rows": g.rows} for name, g in self.items()
                },
            }
        )
        if path is not None:
            write_atomically(path, text)
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> "Decisions":
        """Read what :meth:`to_json` wrote, from its text or from a file.

        Raises:
            FileNotFoundError: a path where no file is.
            ValueError: the text is not such a document.
        """
        is_text = isinstance(source, str) and source.lstrip()[:1] in ("", "{", "[")
        where = "a text" if is_text else str(source)
        if not is_text and not Path(source).is_file():
            raise FileNotFoundError(f"{where}: expected a file written by Decisions.to_json, found none")
        try:
            text = str(source) if is_text else Path(source).read_text()
            data: Any = json.loads(text)
            if data.get("format") != FORMAT or data.get("version") != VERSION:
                raise ValueError(f"format {data.get('format')!r} version {data.get('version')!r}")
            gates = {
                name: GateDecision(
                    torch.tensor(g["mean"], dtype=torch.float64),
                    torch.tensor(g["open"]).bool(),
                    int(g.get("rows", data["samples"])),  # earlier versions counted samples alone
                )
                for name, g in data["gates"].items()
            }
            if odd := [name for name, g in gates.items() if g.mean.dim() != 1 or g.mean.shape != g.open.shape]:
                raise ValueError(f"means and decisions of different lengths at {odd[0]!r}")
            return cls(gates, float(data["threshold"]), int(data["samples"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"decisions: expected JSON of format {FORMAT!r} version {VERSION}, got {where} with {error}; "
                "write it with Decisions.to_json"
            ) from error


def decide(
    model: nn.Module, loader: Iterable[Any], threshold: float = 0.5, *, forward: Forward | None = None
) -> Decisions:
    """Ask every gate about every sample, in one evaluation pass, and open those whose mean exceeds `threshold`.

    The mean is over what the gate decided on: every call in a forward and every row of each. A compiled network runs
    eagerly for that.

    Args:
        model: a network with gates; its training mode is restored afterwards.
        loader: batches, moved to the model's device: the inputs, or a tuple or list whose first item is the inputs. A
            mapping is passed as keyword arguments, labels and all; a plain tuple as positional ones; anything else,
            such as a list of images, as the only argument.
        threshold: between 0 and 1.
        forward: `(model, batch) -> anything`, for networks that are called otherwise; it gets the whole batch.

    Raises:
        ValueError: no gates, no samples, a gate that did not run or whose logits are nan, a threshold outside 0 to
            1.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number between 0 and 1, got {threshold}")
    gates = dict(named_gates(model))
    if not gates:
        raise ValueError("model: expected gates, got none; add them with fastgate.attach(model, 'layer')")
    device = next(model.parameters()).device
    opened = {name: torch.zeros(gate.gates, dtype=torch.float64, device=device) for name, gate in gates.items()}
    rows = dict.fromkeys(gates, 0)
    samples = 0
    with torch.no_grad(), eval_mode(model), torch.compiler.set_stance("force_eager"), _collected(gates) as calls:
        for batch in loader:
            inputs = batch[0] if forward is None and isinstance(batch, tuple | list) else batch
            call(model, to_device_of(model, inputs), forward)
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
    """The results of all calls of these gates, by name, as they come."""
    calls: dict[str, list[Tensor]] = {name: [] for name in gates}
    handles = [
        # append: the replicas of nn.DataParallel call it from several threads
        gate.register_forward_hook(lambda _, inputs, output, found=calls[name]: found.append(output))
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
