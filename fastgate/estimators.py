"""Estimators that turn logits into binary decisions, each with its own gradient.

Every estimator takes logits of any shape (batch first) and returns 0./1. of the same shape and dtype, differentiable.
`straight_through` is the paper's; `gumbel` its comparison in Tables 3 and 4; `bernoulli` and `mean_threshold` are two
interpretations of Table 4's third row, for ablations only.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastgate.ops.gate_head import StraightThrough, check_window
from fastgate.ops.synchronization import all_mean, rand_like


def straight_through(logits: Tensor, window: str = "clipped") -> Tensor:
    """1 where logit > 0, else 0 (Eq. 4); `window` says where the gradient passes (Eq. 5).

    The windows are those of :func:`fastgate.functional.gate_head`.
    """
    decisions: Tensor = StraightThrough.apply(logits, check_window(window))
    return decisions


def _hard_with_soft_gradient(hard: Tensor, soft: Tensor) -> Tensor:
    # soft - soft is exactly 0, so the value stays exactly 0 or 1 (hard - soft + soft would round)
    return hard.to(soft.dtype) + (soft - soft.detach())


def gumbel(logits: Tensor, temperature: float = 1.0, training: bool = True) -> Tensor:
    """Binary Gumbel-softmax with one logit (Jang et al., 2016; https://arxiv.org/abs/1611.01144).

    Training: soft = sigmoid((logit + g1 - g2) / temperature) with g1, g2 ~ Gumbel(0, 1); the value is 1 where
    soft > 0.5, and the gradient is that of soft. Evaluation: 1 where logit > 0, without noise.
    """
    if temperature <= 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    noise = torch.zeros_like(logits)
    if training:
        # g1 - g2 is logistic: log(u) - log(1 - u); the clamp keeps both logarithms finite
        u = rand_like(logits).clamp(torch.finfo(logits.dtype).tiny, 1 - torch.finfo(logits.dtype).eps)
        noise = u.log() - torch.log1p(-u)
    soft = torch.sigmoid((logits + noise) / temperature)
    return _hard_with_soft_gradient(logits + noise > 0, soft)


def bernoulli(logits: Tensor, training: bool = True) -> Tensor:
    """Sample 1 with probability sigmoid(logit); the gradient is that of the probability.

    Evaluation: 1 where logit > 0, without sampling.
    """
    probability = torch.sigmoid(logits)
    hard = rand_like(probability) < probability if training else logits > 0
    return _hard_with_soft_gradient(hard, probability)


def mean_threshold(logits: Tensor, window: str = "clipped") -> Tensor:
    """1 where the logit exceeds its mean over the batch (section 5.4 read literally); straight-through gradient.

    A sample's decision depends on the other samples, in evaluation too: use it for ablations, not for pruning. The
    mean is treated as a constant in backward.
    """
    return straight_through(logits - all_mean(logits.mean(0, keepdim=True).detach()), window)


ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "straight_through": straight_through,
    "gumbel": gumbel,
    "bernoulli": bernoulli,
    "mean_threshold": mean_threshold,
}


def check_estimator(name: str) -> str:
    """Return `name` if it is a known estimator; otherwise raise a `ValueError` that lists them."""
    if name not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {name!r}")
    return name


def estimate(name: str, logits: Tensor, *, window: str, temperature: float, training: bool) -> Tensor:
    """Apply the estimator called `name` with the options that it accepts."""
    if name == "gumbel":
        return gumbel(logits, temperature, training)
    if name == "bernoulli":
        return bernoulli(logits, training)
    return ESTIMATORS[check_estimator(name)](logits, window)
