"""Tensor descriptors, by which TMA copies tiles of codes."""

from typing import Any

import torch


def can_describe(codes: torch.Tensor) -> bool:
    """Whether a tensor descriptor of `codes` exists: TMA needs the address and the row pitch in units of 16 bytes."""
    return codes.shape[-1] % 16 == 0 and codes.data_ptr() % 16 == 0


def describe(codes: torch.Tensor, rows: int, block_k: int, *, swizzled: bool = False) -> Any:
    """A descriptor of `codes` as [-1, D] for tiles [rows, block_k]; `swizzled`, in the layout that wgmma reads."""
    view, tile = codes.view(-1, codes.shape[-1]), [rows, block_k]
    if not swizzled:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor.from_tensor(view, tile)
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia import hopper

    layout = NVMMASharedLayout(swizzle_byte_width=block_k, element_bitwidth=8, rank=2)
    return hopper.TensorDescriptor.from_tensor(view, tile, layout)
