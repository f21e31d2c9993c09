"""Flips bits in the files of a run and loads them: a damaged file must be rejected, or load as before.

    python bench/bitflips.py [--flips 1000]

The outcome of a flip is "refused" (a ValueError), "same" (loaded as written: the flip hit bits without meaning, such as
the padding in a zip archive), "other" (loaded as something else) or "failed" (any other exception). Half of the flips
are anywhere in the file, a quarter each in its first and last 4 KiB, which hold the structure. The result is
bench/results/files/bitflips.json.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastgate as fg
from bench.machine import describe_machine
from fastgate.digests import digest
from fastgate.pruning.storage import read_metadata
from fastgate.training.checkpoint import load_checkpoint
from fastgate.training.trainer import Trainer

RESULT = Path(__file__).parent / "results" / "files" / "bitflips.json"
OUTCOMES = ("refused", "same", "other", "failed")
_EDGE = 4096


def read_network(path: Path) -> str:
    model = fg.load(path)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    return digest([repr(model), model.state_dict(), frozen, read_metadata(path)])


def read_checkpoint(path: Path) -> str:
    return digest(load_checkpoint(path))


def read_decisions(path: Path) -> str:
    return fg.Decisions.from_json(path).to_json()


KINDS: dict[str, Callable[[Path], str]] = {
    "model.safetensors": read_network,
    "checkpoint.pt": read_checkpoint,
    "decisions.json": read_decisions,
}


def write_files(folder: Path) -> dict[str, Path]:
    """The three files of a short run on noise: a channel-gated ResNet-8, two epochs."""
    torch.manual_seed(0)
    model = fg.models.resnet(8, gating="channel", init_logit=None)
    optimizer = torch.optim.SGD(fg.parameter_groups(model), lr=0.1, momentum=0.9)
    search = fg.GateSearch(model, (3, 8, 8), optimizer, epochs=2, config=fg.SearchConfig(settle_at=None))
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(0, 10, (8,))) for _ in range(3)]
    Trainer(model, optimizer, batches, nn.CrossEntropyLoss(), epochs=2, search=search, folder=folder).fit()
    decisions = search.decide(batches)
    decisions.to_json(folder / "decisions.json")
    fg.save(search.compact(batches), folder / "model.safetensors", metadata={"dataset": "noise"})
    return {name: folder / name for name in KINDS}


def count_outcomes(path: Path, flips: int, seed: int) -> dict[str, int]:
    """Outcomes of loading the file after each of `flips` single-bit flips, with the file restored in between."""
    read, data = KINDS[path.name], path.read_bytes()
    wanted, chance = read(path), random.Random(seed)
    found: Counter[str] = Counter()
    for i in range(flips):
        edge = min(_EDGE, len(data))
        at = [
            chance.randrange(len(data)), chance.randrange(edge),
            chance.randrange(len(data)), len(data) - 1 - chance.randrange(edge),
        ][i % 4]  # fmt: skip
        damaged = bytearray(data)
        damaged[at] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        found[_outcome(read, path, wanted)] += 1
    path.write_bytes(data)
    return {outcome: found[outcome] for outcome in OUTCOMES}


def _outcome(read: Callable[[Path], str], path: Path, wanted: str) -> str:
    try:
        return "same" if read(path) == wanted else "other"
    except ValueError:
        return "refused"
    except Exception:  # counted as a failure
        return "failed"


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000, help="number of flips, over the three files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    files: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, path) in enumerate(write_files(Path(folder)).items()):
            flips = options.flips // len(KINDS) + (i < options.flips % len(KINDS))
            files[name] = {"bytes": path.stat().st_size, "flips": flips, **count_outcomes(path, flips, options.seed)}
            print(name, files[name])
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    result = {"seed": options.seed, "files": files, "environment": describe_machine()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
