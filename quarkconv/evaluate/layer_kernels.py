# mypy: ignore-errors
"""Triton kernels of a decoder layer that torch runs as several; ``layer_ops`` launches them and defines the results."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from quarkconv.kernels.jit.cast import _to_dtype


@triton.jit
def scale_sums_kernel(
    sums_ptr, row_scale_ptr, scale_ptr, bias_ptr, out_ptr, N, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid [M, column blocks]: a program scales BLOCK sums of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    sums = tl.load(sums_ptr + row * N + columns, inside, 0).to(tl.float32)
    result = (sums * tl.load(row_scale_ptr + row)) * tl.load(scale_ptr + columns, inside, 0.0)
    if bias_ptr is not None:
        result += tl.load(bias_ptr + columns, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + row * N + columns, _to_dtype(result, out_ptr.dtype.element_ty, INTERPRETED), inside)


@triton.jit
def scale_codes_kernel(codes_ptr, scale_ptr, out_ptr, N, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr):
    """Grid [rows, column blocks]: a program scales BLOCK codes of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    codes = tl.load(codes_ptr + row * N + columns, inside, 0).to(tl.float32)
    result = codes * tl.load(scale_ptr + row)
    tl.store(out_ptr + row * N + columns, _to_dtype(result, out_ptr.dtype.element_ty, INTERPRETED), inside)


@triton.jit
def rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, M, N, eps, INTERPRETED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid [blocks of ROWS rows]: a program normalizes its rows, each of which BLOCK holds."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < M) & (columns < N)
    x = tl.load(x_ptr + rows * N + columns, inside, 0.0).to(tl.float32)
    mean = tl.sum(x * x, 1)[:, None] / N
    scaled = x * (1 / tl.sqrt_rn(mean + eps))
    scaled = _to_dtype(scaled, out_ptr.dtype.element_ty, INTERPRETED).to(tl.float32)
    result = tl.load(weight_ptr + columns, columns < N, 0.0).to(tl.float32) * scaled
    tl.store(out_ptr + rows * N + columns, _to_dtype(result, out_ptr.dtype.element_ty, INTERPRETED), inside)


@triton.jit
def sum_experts_kernel(
    rows_ptr,
    places_ptr,
    weights_ptr,
    out_ptr,
    N,
    K: tl.constexpr,
    ROUNDED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid [M, column blocks]: a program sums a token's K experts in BLOCK columns.

    In the order of torch's sum over a dimension that is not the last: expert j to partial sum j mod 4.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    first = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    third = tl.zeros([BLOCK], tl.float32)
    fourth = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(K):
        row = tl.load(places_ptr + token * K + slot)
        value = tl.load(rows_ptr + row * N + columns, inside, 0.0).to(tl.float32)
        value = value * tl.load(weights_ptr + token * K + slot).to(tl.float32)
        if ROUNDED:
            value = _to_dtype(value, rows_ptr.dtype.element_ty, INTERPRETED).to(tl.float32)
        if slot % 4 == 0:
            first += value
        elif slot % 4 == 1:
            second += value
        elif slot % 4 == 2:
            third += value
        else:
            fourth += value
    total = ((first + second) + third) + fourth
    tl.store(out_ptr + token * N + columns, _to_dtype(total, out_ptr.dtype.element_ty, INTERPRETED), inside)


@triton.jit
def compare_rows_kernel(one_ptr, other_ptr, out_ptr, M, N, BLOCK: tl.constexpr):
    """Grid [M]: a program reads one row of each. Sums of squares of the difference, of one and of the other."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    difference = tl.zeros([BLOCK], tl.float32)
    ones = tl.zeros([BLOCK], tl.float32)
    others = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        at = start + lanes
        one = tl.load(one_ptr + row * N + at, at < N, 0.0).to(tl.float32)
        other = tl.load(other_ptr + row * N + at, at < N, 0.0).to(tl.float32)
        difference += (one - other) * (one - other)
        ones += one * one
        others += other * other
    tl.store(out_ptr + row, tl.sum(difference, 0))
    tl.store(out_ptr + M + row, tl.sum(ones, 0))
    tl.store(out_ptr + 2 * M + row, tl.sum(others, 0))


@triton.jit
def rotate_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    L,
    HEADS,
    SIZE,
    ROTATED,
    x_batch,
    x_head,
    x_position,
    out_batch,
    out_head,
    out_position,
    angle_batch,
    angle_position,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid [B * L, blocks of ROWS heads]: a program rotates heads of one token; BLOCK holds a head."""
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // L, token % L
    heads = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    lanes = tl.arange(0, BLOCK)[None, :]
    inside = (heads < HEADS) & (lanes < SIZE)
    turned = lanes < ROTATED
    half = ROTATED // 2
    row = x_ptr + batch * x_batch + position * x_position + heads * x_head
    x = tl.load(row + lanes, inside, 0.0).to(tl.float32)
    y = tl.load(row + tl.where(lanes < half, lanes + half, lanes - half), inside & turned, 0.0).to(tl.float32)
    angle = batch * angle_batch + position * angle_position + lanes
    cos = tl.load(cos_ptr + angle, turned, 0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, turned, 0.0).to(tl.float32)
    first = _to_dtype(x * cos, out_ptr.dtype.element_ty, INTERPRETED).to(tl.float32)
    second = _to_dtype(tl.where(lanes < half, -y, y) * sin, out_ptr.dtype.element_ty, INTERPRETED).to(tl.float32)
    result = tl.where(turned, first + second, x)
    out = out_ptr + batch * out_batch + position * out_position + heads * out_head + lanes
    tl.store(out, _to_dtype(result, out_ptr.dtype.element_ty, INTERPRETED), inside)


@triton.jit
def silu_gate_kernel(x_ptr, out_ptr, x_row, N, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr):
    """Grid [M, column blocks]: a program computes BLOCK columns of one row, whose gates lie before its ups.

    ``libdevice.exp`` and ``div_rn`` are what torch's kernel computes with; Triton's own exponential is another one.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    gate = tl.load(x_ptr + row * x_row + columns, inside, 0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_row + N + columns, inside, 0.0).to(tl.float32)
    if INTERPRETED:  # noqa: SIM108 - a choice between both would compile both
        silu = gate / (1.0 + tl.exp(-gate))
    else:
        silu = tl.div_rn(gate, 1.0 + libdevice.exp(-gate))
    silu = _to_dtype(silu, out_ptr.dtype.element_ty, INTERPRETED).to(tl.float32)
    tl.store(out_ptr + row * N + columns, _to_dtype(silu * up, out_ptr.dtype.element_ty, INTERPRETED), inside)


@triton.jit
def largest_kernel(x_ptr, values_ptr, ids_ptr, M, N, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid [blocks of ROWS rows]: a program finds the K largest of each of its rows, which BLOCK holds, largest first.

    Integers that order as the numbers do, NaN above all, lie above their places: of equal numbers the first is found.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < M) & (columns < N)
    x = tl.load(x_ptr + rows * N + columns, inside, 0.0).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    order = tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    place = (BLOCK - 1 - columns).to(tl.int64)
    none = (tl.full([ROWS, BLOCK], -0x80000000, tl.int64) << 32) | place
    keys = tl.where(inside, (order.to(tl.int64) << 32) | place, none)
    for slot in range(K):
        best = tl.max(keys, 1)[:, None]
        keys = tl.where(keys == best, none, keys)
        ordered = (best >> 32).to(tl.int32)
        value = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        at = rows * K + slot
        tl.store(values_ptr + at, value.to(values_ptr.dtype.element_ty), rows < M)
        tl.store(ids_ptr + at, BLOCK - 1 - (best & 0xFFFFFFFF), rows < M)


@triton.jit
def not_finite_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """Grid [blocks]: a program notes whether one of BLOCK numbers is not finite."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < N, 0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, 0).to(tl.int8))
