"""A transformers model on the meta device, whose decoder layers are filled and emptied one by one.

Weights are renamed and converted by transformers' own mapping, as it does when it loads a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from quarkconv.errors import SourceError, UnsupportedError
from quarkconv.evaluate.buffers import compute_buffers
from quarkconv.evaluate.expert_classes import is_routed, set_layout, with_identities
from quarkconv.evaluate.float_experts import FloatExperts, OwnWeights, computes_grouped
from quarkconv.evaluate.model_class import meta_model
from quarkconv.evaluate.name_mapping import NameMapping
from quarkconv.evaluate.norms import fuse_norms
from quarkconv.evaluate.request import VERIFY_INSTEAD
from quarkconv.evaluate.rotary import fuse_rotary

_LAYERS: Final = ("layers", "blocks")
"""Names of the list of decoder layers."""


class Skeleton:
    """A model without its weights.

    Args:
        root: directory with config.json.
        device: where layers are filled.
        group: routed experts of a layer that are on the device at a time; None for all. The others stay on the CPU.

    Attributes:
        model: the transformers model, ``...ForCausalLM``.
        dtype: of its floats.
        layers: the decoder layers.
        layers_path: the name of their list.
        unmatched: tensors of the checkpoint that are not parameters of the model.
        pairs: decoder layers return a pair, hidden states and what they hand on; None until they have been called.
        device: where layers are filled.
        group: as above.
        divided: path -> forward of routed experts in floats that run in groups.

    Raises:
        UnsupportedError: transformers has no class for the model type, or its layers cannot be run one by one.
        UsageError: transformers is missing or too old.
    """

    def __init__(self, root: Path, device: torch.device, group: int | None = None) -> None:
        self.root, self.device, self.group = root, device, group
        self.model, self.dtype = meta_model(root)
        self.layers_path, self.layers = self._find_layers()
        self.unmatched: list[str] = []
        self.pairs: bool | None = None
        self._meta_state = dict(self.model.state_dict().items())
        self._names = NameMapping(self.model, self._meta_state)
        compute_buffers(self.model, self._meta_state, root, device)
        for module in self.model.modules():
            set_layout(module)
        self.divided: dict[str, FloatExperts] = {}
        if device.type == "cuda":
            self.fuse()
        if group is not None:
            self.divided = self._replace_experts(group)

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def hidden(self) -> int:
        """Hidden size."""
        return int(self.model.get_input_embeddings().weight.shape[-1])

    @property
    def positions(self) -> int | None:
        """The longest window that the model is built for, by its config; None where that does not say."""
        found = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    def target(self, name: str) -> str:
        """The parameter of the model that a tensor of a checkpoint goes to, or becomes a part of."""
        return self._names.target(name)

    def layer_of(self, parameter: str) -> int | None:
        """Number of the decoder layer that a parameter belongs to; None for the rest of the model."""
        match = re.match(rf"{re.escape(self.layers_path)}\.(\d+)\.", parameter)
        number = int(match[1]) if match else -1
        return number if 0 <= number < len(self.layers) else None

    def has(self, parameter: str) -> bool:
        """Whether the model has a parameter."""
        return parameter in self._meta_state

    def layer_prefix(self, number: int) -> str:
        """Name of a decoder layer, such as ``model.layers.3``."""
        return f"{self.layers_path}.{number}"

    def fill(self, tensors: Mapping[str, Tensor], prefix: str | None, elsewhere: Container[str] = ()) -> None:
        """Load tensors of a checkpoint into the model, converted as transformers does when it loads.

        Args:
            tensors: name in the checkpoint -> tensor.
            prefix: every parameter below this name has to be filled; None for every one outside of the decoder layers.
            elsewhere: modules whose parameters stay empty.

        Raises:
            SourceError: a parameter has no tensor, or one of another shape.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        # Here, not by transformers: its threads would convert on a stream of their own.
        tensors = {name: self._converted(name, tensor) for name, tensor in tensors.items()}
        number = None if prefix is None else self.layer_of(f"{prefix}.")
        for path, module in self.experts_of(number).items() if number is not None else ():
            tensors |= dict(with_identities(path, module, tensors))
        own = {name for name in tensors if self.has(name) and self.target(name) == name}
        devices = {"": self.device} | {path: torch.device("cpu") for path in self.divided}
        config = LoadStateDictConfig(dtype=self.dtype, device_map=devices, weight_mapping=list(self._names.entries))
        with _no_bars():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, config)
        for name in own:
            self._set(name, tensors[name])
        if info.mismatched_keys or info.conversion_errors:
            name, *shapes = (sorted(info.mismatched_keys) or [(next(iter(info.conversion_errors)), (), ())])[0]
            stored, expected = (str(list(shape)) if shape else None for shape in shapes)
            raise SourceError(
                "A tensor does not fit the model's class",
                code="shape-unexpected",
                file=str(self.root),
                tensor=name,
                expected=expected,
                found=stored,
                hint="run `quarkconv inspect`",
            )
        if prefix is not None:
            self._detach(prefix)
        self._require_filled(prefix, elsewhere)

    def _require_filled(self, prefix: str | None, elsewhere: Container[str]) -> None:
        """Refuse a checkpoint without a tensor for a parameter; arguments and errors as of :meth:`fill`."""
        for name, parameter in self.model.named_parameters():
            inside = name.startswith(f"{prefix}.") if prefix is not None else self.layer_of(name) is None
            if inside and parameter.is_meta and name.rpartition(".")[0] not in elsewhere and not self._tied(name):
                leaf = ".".join(name.split(".")[-2:])
                if other := next((item for item in self.unmatched if item.endswith(leaf) or ".experts." in item), None):
                    raise UnsupportedError(
                        "The model's class in transformers does not load tensors of these names",
                        file=str(self.root),
                        tensor=other,
                        expected=name,
                        hint=VERIFY_INSTEAD,
                    )
                raise SourceError(
                    "The checkpoint has no tensor for a parameter of the model",
                    code="tensor-missing",
                    file=str(self.root),
                    tensor=name,
                    hint="run `quarkconv inspect`",
                )

    def _converted(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of a checkpoint in the dtype of its parameter."""
        parameter = self._meta_state.get(self.target(name))
        return tensor if parameter is None else tensor.to(parameter.dtype)

    def share(self, other: Skeleton) -> None:
        """Take what lies outside of the decoder layers from another model where it is equal, such as embeddings."""
        others = dict(other.model.named_parameters())
        for name, parameter in list(self.model.named_parameters()):
            found = others.get(name)
            if self.layer_of(name) is not None or found is None or found.is_meta or parameter.is_meta:
                continue
            if found.shape == parameter.shape and found.dtype == parameter.dtype and torch.equal(found, parameter):
                owner, leaf = self.owner(name)
                owner._parameters[leaf] = found

    def _detach(self, prefix: str) -> None:
        """Copy the tensors that are parts of larger memory, so that it can be freed."""
        for path, module in self.module(prefix).named_modules():
            if f"{prefix}.{path}" in self.divided:
                continue  # read into memory of their own
            for name, parameter in module._parameters.items():
                if parameter is not None and _is_part(parameter):
                    module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None and _is_part(buffer):
                    module._buffers[name] = buffer.clone()

    def empty(self, number: int) -> None:
        """Free the parameters of a decoder layer."""
        for path, module in self.experts_of(number).items():
            if path in self.divided:
                self.divided[path].weights = OwnWeights(module)
        layer = self.layers[number]
        for module in layer.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and not parameter.is_meta:
                    module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    def module(self, path: str) -> nn.Module:
        """A module by its path.

        Raises:
            KeyError: the model has no such module.
        """
        try:
            module: nn.Module = self.model.get_submodule(path)
        except AttributeError as error:
            raise KeyError(path) from error
        return module

    def experts_of(self, number: int) -> dict[str, nn.Module]:
        """Path -> module of the routed experts of a decoder layer; empty in dense layers."""
        prefix = self.layer_prefix(number)
        return {f"{prefix}.{name}": module for name, module in self.layers[number].named_modules() if is_routed(module)}

    def expert_paths(self, number: int) -> list[str]:
        """Paths of the routed experts of a decoder layer, also of classes whose experts cannot be replaced."""
        prefix = self.layer_prefix(number)
        named = (f"{prefix}.{name}" for name, _ in self.layers[number].named_modules() if name.endswith(".experts"))
        return list(self.experts_of(number)) or list(named)

    def fuse(self) -> None:
        """Have norms, rotary embeddings and experts in floats run in fewer kernels."""
        fuse_norms(self.model)
        fuse_rotary(self.model)
        self._replace_experts(None)

    def _replace_experts(self, group: int | None) -> dict[str, FloatExperts]:
        replaced = {}
        for number in range(len(self.layers)):
            for path, module in self.experts_of(number).items():
                if computes_grouped(module):
                    module.forward = replaced[path] = FloatExperts(module, group)
        return replaced

    def divided_owner(self, parameter: str) -> str | None:
        """The routed experts that a parameter belongs to, if they run in groups."""
        path = parameter.rpartition(".")[0]
        return path if path in self.divided else None

    def _set(self, name: str, tensor: Tensor) -> None:
        """Fill a parameter or buffer that transformers' loader skipped because it renames the tensor."""
        owner, leaf = self.owner(name)
        held = owner._parameters.get(leaf, owner._buffers.get(leaf))
        if held is not None and held.is_meta and held.shape == tensor.shape:
            device = torch.device("cpu") if self.divided_owner(name) else self.device
            filled = tensor.to(device, held.dtype)
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(filled, requires_grad=False)
            else:
                owner._buffers[leaf] = filled

    def owner(self, path: str) -> tuple[nn.Module, str]:
        """The module that holds a module, parameter or buffer, and its name there."""
        head, _, leaf = path.rpartition(".")
        return (self.model.get_submodule(head) if head else self.model), leaf

    def _find_layers(self) -> tuple[str, nn.ModuleList]:
        decoder = self.model.get_decoder()
        owners = (decoder, getattr(decoder, "model", None))  # of Llama4ForCausalLM transformers returns all of it
        layers = next(
            (found for owner in owners for leaf in _LAYERS if (found := getattr(owner, leaf, None)) is not None), None
        )
        names = {id(module): name for name, module in self.model.named_modules()}
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise UnsupportedError(
                "The decoder of this model has no list of layers",
                file=str(self.root),
                found=type(decoder).__name__,
                hint=VERIFY_INSTEAD,
            )
        return names[id(layers)], layers

    def _tied(self, name: str) -> bool:
        """Whether a parameter shares its data with another one that is filled."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        if name not in tied:
            return False
        source = self.model.get_parameter(tied[name])
        if source.is_meta:
            return False
        owner, leaf = self.owner(name)
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
