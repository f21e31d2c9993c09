"""The comparison itself can fail: on what a kernel forgot to write, and on errors larger than the dtype's."""

import pytest
import torch

from tests.kernels.compare import assert_close_to_oracle, poisoned_memory


def test_what_was_not_written_shows() -> None:
    exact = {"y": torch.ones(3, dtype=torch.float64)}
    with poisoned_memory():
        y = torch.empty(3)
        y[:2] = 1.0
        fully = torch.empty_like(y).fill_(1.0)
        assert torch.isnan(y.new_empty(2)).all()
    assert_close_to_oracle({"y": fully}, {"y": torch.ones(3)}, exact)
    with pytest.raises(AssertionError, match="'y', nan"):
        assert_close_to_oracle({"y": y}, {"y": torch.ones(3)}, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_errors_beyond_the_dtype_show(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    exact = {"y": torch.ones(3, dtype=torch.float64)}
    plain = {"y": torch.ones(3, dtype=dtype)}
    assert_close_to_oracle({"y": plain["y"] + 4 * eps}, plain, exact)
    with pytest.raises(AssertionError, match="error, allowed"):
        assert_close_to_oracle({"y": plain["y"] + 6 * eps}, plain, exact)
