"""Sizes of a checkpoint by dtype and by use."""

from __future__ import annotations

from collections import Counter

from quarkconv.description.description import Description
from quarkconv.headers.entries import distinct

Sizes = list[tuple[str, int]]
"""Names and bytes, largest first."""


def bytes_by_dtype(description: Description) -> Sizes:
    """Bytes in tensors of each dtype."""
    counts = Counter(map(id, description.checkpoint.types.values()))
    sizes: Counter[str] = Counter()
    for kind in distinct(description.checkpoint.types.values()):
        sizes[kind.dtype] += counts[id(kind)] * kind.nbytes
    return sizes.most_common()


def bytes_by_use(description: Description) -> Sizes:
    """Bytes of routed experts, other int8 linears, scales and zero points, and everything else.

    Experts are counted form by form, since a large model has 50,000 modules in a handful of forms.
    """
    members = description.topology.members
    sizes: Counter[str] = Counter()
    for (form, _), modules in description.modules.groups.items():
        inside = sum(map(members.__contains__, modules))
        sizes["routed experts"] += inside * form.weight.nbytes
        if form.quantized:
            sizes["other int8 linears"] += (len(modules) - inside) * form.weight.nbytes
    ends = ("_scale", "_zero_point", "_offset")
    companions = [kind for name, kind in description.checkpoint.types.items() if name.endswith(ends)]
    counts = Counter(map(id, companions))
    sizes["scales and zero points"] = sum(counts[id(kind)] * kind.nbytes for kind in distinct(companions))
    total = sum(size for _, size in bytes_by_dtype(description))
    sizes["everything else"] = total - sizes.total()
    return [(name, size) for name, size in sizes.most_common() if size]
