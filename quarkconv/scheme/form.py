"""The tensors of a module: their names, and the form that their dtypes and shapes give it.

The names are those of Quark and compressed-tensors: ``<module>.weight``, ``.weight_scale``, ``.weight_zero_point``,
``.input_scale``, ``.input_zero_point``; Ascend names a zero point ``.weight_offset``. Experts fused into one tensor
have no ``.weight``: ``<experts>.gate_up_proj`` with ``<experts>.gate_up_proj_scale`` and ``_input_scale``.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from quarkconv.dtypes import FLOAT_DTYPES, TensorType
from quarkconv.scheme.spec import PER_CHANNEL, PER_TENSOR

SCALE_DTYPES: Final = frozenset({"F32", "BF16", "F16"})
NARROW_DTYPES: Final = frozenset({"BF16", "F16"})
BLOCK_SCALE: Final = ".weight_scale_inv"
"""The scales of a weight that is quantized in blocks, such as 128 x 128."""
ROTATION: Final = "_rotation"
"""End of the name of the matrix that rotates the input or output of a module at run time."""

Granularity = Literal["per_channel", "per_tensor"]


class Form(NamedTuple):
    """Dtypes and shapes of the tensors of a module; None for a tensor that it does not have.

    ``weight`` is [out, in]; for the experts of a layer in one tensor [E, out, in]; for a convolution [out, ...].
    """

    weight: TensorType
    scale: TensorType | None = None
    zero_point: TensorType | None = None
    input_scale: TensorType | None = None
    input_zero_point: TensorType | None = None
    offset: TensorType | None = None
    convolution: bool = False
    """Whether a weight [out, in, width] is that of a convolution, and not of the experts of a layer."""

    @property
    def tensors(self) -> tuple[TensorType | None, ...]:
        """The tensors, in the order of :class:`TensorNames`."""
        return self.weight, self.scale, self.zero_point, self.input_scale, self.input_zero_point, self.offset

    @property
    def zero_points(self) -> tuple[TensorType | None, TensorType | None, TensorType | None]:
        """Those of the weight, of the input, and of the weight under Ascend's name."""
        return self.zero_point, self.input_zero_point, self.offset

    @property
    def quantized(self) -> bool:
        """True when the weight is stored as int8 codes."""
        return self.weight.dtype == "I8"

    @property
    def is_float(self) -> bool:
        """True when the weight is stored in float, and so is not quantized."""
        return self.weight.dtype in FLOAT_DTYPES

    @property
    def is_convolution(self) -> bool:
        """True for the kernels of a convolution, which have three or more dimensions."""
        return self.convolution or len(self.weight.shape) > 3

    @property
    def may_be_convolution(self) -> bool:
        """True for a weight of three dimensions, unless its scale is of n linears [n, out, in]."""
        shape = self.weight.shape
        scale = () if self.scale is None else self.scale.shape
        return len(shape) == 3 and (shape[1] == 1 or scale not in (shape[:2], (*shape[:2], 1)))

    @property
    def granularity(self) -> Granularity | None:
        """Which parts of the weight share a scale; None when the scale has a shape that fits neither."""
        if self.scale is None or len(self.weight.shape) < 2:
            return None
        (*lead, out, _), shape = self.weight.shape, self.scale.shape
        leading = tuple(lead)
        if self.is_convolution:
            first, *others = self.weight.shape
            if shape and shape[0] == first and set(shape[1:]) <= {1} and len(shape) <= len(self.weight.shape):
                return PER_CHANNEL
            return PER_TENSOR if set(shape) <= {1} and len(shape) <= len(others) else None
        if shape in ((*leading, out), (*leading, out, 1)):
            return PER_CHANNEL
        if shape in (leading, (*leading, 1), (*leading, 1, 1)):
            return PER_TENSOR
        return None


class TensorNames(NamedTuple):
    """Names of the tensors of one module; a module need not have all of them."""

    weight: str
    scale: str
    zero_point: str
    input_scale: str
    input_zero_point: str
    offset: str

    def zero_points(self, form: Form) -> list[str]:
        """Names of the zero points that a module of this form has."""
        names = (self.zero_point, self.input_zero_point, self.offset)
        return [name for name, found in zip(names, form.zero_points, strict=True) if found is not None]


def linear_names(module: str) -> TensorNames:
    """Names of the tensors of an ordinary linear."""
    weight = f"{module}.weight"
    return TensorNames(
        weight,
        f"{weight}_scale",
        f"{weight}_zero_point",
        f"{module}.input_scale",
        f"{module}.input_zero_point",
        f"{weight}_offset",
    )


def fused_names(module: str) -> TensorNames:
    """Names of the tensors of fused experts, such as ``model.layers.0.mlp.experts.gate_up_proj``."""
    return TensorNames(
        module,
        f"{module}_scale",
        f"{module}_zero_point",
        f"{module}_input_scale",
        f"{module}_input_zero_point",
        f"{module}_offset",
    )
