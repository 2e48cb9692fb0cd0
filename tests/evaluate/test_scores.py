"""Perplexity, divergence and agreement against a few lines of numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from quarkconv.evaluate.scores import Distributions, TokenScores

N, V = 50, 17


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    baseline = torch.randn(N, V, generator=generator) * 3
    return baseline, baseline + torch.randn(N, V, generator=generator) * 0.3, torch.randint(0, V, (N,))


@pytest.mark.parametrize("block", [N, 7, 1])
def test_scores_equal_numpy_whatever_the_size_of_a_block(
    logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor], block: int
) -> None:
    baseline, other, targets = logits
    scores = TokenScores()
    for start in range(0, N, block):
        part = slice(start, start + block)
        scores.add(other[part], targets[part], Distributions.of(baseline[part]))
    p, q = (log_softmax(tensor.double().numpy()) for tensor in (baseline, other))
    at = (np.arange(N), targets.numpy())
    nll = -q[at]
    kl = (np.exp(p) * (p - q)).sum(-1)
    perplexity, found = scores.perplexity(), scores.divergence()
    assert found is not None
    # Log-probabilities are computed in float32: an ulp of values of about 10 is 1e-6.
    assert perplexity.value == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert perplexity.standard_error == pytest.approx(math.exp(nll.mean()) * nll.std() / math.sqrt(N - 1), rel=1e-5)
    assert found.mean == pytest.approx(kl.mean(), rel=1e-4)
    assert found.max == pytest.approx(kl.max(), rel=1e-4)
    assert found.median == pytest.approx(np.sort(kl)[N // 2], rel=1e-3)
    assert found.p99 == pytest.approx(np.sort(kl)[int(0.99 * N)], rel=1e-3)
    assert found.top1 == (p.argmax(-1) == q.argmax(-1)).mean()
    assert found.rms_dp == pytest.approx(np.sqrt(((np.exp(q[at]) - np.exp(p[at])) ** 2).mean()), rel=1e-4)


def test_a_model_does_not_diverge_from_itself(logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    baseline, _, targets = logits
    scores = TokenScores()
    scores.add(baseline, targets, Distributions.of(baseline))
    found = scores.divergence()
    assert found is not None
    assert (found.mean, found.max, found.top1, found.rms_dp) == (0.0, 0.0, 1.0, 0.0)


def test_a_token_of_probability_zero_adds_nothing() -> None:
    scores = TokenScores()
    baseline = torch.tensor([[0.0, 0.0, -math.inf]])
    scores.add(torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([0]), Distributions.of(baseline))
    found = scores.divergence()
    assert found is not None
    assert found.mean == pytest.approx(math.log(1.5), rel=1e-6)


def test_without_a_baseline_there_is_no_divergence() -> None:
    scores = TokenScores()
    scores.add(torch.zeros(2, 4), torch.tensor([0, 1]))
    assert scores.divergence() is None
    assert scores.perplexity().value == pytest.approx(4.0)
