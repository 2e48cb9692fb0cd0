"""The scheme that ``quant_model_description.json`` of Ascend's msModelSlim declares for each tensor.

    {"model_quant_type": "W8A8_DYNAMIC", "version": "1.0.0", "group_size": 0, "metadata": {}, "optional": {},
     "model.layers.0.mlp.experts.0.gate_proj.weight": "W8A8_DYNAMIC",
     "model.layers.0.mlp.experts.0.gate_proj.weight_scale": "W8A8_DYNAMIC",
     "model.layers.0.mlp.experts.0.gate_proj.weight_offset": "W8A8_DYNAMIC",
     "model.layers.0.input_layernorm.weight": "FLOAT", ...}

``W8A8_DYNAMIC`` is ptpc_int8: weight I8 [out, in], weight_scale F32 [out, 1], weight_offset F32 [out, 1] of zeros. All
other types are named and refused; ``W8A8`` is static and stores ``deq_scale`` and ``quant_bias`` instead of a weight
scale. Sources: msmodelslim, ``core/quant_service/modelslim_v1/save/ascendv1.py``; vllm-ascend,
``quantization/modelslim_config.py``, which raises KeyError for a weight without an entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from quarkconv.dtypes import TensorType
from quarkconv.headers.file_names import ASCEND_NAME
from quarkconv.scheme.declared import DeclaredScheme
from quarkconv.scheme.spec import FLOAT, FOREIGN, PTPC, PTPC_NAME, ModuleScheme, TensorSpec
from quarkconv.text import shortened, word

DYNAMIC: Final = "W8A8_DYNAMIC"
UNQUANTIZED: Final = "FLOAT"
ASCEND: Final = "ascend"
"""The method of :class:`AscendScheme`; vllm-ascend's name for it."""
_UNSUPPORTED: Final = {
    "fa_quant_type": "a quantized attention",
    "kv_quant_type": "a quantized key-value cache",
    "kv_cache_type": "a quantized key-value cache",
}
"""Fields that change the computation -> their meaning."""


class AscendScheme(DeclaredScheme):
    """The scheme of a ``quant_model_description.json``.

    Args:
        description: the object in the file.
        types: the stored tensors; a weight without an entry counts as declared the way it is stored.

    Attributes:
        missing: stored tensors without an entry.
        absent: entries of tensors that are not stored.
        other: weights of a type that quarkconv does not convert -> the type.
        unsupported: other parts of the file that change the computation, in words.
    """

    names: ClassVar[Mapping[ModuleScheme, str]] = {PTPC: PTPC_NAME}
    file: ClassVar[str] = ASCEND_NAME
    subject: ClassVar[str] = ASCEND_NAME

    def __init__(self, description: Mapping[str, Any], types: Mapping[str, TensorType]) -> None:
        version = description.get("version")
        super().__init__(ASCEND, shortened(version) if isinstance(version, str) else None)
        self.default = PTPC
        self.missing = [name for name in types if not isinstance(description.get(name), str)]
        entries = {name: word(value) for name, value in description.items() if isinstance(value, str) and "." in name}
        self.absent = [name for name in entries if name not in types]
        self._types: dict[str, str] = {name: entries[name] for name in types if name in entries}
        self._types.update((name, DYNAMIC if types[name].dtype == "I8" else UNQUANTIZED) for name in self.missing)
        weights = {name: kind for name, kind in self._types.items() if name.endswith(".weight")}
        self.other = {name: kind for name, kind in weights.items() if kind not in (DYNAMIC, UNQUANTIZED)}
        self._foreign = {kind: _foreign(kind) for kind in self.other.values()}
        self.unsupported = [meaning for field, meaning in _UNSUPPORTED.items() if description.get(field)]
        metadata = description.get("metadata")
        if description.get("optional") or (isinstance(metadata, dict) and metadata.get("quarot")):
            self.unsupported.append("rotations")

    def kind(self, module: str) -> str | None:
        """The type of a module's weight; None without such a weight."""
        return self._types.get(f"{module}.weight")

    def resolve(self, module: str) -> ModuleScheme:
        kind = self._types.get(f"{module}.weight")
        if kind is None or kind == UNQUANTIZED:
            return FLOAT
        return PTPC if kind == DYNAMIC else self._foreign[kind]


def _foreign(kind: str) -> ModuleScheme:
    return ModuleScheme(TensorSpec(kind, FOREIGN, symmetric=False, dynamic=False))
