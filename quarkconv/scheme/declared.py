"""The scheme that a quantization_config declares for each module, in any format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Final, NamedTuple

from quarkconv.headers.file_names import MODELOPT_NAME
from quarkconv.scheme.merged import with_parts
from quarkconv.scheme.patterns import TimeLimit, name_filter
from quarkconv.scheme.spec import FLOAT, PER_TENSOR, SCHEME_NAMES, ModuleScheme, TensorSpec
from quarkconv.text import shown

_CACHE_DTYPE: Final = "fp8_e4m3"
_CACHE_GRANULARITIES: Final = frozenset({PER_TENSOR, "attn_head"})
_MAX_PROBLEMS: Final = 100
"""Problems of a config that are listed."""


class ConfigProblem(NamedTuple):
    """A field of a quantization config that has the wrong type and was ignored."""

    field: str
    expected: str
    found: str


class DeclaredScheme(ABC):
    """The scheme that a config declares for each module.

    Attributes:
        method: the config's ``quant_method``.
        version: version of the tool that wrote the config, if the config has one.
        default: the scheme of a module that no entry mentions.
        problems: fields of the wrong type, which were ignored.
        stores_codes: False when the config says that weights are stored in float, to be quantized at load.
        lists_float: False when the format names no modules that stay in float.
        kv_cache: how the key-value cache is quantized; None when it is not.
        kv_cache_modules: name patterns of the modules whose outputs go into it.
        names: the INT8 schemes that the format can express, and their names.
        file: the file that declares it.
        subject: the part of that file, in findings.
    """

    names: ClassVar[Mapping[ModuleScheme, str]] = SCHEME_NAMES
    file: ClassVar[str] = "config.json"
    subject: ClassVar[str] = "quantization_config"

    def __init__(self, method: str, version: str | None = None) -> None:
        self.method = method
        self.version = version
        self.default: ModuleScheme = FLOAT
        self.problems: list[ConfigProblem] = []
        self.stores_codes = True
        self.lists_float = True
        self.kv_cache: TensorSpec | None = None
        self.kv_cache_modules: tuple[str, ...] = ()

    @property
    def runs_cache(self) -> bool:
        """Whether engines run the key-value cache as declared: in symmetric FP8 (vLLM 0.33), or not quantized."""
        spec = self.kv_cache
        return spec is None or (
            spec.dtype == _CACHE_DTYPE and spec.symmetric and spec.granularity in _CACHE_GRANULARITIES
        )

    @abstractmethod
    def resolve(self, module: str) -> ModuleScheme:
        """The scheme of one linear, named as in the checkpoint and without ``.weight``."""

    def resolver(self) -> Callable[[str], ModuleScheme]:
        """:meth:`resolve`, for very many modules."""
        return self.resolve

    def resolve_expert(self, experts: str, module: str) -> ModuleScheme:  # noqa: ARG002
        """The scheme of a routed expert's projection ``module``, in the module ``experts`` that holds all of them."""
        return self.resolve(module)

    def _problem(self, where: str, expected: str, found: object) -> None:
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(ConfigProblem(where, expected, shown(found)))

    def _filter(
        self, value: object, where: str, *, limit: TimeLimit, globs: bool = False, merged: bool = False
    ) -> Callable[[str], object]:
        """A test of module names against a list of the config.

        Args:
            value: the list.
            where: its field.
            limit: see :func:`quarkconv.scheme.patterns.name_filter`, as for ``globs``.
            merged: whether the name of a merged linear means its parts.
        """
        names = self._strings(value, where)
        entries = with_parts(names) if merged else names
        invalid = partial(self._problem, where, "a regular expression after re:")
        return name_filter(entries, globs=globs, limit=limit, on_invalid=invalid)

    def _object(self, value: object, where: str) -> dict[str, Any]:
        if value is None:
            return {}
        if isinstance(value, dict):
            return value
        self._problem(where, "an object", value)
        return {}

    def _strings(self, value: object, where: str) -> list[str]:
        if value is None:
            return []
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        self._problem(where, "a list of strings", value)
        return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


class UnknownScheme(DeclaredScheme):
    """An unknown ``quant_method``: it declares nothing."""

    def resolve(self, module: str) -> ModuleScheme:  # noqa: ARG002
        return FLOAT


class ModelOptScheme(UnknownScheme):
    """The config of NVIDIA's ModelOpt in a file of its own, which engines read where config.json has none."""

    file = MODELOPT_NAME
    subject = MODELOPT_NAME

    def __init__(self) -> None:
        super().__init__("modelopt")
