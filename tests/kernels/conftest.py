"""On a GPU fp32 is fp32: PyTorch's convolutions, which the kernels are compared with, would else be TF32."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def ieee() -> Iterator[None]:
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    yield
    conv.fp32_precision = before
