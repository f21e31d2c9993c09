from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastgate.ops.synchronization import _BatchNorm


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_second_derivative_is_an_error_and_no_zero() -> None:
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    y = _BatchNorm.apply(x, None, None, None, None, 0.1, 1e-5)
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True))
    # the gradient that arrives is a constant: it is x that the result depends on
    (gradient,) = torch.autograd.grad(
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="over several processes have no second derivative; train on one process"):
        gradient.pow(2).sum().backward()
