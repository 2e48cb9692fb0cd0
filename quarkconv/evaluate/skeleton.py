"""A transformers model on the meta device, whose decoder layers are filled and emptied one by one.

Weights are renamed and converted by transformers' own mapping, as it does when it loads a checkpoint.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import torch
from torch import nn

from quarkconv.errors import UnsupportedError
from quarkconv.evaluate.buffers import compute_buffers
from quarkconv.evaluate.expert_classes import is_routed, set_layout
from quarkconv.evaluate.float_experts import FloatExperts, computes_grouped
from quarkconv.evaluate.model_class import meta_model
from quarkconv.evaluate.name_mapping import NameMapping
from quarkconv.evaluate.norms import fuse_norms
from quarkconv.evaluate.request import VERIFY_INSTEAD
from quarkconv.evaluate.rotary import fuse_rotary
from quarkconv.evaluate.top_k import fuse_top_k

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
        mapping: names of checkpoints -> parameters.
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
        self.mapping = NameMapping(self.model, self._meta_state)
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
        return self.mapping.target(name)

    def layer_of(self, parameter: str) -> int | None:
        """Number of the decoder layer that a parameter belongs to; None for the rest of the model."""
        match = re.match(rf"{re.escape(self.layers_path)}\.(\d+)\.", parameter)
        number = int(match[1]) if match else -1
        return number if 0 <= number < len(self.layers) else None

    def has(self, parameter: str) -> bool:
        """Whether the model has a parameter."""
        return parameter in self._meta_state

    def dtype_of(self, parameter: str) -> torch.dtype | None:
        """The dtype of a parameter; None where the model has no such parameter."""
        held = self._meta_state.get(parameter)
        return None if held is None else held.dtype

    def layer_prefix(self, number: int) -> str:
        """Name of a decoder layer, such as ``model.layers.3``."""
        return f"{self.layers_path}.{number}"

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
        """Have norms, rotary embeddings, routers and experts in floats run in fewer kernels."""
        fuse_norms(self.model)
        fuse_rotary(self.model)
        fuse_top_k(self.model)
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
