"""Modules of packages that are compiled for GPUs: every name exists in them, and nothing does anything."""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableSequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Stub(ModuleType):
    __path__: MutableSequence[str] = []  # noqa: RUF012 - of a package without files

    def __init__(self, name: str, member: Callable[[str], object]) -> None:
        super().__init__(name)
        self._member = member

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._member(name)


class Stubs(MetaPathFinder, Loader):
    """Finds packages by name before Python does.

    Args:
        packages: their names; more may be added later.
        member: what a name in such a module stands for.
    """

    def __init__(self, packages: set[str], member: Callable[[str], object]) -> None:
        self.packages = packages
        self._member = member
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        """The module of a package, or None."""
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.packages else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module with every name."""
        return _Stub(spec.name, self._member)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to do."""
