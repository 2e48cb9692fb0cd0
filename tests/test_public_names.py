"""The public names: each resolves, and the types that public functions take and return are public as well."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest

import quarkconv

FUNCTIONS = [name for name in quarkconv.__all__ if inspect.isfunction(getattr(quarkconv, name))]


def parts(hint: Any) -> Iterator[Any]:
    """A type, and those that it is made of."""
    yield hint
    for argument in get_args(hint):
        yield from parts(argument)


def test_the_public_names_are_sorted_and_each_resolves() -> None:
    assert sorted(quarkconv.__all__) == quarkconv.__all__
    assert all(getattr(quarkconv, name).__name__ == name for name in quarkconv.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_take_and_return_public_types(name: str) -> None:
    hints = get_type_hints(getattr(quarkconv, name)).values()
    own = {part for hint in hints for part in parts(hint) if isinstance(part, type)}
    private = {part.__name__ for part in own if part.__module__.startswith("quarkconv.")} - {*quarkconv.__all__}
    assert private == set()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_docstring_of_a_public_function_names_its_arguments_and_errors(name: str) -> None:
    function = getattr(quarkconv, name)
    text = inspect.getdoc(function) or ""
    assert "Raises:" in text
    assert [argument for argument in inspect.signature(function).parameters if argument not in text] == []
