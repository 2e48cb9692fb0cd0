"""Scales that some releases of Quark name after the quantizer, under the names that everything else has.

Quark's hf_format exports have ``q_proj.weight_quantizer.scale`` where others have ``q_proj.weight_scale``
(https://github.com/amd/Quark/issues/44). No engine reads them. They are renamed where headers are read, so that nothing
after this module knows of two names.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

MARK: Final = "_quantizer."
"""Occurs in every such name."""
_NAME: Final = re.compile(r"\.(weight|input|output|bias)_quantizer\.(scale|zero_point)$")


def has_quantizer_names(header: str) -> bool:
    """Whether the text of a header may have such a name. Most have no ``z``, which is found in a tenth of the time."""
    return "z" in header and MARK in header


def usual_name(name: str) -> str:
    """The name of a tensor as other exports have it.

    >>> usual_name("model.layers.0.mlp.experts.3.up_proj.weight_quantizer.scale")
    'model.layers.0.mlp.experts.3.up_proj.weight_scale'
    """
    return _NAME.sub(r".\1_\2", name) if MARK in name else name


def usual_names(names: Collection[str]) -> Collection[str]:
    """The names of the tensors of a file as other exports have them; as they are where two would become one."""
    renamed = [usual_name(name) for name in names]
    return renamed if len(set(renamed)) == len(renamed) else names


def is_renamed(before: Collection[str], after: Collection[str]) -> bool:
    """True when a name changed."""
    return before is not after and list(before) != list(after)
