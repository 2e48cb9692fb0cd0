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

from quarkconv.errors import UnsupportedError, UsageError
from quarkconv.evaluate.skeleton import Skeleton


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What the model passes to a decoder layer beside the hidden states; the same for all windows of a batch size."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


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


class _Recorder(_Replacement):
    """Keeps what it is called with, and passes its hidden states on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.call: LayerCall | None = None
        self.states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.call, self.states = LayerCall(args, kwargs), hidden_states
        return hidden_states


class _Computed(_Replacement):
    """Returns hidden states that were computed before."""

    def __init__(self, layer: nn.Module, states: Tensor) -> None:
        super().__init__(layer)
        self.states = states

    def forward(self, _: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        return self.states


def embed(skeleton: Skeleton, ids: Tensor) -> tuple[Tensor, list[LayerCall]]:
    """Hidden states before the first layer, [B, L, H], and what each layer is called with.

    Args:
        ids: int64 [B, L].

    Raises:
        UnsupportedError: the model passes something between its layers that depends on them.
    """
    recorders = [_Recorder(layer) for layer in skeleton.layers]
    with _replaced(skeleton, recorders), _forward(skeleton):
        skeleton.model(input_ids=ids.to(skeleton.device), use_cache=False, logits_to_keep=1)
    first = recorders[0].states
    if first is None or any(item.states is None or item.states is not first for item in recorders):
        raise UnsupportedError(
            "The layers of this model cannot be run one by one",
            file=str(skeleton.root),
            expected="a decoder whose layers take the hidden states of the layer before",
            found=type(skeleton.model).__name__,
        )
    return first, [item.call for item in recorders if item.call is not None]


def run_layer(skeleton: Skeleton, number: int, states: Tensor, call: LayerCall) -> Tensor:
    """One decoder layer, filled before: [B, L, H] -> [B, L, H]."""
    with _forward(skeleton):
        result = skeleton.layers[number](states, *call.args, **call.kwargs)
    if isinstance(result, tuple):
        raise UnsupportedError(
            "The layers of this model pass more than hidden states to one another",
            file=str(skeleton.root),
            tensor=skeleton.layer_prefix(number),
            found=type(skeleton.layers[number]).__name__,
        )
    output: Tensor = result
    return output


def final_logits(skeleton: Skeleton, ids: Tensor, states: Tensor, positions: Tensor) -> Tensor:
    """Logits after the last layer, [B, n, V], at some positions of each window.

    Args:
        ids: int64 [B, L].
        states: hidden states after the last layer, [B, L, H].
        positions: int64 [n].
    """
    replaced: list[nn.Module] = [_Recorder(layer) for layer in skeleton.layers]
    replaced[-1] = _Computed(skeleton.layers[-1], states.to(skeleton.device))
    with _replaced(skeleton, replaced), _forward(skeleton):
        output = skeleton.model(
            input_ids=ids.to(skeleton.device), use_cache=False, logits_to_keep=positions.to(skeleton.device)
        )
    logits: Tensor = output.logits
    return logits


@contextmanager
def _forward(skeleton: Skeleton) -> Iterator[None]:
    """Code of the model's class: without gradients, and its exceptions as errors of ours."""
    try:
        with torch.no_grad():
            yield
    except torch.OutOfMemoryError as error:
        raise UsageError(
            "The device's memory is too small for a batch", found=str(skeleton.device), hint="give a smaller --batch"
        ) from error
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedError(
            "The model's class in transformers cannot be run layer by layer",
            file=str(skeleton.root),
            found=f"{type(skeleton.model).__name__}: {error}"[:200],
        ) from error


@contextmanager
def _replaced(skeleton: Skeleton, modules: Iterable[nn.Module]) -> Iterator[None]:
    owner, leaf = skeleton.owner(skeleton.layers_path)
    before = getattr(owner, leaf)
    setattr(owner, leaf, nn.ModuleList(modules))
    try:
        yield
    finally:
        setattr(owner, leaf, before)
