"""The parameters of a transformers model that the tensors of a checkpoint go to, by transformers' own mapping."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class NameMapping:
    """The mapping from names in checkpoints to those of a model's parameters.

    Args:
        model: the transformers model.
        state: name -> parameter or buffer of the model.

    Attributes:
        entries: transformers' renamings and converters, as its loader takes them.
    """

    def __init__(self, model: Any, state: dict[str, Tensor]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.entries: list[Any] = list(get_model_conversion_mapping(model))
        self._renamings = [item for item in self.entries if isinstance(item, WeightRenaming)]
        self._converters = [item for item in self.entries if isinstance(item, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._state = state
        self._targets: dict[str, str] = {}

    def target(self, name: str) -> str:
        """The parameter that a tensor of a checkpoint goes to, or becomes a part of."""
        if name not in self._targets:
            self._targets[name] = self._find_target(name)
        return self._targets[name]

    def _find_target(self, name: str) -> str:
        from transformers.core_model_loading import rename_source_key

        renamed, _ = rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)
        target = str(renamed)
        # A mapping of published names may also hit names that are the model's own already.
        return name if name in self._state and target not in self._state else target
