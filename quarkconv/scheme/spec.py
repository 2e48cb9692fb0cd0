"""How a module is quantized: the terms in which declared and stored schemes are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SCHEMES: Final = ("ptpc_int8", "int8_per_tensor_weight", "int8_static")
"""The INT8 schemes that are understood. A model that holds more than one of them is ``mixed``."""

MIXED: Final = "mixed"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """How one tensor of a linear, its weight or its input, is quantized.

    Attributes:
        dtype: as the config writes it, such as ``int8`` or ``fp8_e4m3``.
        granularity: ``per_tensor``, ``per_channel`` (one scale per output row), ``per_token`` (one per row of
            activations), or what else the config says, such as ``per_group``.
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


@dataclass(frozen=True, slots=True)
class ModuleScheme:
    """How one linear is quantized: its weight and its input; None for a tensor that stays in float."""

    weight: TensorSpec | None = None
    activation: TensorSpec | None = None

    @property
    def name(self) -> str | None:
        """One of :data:`SCHEMES`, or None for any other combination."""
        return _NAMES.get((self.weight, self.activation))


FLOAT: Final = ModuleScheme()
"""The scheme of a module that is not quantized."""

PER_TENSOR: Final = "per_tensor"
PER_CHANNEL: Final = "per_channel"
PER_TOKEN: Final = "per_token"

WEIGHT_PER_CHANNEL: Final = TensorSpec("int8", PER_CHANNEL, symmetric=True, dynamic=False)
WEIGHT_PER_TENSOR: Final = TensorSpec("int8", PER_TENSOR, symmetric=True, dynamic=False)
INPUT_PER_TOKEN: Final = TensorSpec("int8", PER_TOKEN, symmetric=True, dynamic=True)
INPUT_STATIC: Final = TensorSpec("int8", PER_TENSOR, symmetric=True, dynamic=False)

_NAMES: Final = {
    (WEIGHT_PER_CHANNEL, INPUT_PER_TOKEN): "ptpc_int8",
    (WEIGHT_PER_TENSOR, INPUT_PER_TOKEN): "int8_per_tensor_weight",
    (WEIGHT_PER_TENSOR, INPUT_STATIC): "int8_static",
    (WEIGHT_PER_CHANNEL, INPUT_STATIC): "int8_static",  # what conversion makes of it: the scale repeated over the rows
}
