"""Hidden states after the last layer -> scores of the tokens of the second half of each window."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quarkconv.evaluate.forward import final_logits, not_finite
from quarkconv.evaluate.hidden_states import LayerOutput
from quarkconv.evaluate.memory import block_logits
from quarkconv.evaluate.scores import Distributions, TokenScores
from quarkconv.evaluate.skeleton import Skeleton
from quarkconv.evaluate.streams import LayerRunner
from quarkconv.evaluate.windows import Windows


def batch_scores(
    runner: LayerRunner, tokens: Windows, windows: slice, outputs: Mapping[str, LayerOutput]
) -> dict[str, TokenScores]:
    """The scores of a batch on its device, computed in blocks of windows, or of parts of a window.

    Args:
        runner: both models.
        tokens: all windows.
        windows: those of the batch.
        outputs: variant -> output of the last layer; the baseline is one of them.
    """
    device, vocabulary = runner.quantized.skeleton.device, runner.quantized.skeleton.vocabulary
    found = {name: TokenScores() for name in outputs}
    scored, own = torch.tensor(list(tokens.scored), device=device), tokens.ids[windows].to(device)
    rows = max(1, block_logits(device) // vocabulary)
    count = max(1, rows // len(scored))
    count = -(-len(own) // -(-len(own) // count))  # blocks of about the same size
    skeletons = {name: runner.model_of(name).skeleton for name in outputs}
    states = {name: output.states.to(device) for name, output in outputs.items()}
    for ids, *parts in zip(
        torch.split(own, count), *(torch.split(item, count) for item in states.values()), strict=True
    ):
        part = dict(zip(states, parts, strict=True))
        for positions in torch.split(scored, rows):
            targets = ids[:, positions + 1].reshape(-1)

            def distributions(
                name: str, ids: Tensor = ids, part: Mapping[str, Tensor] = part, at: Tensor = positions
            ) -> Distributions:
                return Distributions(final_logits(skeletons[name], ids, part[name], at).flatten(0, 1))

            baseline = distributions(runner.base_name)
            found[runner.base_name].add(baseline, targets)
            for name in outputs.keys() - {runner.base_name}:
                found[name].add(distributions(name), targets, baseline)
    return found


def require_finite(skeleton: Skeleton, scores: TokenScores) -> None:
    """Refuse scores of logits that are not finite; once for all batches, as it waits for the device.

    Args:
        skeleton: the model.
        scores: of all tokens.

    Raises:
        SourceError: one is NaN.
    """
    if any(bool(part.isnan().any()) for part in scores.nll):
        raise not_finite(skeleton, "The logits are not finite", "after the last decoder layer")
