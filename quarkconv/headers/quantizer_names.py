"""Scales under names that no engine reads, under the names that everything else has.

Quark's hf_format exports have ``q_proj.weight_quantizer.scale`` where others have ``q_proj.weight_scale``
(https://github.com/amd/Quark/issues/44). DeepSeek names the scales of blocks ``weight_scale_inv``, and scripts that
quantize its models to int8 per channel keep that name for the scales of rows; codes are multiplied by either. Both are
renamed where headers are read, so that nothing after this module knows of two names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from operator import itemgetter
from typing import Final

from quarkconv.dtypes import TensorType

MARK: Final = "_quantizer."
"""Occurs in every name after a quantizer."""
_NAME: Final = re.compile(r"\.(weight|input|output|bias)_quantizer\.(scale|zero_point)$")
_INVERSE: Final = "_scale_inv"
_SUFFIX: Final = "_inv"
_LAST: Final = itemgetter(slice(-1, None))


def may_be_renamed(header: str, tensors: Mapping[str, TensorType]) -> bool:
    """Whether a header may have such a name, by its text and its tensors.

    Most headers have no ``z``, and few names end in ``v``: both are found in a tenth of the time.
    """
    return ("z" in header and MARK in header) or ("v" in map(_LAST, tensors) and any(map(_is_inverse, tensors)))


def _is_inverse(name: str) -> bool:
    return name.endswith(_INVERSE)


def usual_name(name: str) -> str:
    """The name of a tensor as other exports have it, without a quantizer.

    >>> usual_name("model.layers.0.mlp.experts.3.up_proj.weight_quantizer.scale")
    'model.layers.0.mlp.experts.3.up_proj.weight_scale'
    """
    return _NAME.sub(r".\1_\2", name) if MARK in name else name


def usual_names(tensors: Mapping[str, TensorType]) -> Collection[str]:
    """The names of the tensors of a file as other exports have them; as they are where two would become one."""
    of_rows = frozenset(_scales_of_rows(tensors))
    renamed = [name.removesuffix(_SUFFIX) if name in of_rows else usual_name(name) for name in tensors]
    return renamed if len(set(renamed)) == len(renamed) else tensors


def names_in_index(names: Collection[str], stored: Collection[str]) -> list[str]:
    """The names that an index has for the tensors of a file, renamed where the file's are.

    Args:
        names: of the index.
        stored: the renamed names of the file.
    """
    usual = map(usual_name, names)
    return [
        name.removesuffix(_SUFFIX)
        if name.endswith(_INVERSE) and name not in stored and name.removesuffix(_SUFFIX) in stored
        else name
        for name in usual
    ]


def is_renamed(before: Collection[str], after: Collection[str]) -> bool:
    """True when a name changed."""
    return before is not after and list(before) != list(after)


def _scales_of_rows(tensors: Mapping[str, TensorType]) -> Iterator[str]:
    """The names ``weight_scale_inv`` of scales of int8 weights in a shape of no blocks: [out], [out, 1] or []."""
    for name, found in tensors.items():
        weight = tensors.get(name.removesuffix(_INVERSE)) if name.endswith(_INVERSE) else None
        if weight is None or weight.dtype != "I8" or len(weight.shape) < 2:
            continue
        rows = weight.shape[:-1]
        if found.shape in ((), rows) or (found.shape == (*rows, 1) and rows[-1] > 1):
            yield name
