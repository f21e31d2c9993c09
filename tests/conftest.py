import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# without a GPU, Triton interprets the kernels; it looks at this when they are first imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# one thread, unless OMP_NUM_THREADS says otherwise: the suite runs in several worker processes. What they start has as
# many, for sums are split among them: only then two runs are the same bit by bit
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

# no deadline: the first call of an operation is much slower than the next;
# derandomized: CI and a developer see the same examples
settings.register_profile("fastgate", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("fastgate")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False"))


@pytest.fixture
def ieee() -> Iterator[None]:
    """On a GPU fp32 convolutions are fp32, PyTorch's too, which would else be TF32."""
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    yield
    conv.fp32_precision = before


@pytest.fixture(autouse=True)
def same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts from the same seed, without a developer's FASTGATE_IMPL, and measures no kernels."""
    torch.manual_seed(0)
    monkeypatch.delenv("FASTGATE_IMPL", raising=False)
    monkeypatch.setenv("FASTGATE_TUNE", "off")
