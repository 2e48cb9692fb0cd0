"""``quarkconv engines``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quarkconv.cli.options import Json, Quiet, Verbose
from quarkconv.cli.out import open_output
from quarkconv.inspection.engine_facts import engine_facts

if TYPE_CHECKING:
    from rich.console import RenderableType


def engines(verbose: Verbose = False, quiet: Quiet = False, json: Json = False) -> int:
    """Show what engines do with each form, with evidence."""
    facts = engine_facts()
    rows = [{**fact.to_json(), "evidence": fact.evidence, "checked": fact.checked} for fact in facts]

    def render() -> RenderableType:
        from quarkconv.cli.render.engines import EngineTable

        return EngineTable(facts, evidence=True)

    open_output(json=json, verbose=verbose, quiet=quiet).show(
        {"schema": "quarkconv.engines/1", "engines": rows}, render
    )
    return 0
