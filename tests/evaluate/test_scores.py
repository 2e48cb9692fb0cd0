"""Perplexity, divergence and agreement against a few lines of numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from quarkconv.evaluate import rows
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
        scores.add(Distributions(other[part]), targets[part], Distributions(baseline[part]))
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
    scores.add(Distributions(baseline), targets, Distributions(baseline))
    found = scores.divergence()
    assert found is not None
    assert (found.mean, found.max, found.top1, found.rms_dp) == (0.0, 0.0, 1.0, 0.0)


def test_a_token_of_probability_zero_adds_nothing() -> None:
    scores = TokenScores()
    baseline = torch.tensor([[0.0, 0.0, -math.inf]])
    scores.add(Distributions(torch.zeros(1, 3)), torch.tensor([0]), Distributions(baseline))
    found = scores.divergence()
    assert found is not None
    assert found.mean == pytest.approx(math.log(1.5), rel=1e-6)


def test_without_a_baseline_there_is_no_divergence() -> None:
    scores = TokenScores()
    scores.add(Distributions(torch.zeros(2, 4)), torch.tensor([0, 1]))
    assert scores.divergence() is None
    assert scores.perplexity().value == pytest.approx(4.0)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, for lanes that `where` drops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels_of_rows_equal_float64(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of exponentials in float32: an ulp of each, 6e-8."""
    if device == "interpreter":
        if torch.cuda.is_available():
            pytest.skip("kernels are compiled where there is a GPU")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(rows, "_BLOCK", 64)
    generator = torch.Generator().manual_seed(7)
    p = (torch.randn(5, 333, generator=generator) * 4).to(dtype)
    q = (p.float() + torch.randn(p.shape, generator=generator) * 0.3).to(dtype)
    p[:, 7] = -math.inf
    p[0, 100:110] = p[0].max() + 1  # a tie: the first place counts
    at = "cpu" if device == "interpreter" else device
    p, q = p.to(at), q.to(at)
    (p_sum, p_top), (q_sum, q_top) = rows.row_statistics(p), rows.row_statistics(q)
    found = rows.row_divergence(p, p_sum, q, q_sum)
    p, q = p.double(), q.double()
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    assert torch.allclose(p_sum, p.logsumexp(-1), rtol=1e-7, atol=1e-6)
    assert torch.allclose(q_sum, q.logsumexp(-1), rtol=1e-7, atol=1e-6)
    assert p_top.tolist() == [row.index(max(row)) for row in p.tolist()]
    assert q_top.tolist() == [row.index(max(row)) for row in q.tolist()]
    expected = torch.where(log_p > -math.inf, log_p.exp() * (log_p - log_q), 0.0).sum(-1)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)
