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


@dataclass(frozen=True, slots=True)
class Distributions:
    """Distributions of the unquantized model, computed once for all that are compared with them.

    Attributes:
        log_p, p: log-probabilities and probabilities, float32 [n, V].
        top: the most probable token, int64 [n].
    """

    log_p: Tensor
    p: Tensor
    top: Tensor

    @staticmethod
    def of(logits: Tensor) -> Distributions:
        """Those of logits, [n, V]."""
        log_p = logits.float().log_softmax(-1)
        return Distributions(log_p, log_p.exp(), logits.argmax(-1))


@dataclass(slots=True)
class TokenScores:
    """Scores of single tokens of one model, collected block by block on its device; float64 in the end."""

    nll: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    same_top: list[Tensor] = field(default_factory=list)
    dp: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, targets: Tensor, baseline: Distributions | None = None) -> None:
        """Score one block.

        Args:
            logits: floats [n, V].
            targets: the tokens that follow, int64 [n].
            baseline: of the unquantized model.
        """
        log_q = logits.float().log_softmax(-1)
        own = log_q.gather(-1, targets[:, None]).squeeze(-1)
        self.nll.append(-own.double())
        if baseline is None:
            return
        # p log(p / q) is 0 where p is 0, also where q is.
        terms = torch.where(baseline.p > 0, baseline.p * (baseline.log_p - log_q), 0.0)
        self.kl.append(terms.double().sum(-1))
        self.same_top.append(logits.argmax(-1) == baseline.top)
        right = baseline.log_p.gather(-1, targets[:, None]).squeeze(-1)
        self.dp.append(own.double().exp() - right.double().exp())

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
