"""A search under `DistributedDataParallel` and accelerate: the processes end with the same network."""

import json
import os
from pathlib import Path

import pytest

from tests.integrations import loops
from tests.training.runs import run_parallel


@pytest.mark.parametrize("gating", ["channel", pytest.param("layer", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", list(loops.KINDS))
def test_two_processes_end_with_the_same_network(kind: str, gating: str, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    result = run_parallel(2, "-m", "tests.integrations.loops", f"{kind}-{gating}", file)
    assert result.returncode == 0, result.stderr
    found = json.loads(file.read_text())
    assert found["processes"] == 2 and found["same"]
    # of layers, whole blocks of three; of channels within 1 % of the network
    assert found["macs"] == pytest.approx(0.5, abs=0.2 if gating == "layer" else 0.01)
    assert len(found["stale"]) == (2 if kind == "own" else 0)
    assert all(
        "created before the network was pruned" in said and "wrap the network again" in said for said in found["stale"]
    )


def test_accelerate_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, in this one."""
    from tests.votes import cast_votes

    cast_votes(monkeypatch.setattr)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        assert name not in os.environ
    found = loops.accelerated("channel")
    assert (found["processes"], found["same"]) == (1, True) and found["macs"] == pytest.approx(0.5, abs=0.01)
