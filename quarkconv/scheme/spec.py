"""Schemes of modules, the terms in which declared and stored schemes are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

MIXED: Final = "mixed"
"""The name for a model that holds modules of more than one INT8 scheme."""


class TensorSpec(NamedTuple):
    """The quantization of one tensor of a linear: its weight or its input.

    Attributes:
        dtype: as the config writes it, such as ``int8`` or ``fp8_e4m3``.
        granularity: ``per_tensor``, ``per_channel`` (one scale per output row), ``per_token`` (one per row of
            activations), or another value of the config, such as ``per_group``.
        symmetric: True when zero is the code 0.
        dynamic: True when scales are computed from the data at run time.
    """

    dtype: str
    granularity: str
    symmetric: bool
    dynamic: bool

    def to_json(self) -> dict[str, object]:
        """The four fields, under the names of the contract."""
        return {
            "dtype": self.dtype,
            "granularity": self.granularity,
            "symmetric": self.symmetric,
            "dynamic": self.dynamic,
        }


class ModuleScheme(NamedTuple):
    """The scheme of one linear: its weight and its input; None for a tensor in float."""

    weight: TensorSpec | None = None
    activation: TensorSpec | None = None

    @property
    def is_foreign(self) -> bool:
        """Whether the scheme is known by name alone and not converted."""
        return self.weight is not None and self.weight.granularity == FOREIGN


FLOAT: Final = ModuleScheme()
"""The scheme of a module that is not quantized."""

PER_TENSOR: Final = "per_tensor"
PER_CHANNEL: Final = "per_channel"
PER_TOKEN: Final = "per_token"
BLOCK: Final = "block"
"""A scale for each block of rows and columns."""
FOREIGN: Final = "foreign"
"""The granularity of a scheme that is known by name alone and not converted."""

WEIGHT_PER_CHANNEL: Final = TensorSpec("int8", PER_CHANNEL, symmetric=True, dynamic=False)
WEIGHT_PER_TENSOR: Final = TensorSpec("int8", PER_TENSOR, symmetric=True, dynamic=False)
INPUT_PER_TOKEN: Final = TensorSpec("int8", PER_TOKEN, symmetric=True, dynamic=True)
INPUT_STATIC: Final = TensorSpec("int8", PER_TENSOR, symmetric=True, dynamic=False)
FP8_STATIC: Final = TensorSpec("fp8_e4m3", PER_TENSOR, symmetric=True, dynamic=False)
"""How engines store a quantized key-value cache, and how activations under a stored scale are quantized."""
FP8_PER_TOKEN: Final = TensorSpec("fp8_e4m3", PER_TOKEN, symmetric=True, dynamic=True)

PTPC: Final = ModuleScheme(WEIGHT_PER_CHANNEL, INPUT_PER_TOKEN)
"""Per token and per channel: the one scheme that formats without fields for it have."""
PTPC_NAME: Final = "ptpc_int8"

SCHEME_NAMES: Final[Mapping[ModuleScheme, str]] = {
    PTPC: PTPC_NAME,
    ModuleScheme(WEIGHT_PER_TENSOR, INPUT_PER_TOKEN): "int8_per_tensor_weight",
    ModuleScheme(WEIGHT_PER_TENSOR, INPUT_STATIC): "int8_static",
}
"""The name of each combination that has one."""
