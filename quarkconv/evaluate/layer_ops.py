"""Element-wise parts of a decoder layer, each in one kernel on a GPU.

torch runs them as several kernels, each of which reads and writes a whole tensor: together they take longer than the
products of the layer.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from quarkconv.kernels.backend import device_guard, interpreting

_BLOCK: Final = 1024
_NORM_BLOCK: Final = 2048
"""Elements of the rows that a program normalizes: several short ones, or one."""
_FINITE_BLOCK: Final = 8192
MOST_CHOICES: Final = 1024
MOST_CHOSEN: Final = 16
"""Numbers of a row, and how many of them, that :func:`largest` takes: those of routers."""
LONGEST_NORM: Final = 16384
"""Elements of a row that :func:`rms_norm` takes: a program holds all of them."""


def on_kernels(tensor: Tensor) -> bool:
    """Whether the functions below replace torch's."""
    return tensor.is_cuda


def scale_sums(sums: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``sum * row scale * column scale + bias`` in float32, rounded once.

    Args:
        sums: int32 [M, N].
        row_scale: float32 [M].
        scale: float32 [N].
        bias: floats [N], or None.
        dtype: of the result.
    """
    from quarkconv.evaluate.layer_kernels import scale_sums_kernel

    rows, columns = sums.shape
    out = torch.empty(sums.shape, dtype=dtype, device=sums.device)
    with device_guard(sums.device):
        scale_sums_kernel[rows, -(-columns // _BLOCK)](
            sums.contiguous(), row_scale, scale, bias, out, columns, BLOCK=_BLOCK, **_options(sums)
        )
    return out


def scale_codes(codes: Tensor, scale: Tensor) -> Tensor:
    """Code times the scale of its row in float32, rounded once.

    Args:
        codes: int8 [..., out, in].
        scale: float32 [..., out].

    Returns:
        bfloat16 [..., out, in].
    """
    from quarkconv.evaluate.layer_kernels import scale_codes_kernel

    columns = codes.shape[-1]
    rows = codes.numel() // columns
    out = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
    with device_guard(codes.device):
        scale_codes_kernel[rows, -(-columns // _BLOCK)](
            codes.contiguous(), scale.contiguous(), out, columns, BLOCK=_BLOCK, **_options(codes)
        )
    return out


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * (x / sqrt(mean(x^2) + eps))``, the quotient in float32, rounded before the product and after it.

    Args:
        states: floats [..., N], N at most ``LONGEST_NORM``.
        weight: [N], in the same dtype.
        eps: added to the mean.

    Returns:
        The shape and dtype of ``states``. The mean sums in another order than torch's: a rounding may go the other way.
    """
    from quarkconv.evaluate.layer_kernels import rms_norm_kernel

    states = states.contiguous()
    out, length = torch.empty_like(states), states.shape[-1]
    count, block = states.numel() // length, 1 << (length - 1).bit_length()
    rows = max(1, _NORM_BLOCK // block)
    with device_guard(states.device):
        rms_norm_kernel[(-(-count // rows),)](
            states,
            weight,
            out,
            count,
            length,
            eps,
            ROWS=rows,
            BLOCK=block,
            num_warps=4 if block <= _NORM_BLOCK else 8,
            **_options(states),
        )
    return out


def sum_experts(rows: Tensor, places: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The weighted sum of each token's experts, with the roundings and in the order of transformers' ``grouped_mm``.

    Args:
        rows: outputs of experts, floats [M * k, H], in any order.
        places: the row of each token's j-th expert, int64 [M * k].
        weights: floats [M, k]. In the dtype of ``rows`` a product is rounded to it, as in torch.
        dtype: of the result.

    Returns:
        floats [M, H].
    """
    from quarkconv.evaluate.layer_kernels import sum_experts_kernel

    tokens, top_k = weights.shape
    hidden = rows.shape[1]
    out = torch.empty((tokens, hidden), dtype=dtype, device=rows.device)
    with device_guard(rows.device):
        sum_experts_kernel[tokens, -(-hidden // _BLOCK)](
            rows.contiguous(),  # torch pads the rows of some products
            places,
            weights.contiguous(),
            out,
            hidden,
            K=top_k,
            ROUNDED=torch.result_type(rows, weights) == rows.dtype,
            BLOCK=_BLOCK,
            **_options(rows),
        )
    return out


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x * cos + rotated x * sin`` on the first R elements of each head, with the roundings of torch's three kernels.

    Args:
        states: floats [B, heads, L, D], elements of a head in a row.
        cos, sin: the same dtype, [B or 1, L, R], R even and at most D; elements in a row.

    Returns:
        The shape and dtype of ``states``.
    """
    from quarkconv.evaluate.layer_kernels import rotate_kernel

    batch, heads, length, size = states.shape
    sin = sin if sin.stride() == cos.stride() else sin.expand_as(cos).contiguous()
    cos = cos if sin.stride() == cos.stride() else cos.contiguous()
    out = torch.empty_like(states)
    block = max(2, 1 << (size - 1).bit_length())
    rows = max(1, min(_NORM_BLOCK // block, 1 << (heads - 1).bit_length()))
    with device_guard(states.device):
        rotate_kernel[batch * length, -(-heads // rows)](
            states,
            cos,
            sin,
            out,
            length,
            heads,
            size,
            cos.shape[-1],
            *(tensor.stride(at) for tensor in (states, out) for at in (0, 1, 2)),
            cos.stride(0) if len(cos) > 1 else 0,
            cos.stride(1),
            ROWS=rows,
            BLOCK=block,
            **_options(states),
        )
    return out


def silu_gate(joined: Tensor) -> Tensor:
    """``silu(gate) * up``, each rounded, as torch's two kernels.

    Args:
        joined: floats [M, 2 N], gates before ups.

    Returns:
        [M, N] in the same dtype.
    """
    from quarkconv.evaluate.layer_kernels import silu_gate_kernel

    rows, columns = joined.shape[0], joined.shape[1] // 2
    joined = joined if joined.stride(1) == 1 else joined.contiguous()  # torch pads the rows of some products
    out = torch.empty((rows, columns), dtype=joined.dtype, device=joined.device)
    if rows:
        with device_guard(joined.device):
            silu_gate_kernel[rows, -(-columns // _BLOCK)](
                joined, out, joined.stride(0), columns, BLOCK=_BLOCK, **_options(joined)
            )
    return out


def compare_rows(one: Tensor, other: Tensor) -> Tensor:
    """Sums of squares of ``one - other``, of ``one`` and of ``other``, float64 [3]; of each row in float32.

    Args:
        one, other: floats [..., N].
    """
    from quarkconv.evaluate.layer_kernels import compare_rows_kernel

    length = one.shape[-1]
    rows = one.numel() // length
    out = torch.empty((3, rows), dtype=torch.float32, device=one.device)
    with device_guard(one.device):
        compare_rows_kernel[(rows,)](one.contiguous(), other.contiguous(), out, rows, length, BLOCK=_BLOCK)
    return out.double().sum(1)


def is_finite(states: Tensor) -> Tensor:
    """Whether all numbers are finite: bool, a scalar of the tensor's device."""
    from quarkconv.evaluate.layer_kernels import not_finite_kernel

    blocks = -(-states.numel() // _FINITE_BLOCK)
    out = torch.empty(blocks, dtype=torch.int8, device=states.device)
    with device_guard(states.device):
        not_finite_kernel[(blocks,)](states.contiguous(), out, states.numel(), BLOCK=_FINITE_BLOCK)
    return ~out.any()


def largest(numbers: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest numbers of each row and their places, largest first; of equal ones the first, and NaN above all.

    Args:
        numbers: floats [..., N], N at most ``MOST_CHOICES``.
        count: k, at most N and ``MOST_CHOSEN``.

    Returns:
        [..., k] in the same dtype, and int64 [..., k].
    """
    from quarkconv.evaluate.layer_kernels import largest_kernel

    length = numbers.shape[-1]
    rows, block = numbers.numel() // length, max(2, 1 << (length - 1).bit_length())
    values = torch.empty((*numbers.shape[:-1], count), dtype=numbers.dtype, device=numbers.device)
    ids = torch.empty(values.shape, dtype=torch.int64, device=numbers.device)
    at_once = max(1, _NORM_BLOCK // block)
    with device_guard(numbers.device):
        largest_kernel[(-(-rows // at_once),)](
            numbers.contiguous(), values, ids, rows, length, K=count, ROWS=at_once, BLOCK=block
        )
    return values, ids


def _options(tensor: Tensor) -> dict[str, Any]:
    """Rounding as torch's: products and sums apart, where compiled."""
    interpreted = interpreting()
    return {"INTERPRETED": interpreted} | ({} if interpreted or not tensor.is_cuda else {"enable_fp_fusion": False})
