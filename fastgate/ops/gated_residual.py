"""The gated residual: y = relu(shortcut + gate * branch)."""

import torch
from torch import Tensor


def gated_residual_torch(shortcut: Tensor, branch: Tensor, gate: Tensor, relu: bool) -> Tensor:
    """The plain-PyTorch meaning of :func:`fastgate.functional.gated_residual`, `gate` already [N, 1 or C, 1, 1]."""
    y = shortcut + gate * branch
    return torch.relu(y) if relu else y
