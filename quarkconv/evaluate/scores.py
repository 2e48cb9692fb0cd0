"""Logits -> perplexity, KL divergence and agreement, a block of tokens at a time.

Definitions follow llama.cpp's ``llama-perplexity --kl-divergence`` (tools/perplexity/perplexity.cpp), in natural
logarithms. For scored tokens i = 1..n with the model's log-probabilities log p:

    perplexity      exp(m),  m = -mean log p(token i)
    standard error  perplexity * sqrt(variance of -log p(token i) / (n - 1))
    KL divergence   sum over the vocabulary of P (log P - log Q), P of the unquantized model, Q of the other
    top-1           share of tokens for which both models' largest logits are at the same place
    RMS of dp       sqrt(mean (q(token i) - p(token i))^2)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Final

import torch
from torch import Tensor

QUANTILES: Final = {"median": 0.5, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Perplexity:
    """A perplexity and its standard error."""

    value: float
    standard_error: float

    def to_json(self) -> dict[str, float]:
        """The fields of the contract."""
        return {"value": self.value, "standard_error": self.standard_error}


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far one model's distributions are from the unquantized model's.

    Attributes:
        mean, median, p99, max: KL divergence in nats.
        standard_error: of the mean.
        top1: share of tokens with the same most probable token, 0 to 1.
        rms_dp: root mean square of the difference of the right token's probability, 0 to 1.
    """

    mean: float
    median: float
    p99: float
    max: float
    standard_error: float
    top1: float
    rms_dp: float


class Distributions:
    """Distributions over the vocabulary. On a GPU probabilities are never written.

    Args:
        logits: floats [n, V].

    Attributes:
        logits: the same.
        top: the most probable token, integers [n].
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        if logits.is_cuda:
            from quarkconv.evaluate.rows import row_statistics

            self._log_sum, self.top = row_statistics(logits)
        else:
            self._log_p, self.top = logits.float().log_softmax(-1), logits.argmax(-1)

    def log_probabilities(self, tokens: Tensor) -> Tensor:
        """Of one token each, int64 [n] -> float64 [n]."""
        if self.logits.is_cuda:
            return self.logits.gather(-1, tokens[:, None]).squeeze(-1).double() - self._log_sum
        return self._log_p.gather(-1, tokens[:, None]).squeeze(-1).double()

    def divergence(self, other: Distributions) -> Tensor:
        """KL divergence of ``other`` from these, float64 [n]."""
        if self.logits.is_cuda:
            from quarkconv.evaluate.rows import row_divergence

            return row_divergence(self.logits, self._log_sum, other.logits, other._log_sum)
        p = self._log_p.exp()
        # p log(p / q) is 0 where p is 0, also where q is.
        return torch.where(p > 0, p * (self._log_p - other._log_p), 0.0).double().sum(-1)


@dataclass(slots=True)
class TokenScores:
    """Scores of single tokens of one model, collected block by block on its device; float64 in the end."""

    nll: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    same_top: list[Tensor] = field(default_factory=list)
    dp: list[Tensor] = field(default_factory=list)

    def add(self, found: Distributions, targets: Tensor, baseline: Distributions | None = None) -> None:
        """Score one block.

        Args:
            found: of the model.
            targets: the tokens that follow, int64 [n].
            baseline: of the unquantized model.
        """
        own = found.log_probabilities(targets)
        self.nll.append(-own)
        if baseline is None:
            return
        self.kl.append(baseline.divergence(found))
        self.same_top.append(found.top == baseline.top)
        self.dp.append(own.exp() - baseline.log_probabilities(targets).exp())

    def extend(self, other: TokenScores) -> None:
        """Add the scores of other tokens, on the CPU."""
        for item in fields(self):
            getattr(self, item.name).extend(tensor.cpu() for tensor in getattr(other, item.name))

    def perplexity(self) -> Perplexity:
        """Perplexity over all blocks."""
        nll = torch.cat(self.nll)
        value = math.exp(min(nll.mean().item(), 700.0))
        error = math.sqrt(nll.var(correction=0).item() / max(len(nll) - 1, 1))
        return Perplexity(value, value * error)

    def divergence(self) -> Divergence | None:
        """Divergence over all blocks; None without a baseline."""
        if not self.kl:
            return None
        kl, dp = torch.cat(self.kl), torch.cat(self.dp)
        ordered = kl.sort().values
        at = {name: ordered[min(int(share * len(kl)), len(kl) - 1)].item() for name, share in QUANTILES.items()}
        return Divergence(
            mean=kl.mean().item(),
            median=at["median"],
            p99=at["p99"],
            max=ordered[-1].item(),
            standard_error=math.sqrt(kl.var(correction=0).item() / max(len(kl) - 1, 1)),
            top1=torch.cat(self.same_top).double().mean().item(),
            rms_dp=dp.square().mean().sqrt().item(),
        )
