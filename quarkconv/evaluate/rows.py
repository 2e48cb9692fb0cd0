"""Rows of logits -> a few numbers for each, on a GPU.

With torch alone a row is converted, exponentiated, subtracted and summed in tensors of its own, each two to four times
as large as the logits: on a GPU that takes longer than the products that the logits come from.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch import Tensor

from quarkconv.evaluate.row_kernels import row_divergence_kernel, row_statistics_kernel

_BLOCK: Final = 1024


def row_statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    """floats [n, V] -> log(sum(exp)) float64 [n], and the first place of the largest logit int32 [n]."""
    logits = logits.contiguous()
    log_sum = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    top = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
    with _current(logits):
        row_statistics_kernel[(len(logits),)](logits, log_sum, top, logits.shape[1], BLOCK=_BLOCK)
    return log_sum, top


def row_divergence(p: Tensor, p_log_sum: Tensor, q: Tensor, q_log_sum: Tensor) -> Tensor:
    """KL divergence of each row, float64 [n].

    Args:
        p, q: logits [n, V].
        p_log_sum, q_log_sum: of :func:`row_statistics`.
    """
    import triton.language as tl

    out = torch.empty_like(p_log_sum)
    wide = tl.float64 if p.dtype == torch.float32 else tl.float32
    with _current(p):
        row_divergence_kernel[(len(p),)](
            p.contiguous(), p_log_sum, q.contiguous(), q_log_sum, out, p.shape[1], WIDE=wide, BLOCK=_BLOCK
        )
    return out


def _current(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, not on that of the tensors; its interpreter takes those of a CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
