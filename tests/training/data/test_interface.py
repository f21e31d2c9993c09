import pytest

from fastgate.training.data.interface import Batching


@pytest.mark.parametrize("full", [False, True])
def test_batches_that_cannot_be_dealt_out_are_refused(full: bool) -> None:
    assert [part.stop - part.start for part in Batching(10, 4, (1, 2), full).parts()] == ([2, 2] if full else [4])
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        Batching(10, 0, full=full)
    for shard in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=r"shard: expected \(index of a process, number of processes\)"):
            Batching(10, 4, shard, full)
