"""The parameters of a skeleton: filled with tensors of a checkpoint, shared with another model, and freed."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quarkconv.errors import SourceError, UnsupportedError
from quarkconv.evaluate.expert_classes import with_identities
from quarkconv.evaluate.float_experts import OwnWeights
from quarkconv.evaluate.request import VERIFY_INSTEAD
from quarkconv.evaluate.skeleton import Skeleton


def fill(skeleton: Skeleton, tensors: Mapping[str, Tensor], prefix: str | None, elsewhere: Container[str] = ()) -> None:
    """Load tensors of a checkpoint into the model, converted as transformers does when it loads.

    Args:
        skeleton: the model.
        tensors: name in the checkpoint -> tensor.
        prefix: every parameter below this name has to be filled; None for every one outside of the decoder layers.
        elsewhere: modules whose parameters stay empty.

    Raises:
        SourceError: a parameter has no tensor, or one of another shape.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    # Here, not by transformers: its threads would convert on a stream of their own.
    tensors = {name: _converted(skeleton, name, tensor) for name, tensor in tensors.items()}
    number = None if prefix is None else skeleton.layer_of(f"{prefix}.")
    for path, module in skeleton.experts_of(number).items() if number is not None else ():
        tensors |= dict(with_identities(path, module, tensors))
    own = {name for name in tensors if skeleton.has(name) and skeleton.target(name) == name}
    devices = {"": skeleton.device} | {path: torch.device("cpu") for path in skeleton.divided}
    config = LoadStateDictConfig(
        dtype=skeleton.dtype, device_map=devices, weight_mapping=list(skeleton.mapping.entries)
    )
    with _no_bars():
        info, _ = convert_and_load_state_dict_in_model(skeleton.model, tensors, config)
    for name in own:
        _set(skeleton, name, tensors[name])
    if info.mismatched_keys or info.conversion_errors:
        name, *shapes = (sorted(info.mismatched_keys) or [(next(iter(info.conversion_errors)), (), ())])[0]
        stored, expected = (str(list(shape)) if shape else None for shape in shapes)
        raise SourceError(
            "A tensor does not fit the model's class",
            code="shape-unexpected",
            file=str(skeleton.root),
            tensor=name,
            expected=expected,
            found=stored,
            hint="run `quarkconv inspect`",
        )
    if prefix is not None:
        _detach(skeleton, prefix)
    _require_filled(skeleton, prefix, elsewhere)


def share(skeleton: Skeleton, other: Skeleton) -> None:
    """Take what lies outside of the decoder layers from another model where it is equal, such as embeddings."""
    others = dict(other.model.named_parameters())
    for name, parameter in list(skeleton.model.named_parameters()):
        found = others.get(name)
        if skeleton.layer_of(name) is not None or found is None or found.is_meta or parameter.is_meta:
            continue
        if found.shape == parameter.shape and found.dtype == parameter.dtype and torch.equal(found, parameter):
            owner, leaf = skeleton.owner(name)
            owner._parameters[leaf] = found


def empty(skeleton: Skeleton, number: int) -> None:
    """Free the parameters of a decoder layer."""
    for path, module in skeleton.experts_of(number).items():
        if path in skeleton.divided:
            skeleton.divided[path].weights = OwnWeights(module)
    layer = skeleton.layers[number]
    for module in layer.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not parameter.is_meta:
                module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def _require_filled(skeleton: Skeleton, prefix: str | None, elsewhere: Container[str]) -> None:
    """Refuse a checkpoint without a tensor for a parameter; arguments and errors as of :func:`fill`."""
    for name, parameter in skeleton.model.named_parameters():
        inside = name.startswith(f"{prefix}.") if prefix is not None else skeleton.layer_of(name) is None
        if inside and parameter.is_meta and name.rpartition(".")[0] not in elsewhere and not _tied(skeleton, name):
            leaf = ".".join(name.split(".")[-2:])
            if other := next((item for item in skeleton.unmatched if item.endswith(leaf) or ".experts." in item), None):
                raise UnsupportedError(
                    "The model's class in transformers does not load tensors of these names",
                    file=str(skeleton.root),
                    tensor=other,
                    expected=name,
                    hint=VERIFY_INSTEAD,
                )
            raise SourceError(
                "The checkpoint has no tensor for a parameter of the model",
                code="tensor-missing",
                file=str(skeleton.root),
                tensor=name,
                hint="run `quarkconv inspect`",
            )


def _converted(skeleton: Skeleton, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a checkpoint in the dtype of its parameter."""
    dtype = skeleton.dtype_of(skeleton.target(name))
    return tensor if dtype is None else tensor.to(dtype)


def _detach(skeleton: Skeleton, prefix: str) -> None:
    """Copy the tensors that are parts of larger memory, so that it can be freed."""
    for path, module in skeleton.module(prefix).named_modules():
        if f"{prefix}.{path}" in skeleton.divided:
            continue  # read into memory of their own
        for name, parameter in module._parameters.items():
            if parameter is not None and _is_part(parameter):
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and _is_part(buffer):
                module._buffers[name] = buffer.clone()


def _set(skeleton: Skeleton, name: str, tensor: Tensor) -> None:
    """Fill a parameter or buffer that transformers' loader skipped because it renames the tensor."""
    owner, leaf = skeleton.owner(name)
    held = owner._parameters.get(leaf, owner._buffers.get(leaf))
    if held is not None and held.is_meta and held.shape == tensor.shape:
        device = torch.device("cpu") if skeleton.divided_owner(name) else skeleton.device
        filled = tensor.to(device, held.dtype)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(filled, requires_grad=False)
        else:
            owner._buffers[leaf] = filled


def _tied(skeleton: Skeleton, name: str) -> bool:
    """Whether a parameter shares its data with another one that is filled."""
    tied = getattr(skeleton.model, "all_tied_weights_keys", None) or {}
    if name not in tied:
        return False
    source = skeleton.model.get_parameter(tied[name])
    if source.is_meta:
        return False
    owner, leaf = skeleton.owner(name)
    owner._parameters[leaf] = source
    return True


def _is_part(tensor: Tensor) -> bool:
    """Whether a tensor keeps more memory than its own."""
    return not tensor.is_meta and tensor.untyped_storage().nbytes() > tensor.nbytes


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers draws a bar for each call that loads weights."""
    from transformers.utils import logging

    bars: Any = logging  # its functions are typed in some releases only
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
