"""The forward pass of a transformers model in three parts: before the decoder layers, one layer, after the last.

The model's forward runs unchanged: modules that record their arguments replace the decoder layers. Masks, rotary
embeddings, scaling of embeddings, the final norm and the head are so the model's own code, while the layers run one at
a time over all windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quarkconv.errors import SourceError, UnsupportedError, UsageError
from quarkconv.evaluate.hidden_states import LayerOutput
from quarkconv.evaluate.request import VERIFY_INSTEAD
from quarkconv.evaluate.skeleton import Skeleton


@dataclass(frozen=True, slots=True)
class LayerCall:
    """Arguments of a decoder layer beside the hidden states; the same for all windows of a batch size.

    Attributes:
        args, kwargs: arguments.
        handed_on: the keyword for the second output of the layer before, such as chosen positions; None if the layer
            does not take it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    handed_on: str | None = None


class _Replacement(nn.Module):
    """Replaces a decoder layer; has the layer's attributes, which the model may read (``block_type``)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._replaced = (layer,)  # in a tuple: not a module of this one

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_replaced"][0], name)


class _HandedOn:
    """A placeholder for the second output of a layer."""


class _Recorder(_Replacement):
    """Records its arguments and returns its hidden states.

    Args:
        layer: the decoder layer.
        pairs: the layer returns a pair.
        states: returned in place of the hidden states.
    """

    def __init__(self, layer: nn.Module, pairs: bool, states: Tensor | None = None) -> None:
        super().__init__(layer)
        self.call: LayerCall | None = None
        self.states: Tensor | None = None
        self._pairs, self._returned = pairs, states

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, _HandedOn]:
        name = next((key for key, value in kwargs.items() if isinstance(value, _HandedOn)), None)
        self.call = LayerCall(args, {key: value for key, value in kwargs.items() if key != name}, name)
        self.states = hidden_states
        states = hidden_states if self._returned is None else self._returned
        return (states, _HandedOn()) if self._pairs else states


def embed(skeleton: Skeleton, ids: Tensor) -> tuple[Tensor, list[LayerCall]]:
    """Hidden states before the first layer, [B, L, H], and the call of each layer.

    Args:
        ids: int64 [B, L].

    Raises:
        UnsupportedError: the layers cannot be run one by one.
        SourceError: the hidden states are not finite.
    """
    errors: list[UnsupportedError] = []
    for pairs in (False, True) if skeleton.pairs is None else (skeleton.pairs,):
        recorders = [_Recorder(layer, pairs) for layer in skeleton.layers]
        try:
            with _replaced(skeleton, recorders), _forward(skeleton):
                skeleton.model(input_ids=ids.to(skeleton.device), use_cache=False, logits_to_keep=1)
        except UnsupportedError as error:
            errors.append(error)
            continue
        first = recorders[0].states
        if first is not None and all(item.states is first for item in recorders):
            skeleton.pairs = pairs
            if not bool(first.isfinite().all()):
                raise not_finite(skeleton, "The embeddings are not finite", "before the first decoder layer")
            return first, [item.call for item in recorders if item.call is not None]
    if errors:
        raise errors[0]
    raise UnsupportedError(
        "The layers of this model cannot be run one by one",
        file=str(skeleton.root),
        expected="a decoder whose layers take the hidden states of the layer before",
        found=type(skeleton.model).__name__,
        hint=VERIFY_INSTEAD,
    )


def run_layer(
    skeleton: Skeleton, number: int, states: Tensor, call: LayerCall, handed_on: Tensor | None = None
) -> LayerOutput:
    """One decoder layer, filled before.

    Args:
        skeleton: the model.
        number: the layer.
        states: hidden states, [B, L, H].
        call: its other arguments.
        handed_on: the second output of the layer before.
    """
    more = {} if call.handed_on is None else {call.handed_on: handed_on}
    with _forward(skeleton):
        result = skeleton.layers[number](states, *call.args, **call.kwargs, **more)
    output = result if isinstance(result, tuple) else (result,)
    if len(output) != (2 if skeleton.pairs else 1) or not isinstance(output[-1], Tensor | None):
        raise UnsupportedError(
            "The layers of this model exchange more than hidden states",
            file=str(skeleton.root),
            tensor=skeleton.layer_prefix(number),
            found=type(skeleton.layers[number]).__name__,
            hint=VERIFY_INSTEAD,
        )
    return LayerOutput(*output)


def final_logits(skeleton: Skeleton, ids: Tensor, states: Tensor, positions: Tensor) -> Tensor:
    """Logits after the last layer, [B, n, V], at some positions of each window.

    Args:
        ids: int64 [B, L].
        states: hidden states after the last layer, [B, L, H].
        positions: int64 [n].
    """
    pairs = bool(skeleton.pairs)
    replaced = [_Recorder(layer, pairs) for layer in skeleton.layers]
    kept = states.to(skeleton.device)[:, positions.to(skeleton.device)]
    replaced[-1] = _Recorder(skeleton.layers[-1], pairs, kept)
    with _replaced(skeleton, replaced), _forward(skeleton):
        # What comes before the layers does not count: one token is enough for it.
        output = skeleton.model(input_ids=ids[:, :1].to(skeleton.device), use_cache=False)
    logits: Tensor = output.logits
    return logits


def not_finite(skeleton: Skeleton, what: str, where: str) -> SourceError:
    """The error about values outside of the decoder layers."""
    return SourceError(
        what,
        code="states-not-finite",
        file=str(skeleton.root),
        found=f"NaN or infinity {where}",
        hint="download the checkpoint again",
    )


@contextmanager
def _forward(skeleton: Skeleton) -> Iterator[None]:
    """Run code of the model's class without gradients; its exceptions become UnsupportedError."""
    try:
        with torch.no_grad():
            yield
    except torch.OutOfMemoryError as error:
        raise UsageError(
            "The device has too little memory for a batch", found=str(skeleton.device), hint="give a smaller --batch"
        ) from error
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedError(
            "The model's class in transformers cannot be run layer by layer",
            file=str(skeleton.root),
            found=f"{type(skeleton.model).__name__}: {error}"[:200],
            hint=_hint(skeleton),
        ) from error


def _hint(skeleton: Skeleton) -> str:
    """The next step for a model whose class fails."""
    config = skeleton.model.config.get_text_config()
    size, rotated = (getattr(config, name, None) for name in ("head_dim", "qk_rope_head_dim"))
    if size is not None and rotated and size != rotated:
        return (
            f"config.json has head_dim {size} and qk_rope_head_dim {rotated}: classes with MLA rotate head_dim "
            "elements; remove head_dim from config.json"
        )
    return VERIFY_INSTEAD


@contextmanager
def _replaced(skeleton: Skeleton, modules: Iterable[nn.Module]) -> Iterator[None]:
    owner, leaf = skeleton.owner(skeleton.layers_path)
    before = getattr(owner, leaf)
    setattr(owner, leaf, nn.ModuleList(modules))
    try:
        yield
    finally:
        setattr(owner, leaf, before)
