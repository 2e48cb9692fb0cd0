"""Int8 linears outside of the routed experts beside the unquantized ones: attention, shared experts, dense MLPs.

The bound is that of experts' weights. SmoothQuant and AWQ leave factors of the input channels, and in ``v_proj`` and
``up_proj`` of the rows, which the linear after them cancels. Factors of inputs are estimated by least squares and left
out of the error; a linear that needs factors of its rows is not compared, since nothing here shows that these cancel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch
from torch import Tensor

from quarkconv.description.description import Description
from quarkconv.load.layer_reader import READERS, LayerReader
from quarkconv.scheme.form import Form, linear_names
from quarkconv.verify.layer_results import LinearError
from quarkconv.verify.places import layer_of
from quarkconv.verify.results import LinearsResult, Problem, UncheckedLayer
from quarkconv.verify.unquantized import WEIGHT_BOUND

_BLOCK: Final = 2**24
"""Elements of a weight that are in float64 at once."""
_WORST: Final = 10
_ROWS_CANCEL: Final = frozenset({"v_proj", "up_proj"})
"""Last parts of the names of linears whose rows may have factors."""
_DECODER_LAYER: Final = re.compile(r"(?:^|\.)((?:layers|h|blocks)\.\d+\..*)$")
_ROWS: Final = "it differs by factors of its rows, which SmoothQuant and AWQ leave where another linear cancels them"

Blocks = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""Gives the rows of a weight and of the unquantized one, float64 [rows, in], block by block."""


def compare_linears(
    description: Description, unquantized: Description, modules: Collection[str], device: torch.device
) -> tuple[LinearsResult, list[Problem]]:
    """Compare int8 linears with those of the unquantized model.

    Args:
        description: the checkpoint.
        unquantized: the model before it was quantized.
        modules: the linears.
        device: where to compute.

    Raises:
        SourceError: a file cannot be read.
    """
    errors: dict[str, float] = {}
    rescaled, problems, left_out = 0, [], []
    names = _names(unquantized)
    with (
        ThreadPoolExecutor(READERS) as pool,
        LayerReader(description, pool) as reader,
        LayerReader(unquantized, pool) as original,
    ):
        for module in modules:
            form, name = description.stored.linears[module], names(module)
            reason = _not_comparable(form, None if name is None else unquantized.stored.linears[name])
            if reason is None and name is not None:
                blocks = _blocks(module, form, name, reader, original, device)
                error, by_inputs, reason = _error(module, blocks)
            if reason is not None:
                left_out.append(UncheckedLayer(module, reason))
                continue
            errors[module] = error
            rescaled += by_inputs
            if not error <= WEIGHT_BOUND:
                message = (
                    f"The weight is not the unquantized model's weight, rounded: relative error {error:.3g}, "
                    f"bound {WEIGHT_BOUND:g}"
                )
                problems.append(Problem("numbers", layer_of(description, module), module, message))
    worst = sorted(errors.items(), key=lambda item: -item[1])[:_WORST]
    result = LinearsResult(len(errors), rescaled, tuple(LinearError(*item) for item in worst), tuple(left_out))
    return result, problems


def _names(unquantized: Description) -> Callable[[str], str | None]:
    """Gives the name of a linear in the unquantized model: its own, or the only one with the same end in a wrapper."""
    ends: dict[str, list[str]] = {}
    for name in unquantized.stored.linears:
        match = _DECODER_LAYER.search(name)
        if match is not None:
            ends.setdefault(match[1], []).append(name)

    def find(module: str) -> str | None:
        if module in unquantized.stored.linears:
            return module
        match = _DECODER_LAYER.search(module)
        found = ends.get(match[1], []) if match is not None else []
        return found[0] if len(found) == 1 else None

    return find


def _not_comparable(form: Form, original: Form | None) -> str | None:
    """Why a linear cannot be compared; None where it can."""
    if original is None:
        return "the unquantized model has no linear of this name"
    if not original.is_float:
        return f"the unquantized model stores it in {original.weight.dtype}"
    if original.weight.shape != form.weight.shape:
        return f"the unquantized model stores {list(original.weight.shape)} instead of {list(form.weight.shape)}"
    return None


def _blocks(
    module: str, form: Form, name: str, reader: LayerReader, original: LayerReader, device: torch.device
) -> Blocks:
    """The weight and the unquantized one, which are read once."""
    names = linear_names(module)
    stored = reader.tensors([names.weight, names.scale])
    rows = len(stored[names.weight])
    codes = stored[names.weight].reshape(rows, -1)
    scale = stored[names.scale].double().flatten().expand(rows) if form.scale is not None else torch.ones(rows)
    floats = original.floats(f"{name}.weight").reshape(rows, -1)
    step = max(1, _BLOCK // max(1, codes.shape[1]))

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, rows, step):
            part = slice(start, start + step)
            weight = codes[part].to(device).double() * scale[part].to(device).double().unsqueeze(1)
            yield weight, floats[part].to(device).double()

    return blocks


def _error(module: str, blocks: Blocks) -> tuple[float, bool, str | None]:
    """The relative error, whether it is without factors of the inputs, and why it says nothing, if so."""
    plain = _relative(blocks())
    if plain <= WEIGHT_BOUND:
        return plain, False, None
    over = sum((weight * original).sum(dim=0) for weight, original in blocks())
    under = sum(original.square().sum(dim=0) for _, original in blocks())
    assert isinstance(over, Tensor)  # a weight has rows
    assert isinstance(under, Tensor)
    inputs = torch.where(under > 0, over / under.clamp(min=torch.finfo(torch.float64).tiny), torch.ones_like(over))
    by_inputs = _relative((weight, original * inputs) for weight, original in blocks())
    if by_inputs <= WEIGHT_BOUND:
        return by_inputs, True, None
    if module.rpartition(".")[2] in _ROWS_CANCEL:
        by_rows = _relative((weight, _with_row_factors(weight, original * inputs)) for weight, original in blocks())
        if by_rows <= WEIGHT_BOUND:
            return by_rows, True, _ROWS
    return plain, False, None


def _with_row_factors(weight: Tensor, original: Tensor) -> Tensor:
    under = original.square().sum(dim=1, keepdim=True)
    factors = (weight * original).sum(dim=1, keepdim=True) / under.clamp(min=torch.finfo(torch.float64).tiny)
    return original * factors


def _relative(blocks: Iterator[tuple[Tensor, Tensor]]) -> float:
    """Frobenius norm of the difference over that of the second weights."""
    noise = signal = 0.0
    for weight, original in blocks:
        noise += (weight - original).square().sum().item()
        signal += original.square().sum().item()
    return math.sqrt(noise / signal) if signal else (0.0 if noise == 0 else math.inf)
