import math

import pytest
import torch
from torch import Tensor

import fastgate as fg
from fastgate import estimators
from fastgate.estimators import bernoulli, estimate, gumbel, mean_threshold, straight_through

SAMPLES = 20_000
LOGITS = (-2.0, -0.5, 0.0, 0.5, 2.0)


def sampled(name: str, logit: float, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Decisions and their gradients for many samples of one logit, in training."""
    logits = torch.full((SAMPLES,), logit, dtype=torch.float64).requires_grad_()
    decisions = estimate(name, logits, window="identity", temperature=temperature, training=True)
    (gradient,) = torch.autograd.grad(decisions.sum(), logits)
    return decisions.detach(), gradient


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", estimators.ESTIMATORS)
def test_values_are_exactly_0_or_1_in_the_logits_dtype(name: str, dtype: torch.dtype, training: bool) -> None:
    logits = (3 * torch.randn(64, 5)).to(dtype)
    decisions = estimate(name, logits, window="clipped", temperature=0.7, training=training)
    assert decisions.dtype == dtype and decisions.shape == logits.shape
    assert set(decisions.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("name", ["straight_through", "gumbel", "bernoulli"])
def test_evaluation_is_the_threshold_without_noise(name: str) -> None:
    logits = torch.tensor([-9.0, -1e-6, 0.0, 1e-6, 9.0])
    for _ in range(5):
        decisions = estimate(name, logits, window="clipped", temperature=1.0, training=False)
        assert decisions.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("window", ["clipped", "restoring", "identity"])
def test_straight_through_gradient(window: str) -> None:
    logits = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64).requires_grad_()
    wanted = {
        "clipped": {1.0: [0, 1, 1, 1, 0], -1.0: [0, -1, -1, -1, 0]},
        "restoring": {1.0: [0, 1, 1, 1, 1], -1.0: [-1, -1, -1, -1, 0]},
        "identity": {1.0: [1, 1, 1, 1, 1], -1.0: [-1, -1, -1, -1, -1]},
    }[window]
    for sign, gradient in wanted.items():
        (got,) = torch.autograd.grad(straight_through(logits, window).sum() * sign, logits)
        assert got.tolist() == gradient


def test_straight_through_defaults_to_the_papers_window() -> None:
    logits = torch.tensor([3.0]).requires_grad_()
    (gradient,) = torch.autograd.grad(straight_through(logits).sum(), logits)
    assert gradient.item() == 0


@pytest.mark.parametrize("name", ["gumbel", "bernoulli"])
@pytest.mark.parametrize("logit", LOGITS)
def test_opens_with_probability_sigmoid_of_the_logit(name: str, logit: float) -> None:
    decisions, _ = sampled(name, logit)
    probability = 1 / (1 + math.exp(-logit))
    # five standard deviations of a binomial mean; the seed is fixed, so this either holds or does not
    bound = 5 * math.sqrt(probability * (1 - probability) / SAMPLES)
    assert abs(decisions.mean().item() - probability) < bound


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("logit", [-0.5, 1.0])
def test_gumbel_gradient_is_that_of_the_soft_gate_under_logistic_noise(logit: float, temperature: float) -> None:
    """With s = sigmoid((logit + noise) / t) the gradient is s (1 - s) / t.

    Decision and gradient together give s back, and s the noise, whose distribution must be the logistic one: that of
    the difference of two Gumbel variables.
    """
    decisions, gradient = sampled("gumbel", logit, temperature)
    product = gradient * temperature
    assert (product > 0).all() and (product <= 0.25).all()
    root = torch.sqrt(torch.clamp(0.25 - product, min=0))
    soft = torch.where(decisions == 1, 0.5 + root, 0.5 - root)
    noise = temperature * torch.log(soft / (1 - soft)) - logit
    expected = torch.sigmoid(noise.sort().values)
    distance = (expected - torch.arange(1, SAMPLES + 1) / SAMPLES).abs().max().item()
    # Kolmogorov-Smirnov: a distance above sqrt(ln(2 / alpha) / (2 n)) has probability alpha = 1e-6 at most
    assert distance < math.sqrt(math.log(2e6) / (2 * SAMPLES)) + 1 / SAMPLES


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gumbel_gradient_in_evaluation(temperature: float) -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(gumbel(logits, temperature, training=False).sum(), logits)
    for logit, got in zip(LOGITS, gradient.tolist(), strict=True):
        soft = 1 / (1 + math.exp(-logit / temperature))
        assert got == pytest.approx(soft * (1 - soft) / temperature, rel=1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_bernoulli_gradient_is_that_of_the_probability(training: bool) -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(bernoulli(logits, training).sum(), logits)
    for logit, got in zip(LOGITS, gradient.tolist(), strict=True):
        probability = 1 / (1 + math.exp(-logit))
        assert got == pytest.approx(probability * (1 - probability), rel=1e-12)


@pytest.mark.parametrize("name", ["gumbel", "bernoulli"])
def test_samples_are_independent_over_the_batch(name: str) -> None:
    decisions, _ = sampled(name, 0.0)
    pairs = (decisions[:-1] * decisions[1:]).mean().item()
    # neighbours both open: 1/4, five standard deviations sqrt(5/16 / n) (neighbouring pairs share a sample)
    assert abs(pairs - 0.25) < 5 * math.sqrt(5 / 16 / SAMPLES)


def test_mean_threshold_compares_with_the_mean_over_the_batch() -> None:
    logits = torch.tensor([[1.0, -4.0], [2.0, -2.0], [6.0, -3.0]], dtype=torch.float64).requires_grad_()
    decisions = mean_threshold(logits, "clipped")  # the means are 3 and -3; -3 itself is not above
    assert decisions.tolist() == [[0, 0], [0, 1], [1, 0]]
    # the gradient passes where |logit - mean| <= 1, and the mean is a constant
    (gradient,) = torch.autograd.grad((decisions * torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])).sum(), logits)
    assert gradient.tolist() == [[0, 2], [3, 4], [0, 6]]


@pytest.mark.parametrize("window", ["clipped", "identity"])
def test_estimate_passes_the_window_on(window: str) -> None:
    logits = torch.tensor([-5.0, 5.0], requires_grad=True)
    for name in ("straight_through", "mean_threshold"):
        decisions = estimate(name, logits, window=window, temperature=1.0, training=True)
        (gradient,) = torch.autograd.grad(decisions.sum(), logits)
        assert gradient.tolist() == ([1, 1] if window == "identity" else [0, 0])


@pytest.mark.parametrize("temperature", [0, -1.0])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature: expected a positive number, got {temperature}"):
        gumbel(torch.zeros(2), temperature)
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        fg.LayerGate(3, estimator="gumbel", temperature=temperature)


def test_unknown_names_list_the_known_ones() -> None:
    known = "straight_through, gumbel, bernoulli, mean_threshold"
    with pytest.raises(ValueError, match=f"estimator: expected one of {known}, got 'softmax'"):
        estimators.check_estimator("softmax")
    with pytest.raises(ValueError, match=f"estimator: expected one of {known}, got 'ste'"):
        estimate("ste", torch.zeros(2), window="clipped", temperature=1.0, training=True)
    with pytest.raises(ValueError, match="window: expected one of clipped, restoring, identity, got 'hard'"):
        straight_through(torch.zeros(2), "hard")
