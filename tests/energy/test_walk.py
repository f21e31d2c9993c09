"""Some hundred windows of a random walk over all faults; `python -m tests.energy.walk 10000` walks further."""

import pytest

from tests.energy.fake import Fake
from tests.energy.walk import walk

KINDS = ["boards", "no counter", "package"]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_wrong_without_a_word(fake: Fake, kind: str) -> None:
    verdicts = walk(fake, 0, 150, kind)
    assert not [verdict for verdict in verdicts if verdict.startswith("WRONG")], verdicts
    # faults have been noticed, and what was not at fault is known
    assert verdicts["unknown, and why"] >= 10 and verdicts["right"] + verdicts["right, warned"] >= 50, verdicts


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_is_at_fault_all_but_the_shortest_is_known(fake: Fake, kind: str) -> None:
    verdicts = walk(fake, 0, 100, kind, faults=0, steady=False)
    assert verdicts.keys() <= {"right", "right, warned", "unknown, and why"}
    assert verdicts["right"] >= 50 and verdicts["unknown, and why"] <= 10, verdicts
