"""Tensor descriptors, by which TMA copies tiles of codes."""

import copy
from typing import Any

import torch

_CHECKED: dict[tuple[int, int, int, int, bool], Any] = {}
"""Descriptors without their tensor, by its size and the tile: creating one checks both at more cost than a copy."""
_MOST = 4096


def can_describe(codes: torch.Tensor) -> bool:
    """Whether a tensor descriptor of `codes` exists: TMA needs the address and the row pitch in units of 16 bytes."""
    return codes.shape[-1] % 16 == 0 and codes.data_ptr() % 16 == 0


def describe(codes: torch.Tensor, rows: int, block_k: int, *, swizzled: bool = False) -> Any:
    """A descriptor of `codes` as [-1, D] for tiles [rows, block_k]; `swizzled`, in the layout that wgmma reads."""
    view = codes if codes.dim() == 2 else codes.flatten(0, -2)
    key = (*view.shape, rows, block_k, swizzled)
    checked = _CHECKED.get(key)
    if checked is None:
        checked = _create(view, [rows, block_k], swizzled=swizzled)
        checked.base = None
        if len(_CHECKED) == _MOST:
            _CHECKED.clear()
        _CHECKED[key] = checked
    descriptor = copy.copy(checked)
    descriptor.base = view
    return descriptor


def _create(view: torch.Tensor, tile: list[int], *, swizzled: bool) -> Any:
    if not swizzled:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor.from_tensor(view, tile)
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia import hopper

    layout = NVMMASharedLayout(swizzle_byte_width=tile[1], element_bitwidth=8, rank=2)
    return hopper.TensorDescriptor.from_tensor(view, tile, layout)
