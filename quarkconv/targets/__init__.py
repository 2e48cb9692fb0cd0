"""The formats to convert to: how each names, shapes and describes the tensors of a model.

To add a target, write one module with a subclass of ``Target`` (``base.py``) and add it to :data:`TARGETS`.
``PerExpertTarget`` writes experts one by one, ``CompressedTensorsForm`` the config of compressed-tensors. Which engines
load it is a row of ``inspection/engines.toml``.
"""

from __future__ import annotations

from typing import Final

from quarkconv.errors import UsageError
from quarkconv.targets.ascend import Ascend
from quarkconv.targets.base import Target
from quarkconv.targets.bf16 import Bf16
from quarkconv.targets.compressed_tensors import CompressedTensors
from quarkconv.targets.fused_int8 import FusedInt8
from quarkconv.targets.quark import Quark
from quarkconv.targets.w8a8_int8 import W8A8Int8
from quarkconv.text import alternatives

TARGETS: Final[dict[str, Target]] = {
    target.name: target for target in (FusedInt8(), CompressedTensors(), W8A8Int8(), Bf16(), Quark(), Ascend())
}
"""Name, as given to ``--to``, -> target."""


def get_target(name: str) -> Target:
    """The target of a name.

    Raises:
        UsageError: the name is unknown.
    """
    if name not in TARGETS:
        raise UsageError("Unknown target", expected=alternatives(TARGETS), found=name)
    return TARGETS[name]
